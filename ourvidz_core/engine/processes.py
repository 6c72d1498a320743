"""End processes with everything they started, and say how they ended."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import uuid
from collections.abc import Callable, Iterable

import psutil

#: In the environment of an engine, and of a command, and of all that they start.
ENGINE_MARK = "OURVIDZ_ENGINE_MARK"
COMMAND_MARK = "OURVIDZ_COMMAND_MARK"
#: A traceback's last line; notes and the lines of a long message may follow it.
_EXCEPTION_LINE = re.compile(
    r"(\[rank\d+\]: ?)?[A-Za-z_][\w.]*(Error|Exception|Exit|Interrupt|Missing|Group|Type)\b.*: "
)


def new_mark() -> str:
    """A value for an environment variable by which :func:`kill_marked` knows a process and all it started."""
    return uuid.uuid4().hex


def kill_marked(variable: str, mark: str, *, spare: int | None = None) -> None:
    """Kill every process that was started with ``mark`` in the environment variable ``variable``.

    Children inherit it, so it finds those that left for a session of their own, whose
    parents are gone, too. ``spare`` is a process left alone.
    """
    _kill_all(lambda: _marked(variable, mark), spare)


def kill_session(session_id: int, *, spare: int | None = None) -> None:
    """Kill every process of a session at once, whatever groups they made inside it.

    A command runs in a process group of its own, so killing the engine's group would
    leave it behind; the session is what they share. ``spare`` is a process left alone.
    """
    _kill_all(lambda: _members(session_id), spare)


def kill_group(group_id: int) -> None:
    """Kill every process of a group that is still there."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group_id, signal.SIGKILL)


def ending_of(returncode: int) -> str:
    """How a process ended, in words: its exit status, or the signal that killed it."""
    if returncode >= 0:
        return f"exit status {returncode}"
    try:
        return f"signal {signal.Signals(-returncode).name}"
    except ValueError:  # most real-time signals have no name
        return f"signal {-returncode}"


def last_exception(lines: Iterable[str]) -> str | None:
    """The last of a process's lines that reads like the message of an exception nobody caught."""
    return next((line for line in reversed(list(lines)) if _EXCEPTION_LINE.match(line)), None)


def _kill_all(find: Callable[[], set[int]], spare: int | None) -> None:
    killed: set[int] = set()
    while found := find() - killed - {spare}:  # until nobody is left who could have forked
        for pid in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        killed |= found


def _members(session_id: int) -> set[int]:
    members = set()
    for pid in psutil.pids():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.getsid(pid) == session_id:
                members.add(pid)
    return members


def _marked(variable: str, mark: str) -> set[int]:
    marked = set()
    for pid in psutil.pids():
        with contextlib.suppress(psutil.Error, OSError):  # gone meanwhile, or another user's
            if psutil.Process(pid).environ().get(variable) == mark:
                marked.add(pid)
    return marked
