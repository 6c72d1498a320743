"""Serves the page, its events and previews, and takes the one change that it can ask for: a dead letter again."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from importlib.resources import files
from typing import Any
from urllib.parse import parse_qs, unquote

from attrs import field, frozen

from ourvidz_core.dashboard.access import COOKIE, SESSION_SECONDS, Access, Caller, Refused
from ourvidz_core.dashboard.feed import Feed
from ourvidz_core.dashboard.previews import Preview, Previews, opened, wanted_range
from ourvidz_core.delivery.queue import RequeueAnswer
from ourvidz_core.errors import QueueError
from ourvidz_core.observe.serving import Serving, ThreadedServer

logger = logging.getLogger(__name__)

#: A request must be there by then, and each piece of an answer be taken.
_REQUEST_SECONDS = 10.0
_BODY_BYTES = 4096
_CONNECTIONS = 64
_STREAMS = 16
#: A stream says something that often, so that proxies keep it and a reader that is gone is noticed.
_BEAT_SECONDS = 15.0
_WRONG_TOKEN_SECONDS = 0.5
_PIECE_BYTES = 256 * 1024

_STATIC = {
    "/dashboard.css": ("dashboard.css", "text/css; charset=utf-8"),
    "/dashboard.js": ("dashboard.js", "text/javascript; charset=utf-8"),
    "/plots.js": ("plots.js", "text/javascript; charset=utf-8"),
    "/favicon.svg": ("favicon.svg", "image/svg+xml"),
}
_HTML = "text/html; charset=utf-8"
_JSON = "application/json"
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    # With no-referrer a browser would not say of a form where it comes from.
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
#: What storage holds is shown, never run.
_PREVIEW_POLICY = "default-src 'none'; sandbox"


def _pages() -> Mapping[str, bytes]:
    static = files("ourvidz_core.dashboard") / "static"
    names = ["index.html", "login.html", *(name for name, _ in _STATIC.values())]
    return {name: (static / name).read_bytes() for name in names}


@frozen(kw_only=True)
class Dashboard:
    """What the server works with."""

    feed: Feed
    access: Access
    previews: Previews
    requeue: Callable[[str, str], RequeueAnswer]
    #: Origins beside our own that previews may come from.
    media_origins: tuple[str, ...] = ()
    #: The files of the page, by name.
    pages: Mapping[str, bytes] = field(factory=_pages)

    @property
    def policy(self) -> str:
        """The page's Content-Security-Policy."""
        media = " ".join(("'self'", *self.media_origins))
        return (
            f"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src {media};"
            f" media-src {media}; form-action 'self'; base-uri 'none'; frame-ancestors 'none';"
            " require-trusted-types-for 'script'; trusted-types 'none'"
        )


class DashboardServer(Serving):
    """Serves a dashboard from threads of its own until it is closed.

    :raises OSError: the address cannot be had.
    """

    def __init__(
        self, address: tuple[str, int], dashboard: Dashboard, *, request_seconds: float = _REQUEST_SECONDS
    ) -> None:
        parts = {"dashboard": dashboard, "streams": threading.Semaphore(_STREAMS), "timeout": request_seconds}
        super().__init__(_Server(address, type("Handler", (_Handler,), parts), request_seconds), name="dashboard")

    @property
    def url(self) -> str:
        """Where it is."""
        return f"http://{self.address}"


