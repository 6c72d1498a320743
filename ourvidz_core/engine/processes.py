"""End processes with everything they started."""

from __future__ import annotations

import contextlib
import os
import signal

import psutil


def kill_session(session_id: int, *, spare: int | None = None) -> None:
    """Kill every process of a session at once, whatever groups they made inside it.

    A command runs in a process group of its own, so killing the engine's group would
    leave it behind; the session is what they share. ``spare`` is a process left alone.
    """
    for pid in psutil.pids():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if pid != spare and os.getsid(pid) == session_id:
                os.kill(pid, signal.SIGKILL)


def kill_group(group_id: int) -> None:
    """Kill every process of a group that is still there."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group_id, signal.SIGKILL)
