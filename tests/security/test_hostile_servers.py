"""Servers of references that break HTTP itself: each gets its time and its bytes, and no more."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest

from ourvidz_core.delivery.references import HttpReferences
from ourvidz_core.errors import JobError
from ourvidz_core.wire.jobs import Reference

#: As long as a reference may take in these tests.
SECONDS = 0.3
MAX_BYTES = 100_000
Answer = Callable[[socket.socket], None]


@contextmanager
def raw_server(answer: Answer) -> Iterator[str]:
    """A server that answers each connection with bytes of its own, whatever HTTP says."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listening:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                with connection, suppress(OSError):
                    connection.recv(65536)
                    answer(connection)

        threading.Thread(target=serve, daemon=True).start()
        yield f"127.0.0.1:{listening.getsockname()[1]}"


def refusal(answer: Answer, directory: Path) -> tuple[JobError, float]:
    """The error that a reference from such a server is, and the seconds until it was."""
    with raw_server(answer) as host:
        source = HttpReferences(
            max_bytes=MAX_BYTES, max_pixels=1_000_000, timeout_seconds=SECONDS, allowed_hosts=[host]
        )
        began = time.monotonic()
        with pytest.raises(JobError) as caught:
            source.fetch(Reference(url=f"http://{host}/a.png?token=canary"), directory, "single")
    assert "canary" not in str(caught.value)
    assert not list(directory.iterdir())
    return caught.value, time.monotonic() - began


def said(*pieces: bytes) -> Answer:
    return lambda connection: [connection.sendall(piece) for piece in pieces] and None


def forever(first: bytes, again: bytes, *, pause: float = 0.0) -> Answer:
    def answer(connection: socket.socket) -> None:
        connection.sendall(first)
        while True:
            connection.sendall(again)
            time.sleep(pause)

    return answer


OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
ENDLESS = {
    "chunks": forever(CHUNKED, b"4000\r\n" + bytes(0x4000) + b"\r\n"),
    "a byte a chunk": forever(CHUNKED, b"1\r\nx\r\n", pause=0.01),
    "a chunk size without an end": forever(CHUNKED, b"0" * 1000),
    "trailers": forever(CHUNKED + b"1\r\nx\r\n0\r\n", b"X-Trailer: a\r\n"),
    "headers": forever(OK, b"X-Header: a\r\n"),
    "one header": forever(OK + b"X-Header: ", b"a" * 1000),
    "a header at a time": forever(OK, b"X-Header: a\r\n", pause=0.05),
    "interim answers": forever(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "a status line": forever(b"HTTP/1.1 ", b"2" * 1000),
}


@pytest.mark.parametrize("what", ENDLESS)
def test_what_has_no_end_ends_in_time(what: str, tmp_path: Path) -> None:
    _, seconds = refusal(ENDLESS[what], tmp_path)
    assert seconds < SECONDS + 1.0


BROKEN = {
    "no HTTP": said(b"220 ftp ready\r\n"),
    "nothing": said(),
    "HTTP/0.9": said(b"just the picture"),
    "a negative length": said(OK + b"Content-Length: -1\r\n\r\nabc"),
    "two lengths": said(OK + b"Content-Length: 3\r\nContent-Length: 300\r\n\r\nabc"),
    "a length in words": said(OK + b"Content-Length: many\r\n\r\nabc"),
    "a length beyond numbers": said(OK + b"Content-Length: " + b"9" * 400 + b"\r\n\r\nabc"),
    "a length of 5000 digits": said(OK + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\nabc"),
    "a chunk of 2^64 bytes": said(CHUNKED + b"FFFFFFFFFFFFFFFF\r\nabc"),
    "a chunk of negative size": said(CHUNKED + b"-5\r\nabc"),
    "a chunk that is no number": said(CHUNKED + b"zz\r\nabc"),
    "a chunk that stops": said(CHUNKED + b"100\r\nabc"),
    "a length and chunks": said(OK + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
    "a redirect to nowhere": said(b"HTTP/1.1 302 Found\r\nLocation: http://[::1\r\n\r\n"),
    "a redirect with a new header": said(b"HTTP/1.1 302 Found\r\nLocation: http://a/\x0bX: y\r\n\r\n"),
    "a redirect of a megabyte": said(b"HTTP/1.1 302 Found\r\nLocation: http://a/" + b"x" * 60_000 + b"\r\n\r\n"),
    "an unasked compression": said(OK + b"Content-Encoding: br\r\nContent-Length: 3\r\n\r\nabc"),
    "a compression in the transfer": said(OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_answer_is_an_error_of_that_reference_and_nothing_else(what: str, tmp_path: Path) -> None:
    error, seconds = refusal(BROKEN[what], tmp_path)
    assert len(str(error)) < 500
    assert seconds < SECONDS + 1.0
