"""Keep what this process knows from the processes beside it, which run plugins as the same user."""

from __future__ import annotations

import ctypes
import logging
import sys

logger = logging.getLogger(__name__)

_PR_SET_DUMPABLE = 4


def keep_to_itself() -> None:
    """Let no process of this user read this one's environment or memory, or trace it.

    An engine starts without the secrets, and would else find them in ``/proc/<parent>/environ``.
    Holds on Linux, against everybody but a root with all its capabilities; programs that are
    started afterwards are as readable as ever. No core dump is left either.
    """
    if not sys.platform.startswith("linux"):
        return
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        logger.warning("this process's environment stays readable to its engines (errno %s)", ctypes.get_errno())