class _Server(ThreadedServer):
    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler], request_seconds: float) -> None:
        self._request_seconds = request_seconds
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._unheard: dict[socket.socket, float] = {}
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            is_full = len(self._open) >= _CONNECTIONS
            if not is_full:
                self._open.add(request)
                self._unheard[request] = time.monotonic() + self._request_seconds
        if is_full:
            self.shutdown_request(request)
        else:
            super().process_request(request, client_address)

    def heard(self, request: socket.socket) -> None:
        """The whole request is there."""
        with self._lock:
            self._unheard.pop(request, None)

    def service_actions(self) -> None:
        now = time.monotonic()
        with self._lock:
            late = [request for request, until in self._unheard.items() if until < now]
        for request in late:  # one that drips its request, byte by byte, ends like one that is silent
            with contextlib.suppress(OSError):
                request.shutdown(socket.SHUT_RDWR)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._open.discard(request)
            self._unheard.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002 - the base class names them
        logger.debug("a request to the dashboard failed", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    dashboard: Dashboard
    streams: threading.Semaphore
    protocol_version = "HTTP/1.1"
    server_version = "ourvidz"
    sys_version = ""

    def do_GET(self) -> None:
        self._answer(self._get)

    do_HEAD = do_GET  # noqa: N815 - the base class looks for this name

    def do_POST(self) -> None:
        self._answer(self._post)

    def _answer(self, answer: Callable[[str, Mapping[str, str]], None]) -> None:
        said = {name.lower(): value for name, value in self.headers.items()}
        try:
            self.dashboard.access.check_host(said)
            body = self._body(said) if self.command == "POST" else b""
            self.server.heard(self.request)  # type: ignore[attr-defined] # our own server
            self._said_body = body
            answer(self.path.partition("?")[0], said)
        except Refused as refused:
            self._send_json({"error": refused.reason}, refused.status)
        except QueueError:
            self._send_json({"error": "Redis does not answer"}, HTTPStatus.SERVICE_UNAVAILABLE)

    def _body(self, said: Mapping[str, str]) -> bytes:
        length = said.get("content-length", "")
        if "transfer-encoding" in said or not length.isdecimal():
            raise Refused(HTTPStatus.LENGTH_REQUIRED, "a Content-Length is needed")
        if int(length) > _BODY_BYTES:
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"more than {_BODY_BYTES} bytes are not taken")
        return self.rfile.read(int(length))

    # -- what can be read

    def _get(self, path: str, said: Mapping[str, str]) -> None:
        access = self.dashboard.access
        if path in _STATIC:
            name, media_type = _STATIC[path]
            self._send(self.dashboard.pages[name], media_type)
        elif path == "/login":
            self._send(self.dashboard.pages["login.html"], _HTML)
        elif path == "/":
            try:
                access.caller(said)
            except Refused:
                self._redirect("/login")
            else:
                self._send(self.dashboard.pages["index.html"], _HTML)
        elif path == "/api/overview":
            caller = self._reader(said)
            sections = {name: json.loads(body) for name, body in self.dashboard.feed.sections().items()}
            self._send_json({**self._hello(caller), **sections})
        elif path == "/api/events":
            self._stream(self._reader(said))
        elif path.startswith("/assets/"):
            self._reader(said)
            self._show(path.removeprefix("/assets/"), said)
        elif path.startswith("/previews/"):
            self._reader(said)
            self._show_running(unquote(path.removeprefix("/previews/")))
        else:
            raise Refused(HTTPStatus.NOT_FOUND, "there is no such page")

    def _reader(self, said: Mapping[str, str]) -> Caller:
        self.dashboard.access.check_reader(said)
        return self.dashboard.access.caller(said)

    def _hello(self, caller: Caller) -> dict[str, Any]:
        access = self.dashboard.access
        return {"now": time.time(), "csrf": access.csrf(caller), "can_log_out": bool(caller.session)}

    def _stream(self, caller: Caller) -> None:
        if not self.streams.acquire(blocking=False):
            raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, f"{_STREAMS} pages are open, and no more are served")
        try:
            self._head(HTTPStatus.OK, {"Content-Type": "text/event-stream"})
            if self.command == "HEAD":
                return
            with self.dashboard.feed.watched():
                self._event("hello", json.dumps(self._hello(caller)).encode())
                seen: dict[str, int] = {}
                while (changes := self.dashboard.feed.changes(seen, _BEAT_SECONDS)) is not None:
                    if not changes:
                        self._write(b":\n\n")
                    for name, (version, body) in changes.items():
                        self._event(name, body)
                        seen[name] = version
        except OSError:
            logger.debug("a page was closed")
        finally:
            self.streams.release()

    def _event(self, name: str, body: bytes) -> None:
        # JSON without indentation has no line breaks, so one line holds it.
        self._write(b"event: " + name.encode() + b"\ndata: " + body + b"\n\n")

    def _show(self, place: str, said: Mapping[str, str]) -> None:
        bucket, _, path = unquote(place).partition("/")
        preview = self.dashboard.previews.find(bucket, path)
        if preview is None:
            raise Refused(HTTPStatus.NOT_FOUND, "there is no such asset of a recent job")
        if isinstance(preview.source, str):
            self._redirect(preview.source, HTTPStatus.FOUND)
            return
        try:
            self._send_file(preview, said)
        except OSError:
            raise Refused(HTTPStatus.NOT_FOUND, "the asset is not there any more") from None

    def _show_running(self, job_id: str) -> None:
        content = self.dashboard.previews.of_running(job_id)
        if content is None:
            raise Refused(HTTPStatus.NOT_FOUND, "no running job has a preview there")
        headers = {"Content-Type": "image/jpeg", "Content-Security-Policy": _PREVIEW_POLICY}
        self._head(HTTPStatus.OK, {**headers, "Content-Length": str(len(content))})
        if self.command != "HEAD":
            self._write(content)

    def _send_file(self, preview: Preview, said: Mapping[str, str]) -> None:
        assert not isinstance(preview.source, str)
        with opened(preview.source) as (file, size):
            headers = {
                "Content-Type": preview.media_type,
                "Content-Security-Policy": _PREVIEW_POLICY,
                "Accept-Ranges": "bytes",
                "Cache-Control": "private, max-age=3600",  # an asset does not change once its job is over
            }
            try:
                part = wanted_range(said.get("range", ""), size)
            except ValueError:
                self._head(
                    HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE,
                    {"Content-Range": f"bytes */{size}", "Content-Length": "0"},
                )
                return
            first, end = part or (0, size)
            if part is not None:
                headers["Content-Range"] = f"bytes {first}-{end - 1}/{size}"
            self._head(
                HTTPStatus.OK if part is None else HTTPStatus.PARTIAL_CONTENT,
                {**headers, "Content-Length": str(end - first)},
            )
            file.seek(first)
            if self.command == "HEAD":
                return
            with contextlib.suppress(OSError):  # a player that has seen enough hangs up
                for piece in _pieces(file, end - first):
                    self._write(piece)

    # -- what can be changed

    def _post(self, path: str, said: Mapping[str, str]) -> None:
        access = self.dashboard.access
        if path == "/login":
            access.check_origin(said)
            self._log_in(said)
        elif path == "/logout":
            access.check_origin(said)
            access.log_out(access.caller(said).session)
            self._redirect("/login", cookie=f"{COOKIE}=; Path=/; HttpOnly; SameSite=Strict; Max-Age=0")
        elif path == "/api/requeue":
            access.check_change(access.caller(said), said)
            self._requeue()
        else:
            raise Refused(HTTPStatus.NOT_FOUND, "there is no such page")

    def _log_in(self, said: Mapping[str, str]) -> None:
        given = parse_qs(self._said_body.decode("utf-8", "replace"), max_num_fields=4).get("token", [""])[0]
        session = self.dashboard.access.log_in(given)
        if session is None:
            time.sleep(_WRONG_TOKEN_SECONDS)
            self._redirect("/login#wrong")
            return
        secure = "; Secure" if said.get("origin", "").startswith("https:") else ""
        self._redirect(
            "/",
            cookie=f"{COOKIE}={session}; Path=/; HttpOnly; SameSite=Strict; Max-Age={SESSION_SECONDS:.0f}{secure}",
        )

    def _requeue(self) -> None:
        try:
            asked = json.loads(self._said_body)
            queue, letter = asked["queue"], asked["letter"]
        except (ValueError, LookupError, TypeError, RecursionError):
            raise Refused(HTTPStatus.BAD_REQUEST, 'the body must be {"queue": ..., "letter": ...}') from None
        if not isinstance(queue, str) or not isinstance(letter, str) or queue not in self.dashboard.feed.queues():
            raise Refused(HTTPStatus.NOT_FOUND, "there is no such queue")
        answer = self.dashboard.requeue(queue, letter)
        logger.info("somebody asked at the dashboard for dead letter %s of %s to run again: %s", letter, queue, answer)
        self.dashboard.feed.look_again()
        self._send_json(
            {"answer": answer.value}, HTTPStatus.OK if answer is RequeueAnswer.DONE else HTTPStatus.CONFLICT
        )

    # -- how it is said

    def _head(self, status: HTTPStatus, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        # One request a connection: what was not read of a refused one is nobody's next request.
        policy = {"Content-Security-Policy": self.dashboard.policy}
        for name, value in {**_HEADERS, **policy, **headers, "Connection": "close"}.items():
            self.send_header(name, value)
        self.end_headers()

    def _send(self, body: bytes, media_type: str, status: HTTPStatus = HTTPStatus.OK) -> None:
        self._head(status, {"Content-Type": media_type, "Content-Length": str(len(body))})
        if self.command != "HEAD":
            self._write(body)

    def _send_json(self, value: Mapping[str, Any], status: HTTPStatus = HTTPStatus.OK) -> None:
        self._send(json.dumps(value).encode() + b"\n", _JSON, status)

    def _redirect(self, address: str, status: HTTPStatus = HTTPStatus.SEE_OTHER, *, cookie: str = "") -> None:
        self._head(status, {"Location": address, "Content-Length": "0", **({"Set-Cookie": cookie} if cookie else {})})

    def _write(self, body: bytes) -> None:
        self.wfile.write(body)
        self.wfile.flush()

    def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002 - the base class names it
        logger.debug(format, *arguments)


def _pieces(file: Any, length: int) -> Iterator[bytes]:
    while length > 0 and (piece := file.read(min(_PIECE_BYTES, length))):
        length -= len(piece)
        yield piece
