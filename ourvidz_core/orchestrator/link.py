"""The line between the orchestrator and a worker: the worker says when it is ready, and ends when the line breaks.

A socket pair; each message is a line of JSON. The kernel closes the orchestrator's end with
its process, whatever ended that, so no worker outlives it.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
from collections.abc import Callable, Mapping, Sequence

from attrs import frozen

from ourvidz_core.wire.payloads import structure


@frozen(kw_only=True)
class Ready:
    """What a worker says when it begins to take jobs."""

    queues: tuple[str, ...]
    #: What it leaves to others, and why: a queue or a job type, and the reason.
    left_out: Mapping[str, str]


class WorkerEnd:
    """The worker's end. ``on_gone`` is called in a thread when the orchestrator is no more."""

    def __init__(self, descriptor: int, on_gone: Callable[[], None]) -> None:
        os.set_inheritable(descriptor, False)  # what the worker starts must not hold the line open
        self._socket = socket.socket(fileno=descriptor)
        self._on_gone = on_gone
        threading.Thread(target=self._watch, name="orchestrator", daemon=True).start()

    def say_ready(self, queues: Sequence[str], left_out: Mapping[str, str]) -> None:
        """Say that jobs are taken from now on."""
        line = json.dumps({"queues": list(queues), "left_out": dict(left_out)}) + "\n"
        with contextlib.suppress(OSError):  # whoever watches the line sees it break, too
            self._socket.sendall(line.encode())

    def _watch(self) -> None:
        with contextlib.suppress(OSError):
            while self._socket.recv(4096):
                pass
        self._on_gone()


class OrchestratorEnd:
    """The orchestrator's end. Not blocking."""

    def __init__(self) -> None:
        self._socket, self._theirs = socket.socketpair()
        self._socket.setblocking(False)
        self._received = b""
        self.is_open = True

    @property
    def their_descriptor(self) -> int:
        """What to pass to the worker."""
        return self._theirs.fileno()

    def passed_on(self) -> None:
        """The worker has its end now."""
        self._theirs.close()

    def fileno(self) -> int:
        """For a selector."""
        return self._socket.fileno()

    def read(self) -> Ready | None:
        """What the worker has said, if it has said all of it. ``is_open`` turns false when it is gone."""
        try:
            data = self._socket.recv(65536)
        except BlockingIOError:
            return None
        except OSError:
            data = b""
        if not data:
            self.is_open = False
            return None
        self._received += data
        line, end, rest = self._received.partition(b"\n")
        if not end:
            return None
        self._received = rest
        return structure(json.loads(line), Ready)

    def close(self) -> None:
        """Break the line; a worker that is still there ends."""
        self._socket.close()
        self.is_open = False
