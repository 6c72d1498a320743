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
    killed: set[int] = set()
    while members := _members(session_id) - killed - {spare}:  # until nobody is left who could have forked
        for pid in members:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        killed |= members


def _members(session_id: int) -> set[int]:
    members = set()
    for pid in psutil.pids():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.getsid(pid) == session_id:
                members.add(pid)
    return members


def ending_of(returncode: int) -> str:
    """How a process ended, in words: its exit status, or the signal that killed it."""
    if returncode >= 0:
        return f"exit status {returncode}"
    try:
        return f"signal {signal.Signals(-returncode).name}"
    except ValueError:  # most real-time signals have no name
        return f"signal {-returncode}"


def kill_group(group_id: int) -> None:
    """Kill every process of a group that is still there."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group_id, signal.SIGKILL)
