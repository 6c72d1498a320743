"""The line between the orchestrator and a worker: the worker says when it is ready, and ends when the line breaks.

A socket pair; each message is a line of JSON, and an empty line says that the worker's process
still runs. The kernel closes the orchestrator's end with its process, whatever ended that, so
no worker outlives it.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from attrs import field, frozen

from ourvidz_core.errors import PayloadError
from ourvidz_core.wire.payloads import structure


@frozen(kw_only=True)
class Ready:
    """What a worker says when it begins to take jobs."""

    queues: tuple[str, ...] = ()
    #: What it leaves to others, and why: a queue or a job type, and the reason.
    left_out: Mapping[str, str] = field(factory=dict)


class WorkerEnd:
    """The worker's end. ``on_gone`` is called in a thread when the orchestrator is no more."""

    def __init__(self, descriptor: int, on_gone: Callable[[], None], *, sign_seconds: float = 5.0) -> None:
        os.set_inheritable(descriptor, False)  # what the worker starts must not hold the line open
        self._socket = socket.socket(fileno=descriptor)
        self._sign_seconds = sign_seconds
        self._on_gone = on_gone
        threading.Thread(target=self._watch, name="orchestrator", daemon=True).start()

    def say_ready(self, queues: Sequence[str], left_out: Mapping[str, str]) -> None:
        """Say that jobs are taken from now on."""
        line = json.dumps({"queues": list(queues), "left_out": dict(left_out)}) + "\n"
        with contextlib.suppress(OSError):  # whoever watches the line sees it break, too
            self._socket.sendall(line.encode())

    def _watch(self) -> None:
        with contextlib.suppress(OSError):
            while not select.select([self._socket], [], [], self._sign_seconds)[0]:
                self._socket.sendall(b"\n")
        # Nothing is ever said in this direction, so what can be read is the end.
        self._on_gone()


class OrchestratorEnd:
    """The orchestrator's end. Not blocking."""

    def __init__(self) -> None:
        self._socket, self._theirs = socket.socketpair()
        self._socket.setblocking(False)
        self._received = b""
        self.is_open = True
        #: When the worker last gave a sign of life, by the monotonic clock.
        self.heard_at = time.monotonic()

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
        """What the worker has just said; None for a sign of life. ``is_open`` turns false when it is gone."""
        try:
            data = self._socket.recv(65536)
        except BlockingIOError:
            return None
        except OSError:
            data = b""
        if not data:
            self.is_open = False
            return None
        self.heard_at = time.monotonic()
        *lines, self._received = (self._received + data).split(b"\n")
        said = [_understood(line) for line in lines if line]
        return said[-1] if said else None

    def close(self) -> None:
        """Break the line; a worker that is still there ends."""
        self._socket.close()
        self.is_open = False


def _understood(line: bytes) -> Ready:
    """A worker of another version may say it otherwise: it was replaced, and its orchestrator was not."""
    try:
        return structure(json.loads(line), Ready)
    except (ValueError, PayloadError):
        return Ready()
