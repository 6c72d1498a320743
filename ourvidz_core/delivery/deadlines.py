"""One wall-clock limit over a whole exchange, however slowly the other side answers.

A socket's timeout bounds one read. A server that sends a byte a second never meets it,
so a :class:`Deadline` also shuts the connections it guards when its time is up.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from requests import Response

#: A timeout of zero would mean "do not block" to a socket.
_LEAST_TIMEOUT_SECONDS = 0.001


class Deadline:
    """A moment by which an exchange must be over. A context manager: leaving it stops guarding.

    >>> with Deadline(30) as deadline:
    ...     round(deadline.remaining_seconds)
    30
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds
        self._lock = threading.Lock()
        self._guarded: list[socket.socket] = []
        self._timer = threading.Timer(seconds, self._shut)
        self._timer.daemon = True

    @property
    def remaining_seconds(self) -> float:
        """Time left, never below zero."""
        return max(0.0, self._end - time.monotonic())

    @property
    def is_past(self) -> bool:
        """Whether the time is up."""
        return self.remaining_seconds == 0.0

    @property
    def socket_timeout(self) -> float:
        """The time left, as a timeout for a socket."""
        return max(_LEAST_TIMEOUT_SECONDS, self.remaining_seconds)

    def check(self) -> None:
        """Raise :class:`TimeoutError` once the time is up."""
        if self.is_past:
            raise TimeoutError(f"not done within {self.seconds:g} s")

    def guard(self, connection: socket.socket) -> None:
        """Shut ``connection`` at the deadline, also where TLS is put around it later."""
        with self._lock:
            # TLS takes the descriptor away from this socket object; a duplicate still
            # reaches the connection.
            self._guarded.append(connection.dup())

    def __enter__(self) -> Self:
        self._timer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        with self._lock:
            for connection in self._guarded:
                connection.close()
            self._guarded.clear()

    def _shut(self) -> None:
        with self._lock:
            for connection in self._guarded:
                with suppress(OSError):  # the other side may have hung up already
                    connection.shutdown(socket.SHUT_RDWR)


def read_start(response: Response, *, limit_bytes: int, deadline: Deadline) -> bytes:
    """The first ``limit_bytes`` of a streamed answer; what is still to come at the deadline is left out."""
    received = bytearray()
    try:
        for piece in _pieces(response):
            received += piece
            if len(received) >= limit_bytes or deadline.is_past:
                break
    except (OSError, _http_error()):
        pass  # the status has been read, and the start of the body explains it well enough
    return bytes(received[:limit_bytes])


def _pieces(response: Response) -> Iterator[bytes]:
    # read1 gives what has arrived, where iter_content would wait for a full piece.
    while piece := response.raw.read1(4096, decode_content=True):
        yield piece


def _http_error() -> type[Exception]:
    from urllib3.exceptions import HTTPError

    return HTTPError
