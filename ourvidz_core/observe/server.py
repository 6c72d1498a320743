"""Answers ``/healthz``, ``/readyz`` and ``/metrics`` over HTTP. There is nothing here that changes anything."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from typing import Any

from attrs import frozen

from ourvidz_core.observe.serving import Serving, ThreadedServer

logger = logging.getLogger(__name__)

#: Whoever connects and says nothing is hung up on.
_REQUEST_SECONDS = 10.0


@frozen(kw_only=True)
class Answer:
    """What one page says."""

    body: bytes
    media_type: str = "application/json"
    status: HTTPStatus = HTTPStatus.OK

    @classmethod
    def of(cls, is_good: bool, facts: Mapping[str, Any]) -> Answer:
        """``facts`` as JSON, with 200 where all is well, else 503."""
        body = json.dumps({"status": "ok" if is_good else "unavailable", **facts}).encode() + b"\n"
        return cls(body=body, status=HTTPStatus.OK if is_good else HTTPStatus.SERVICE_UNAVAILABLE)


Page = Callable[[Mapping[str, str]], Answer]


class HealthServer(Serving):
    """Serves pages from threads of its own until it is closed.

    :raises OSError: the address cannot be had.
    """

    def __init__(self, address: str, pages: Mapping[str, Page]) -> None:
        host, _, port = address.rpartition(":")
        handler = type("Handler", (_Handler,), {"pages": dict(pages)})
        super().__init__(_Server((host.strip("[]"), int(port)), handler), name="health", poll_interval=60.0)


class _Server(ThreadedServer):
    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002 - the base class names them
        logger.debug("a request to the health endpoint failed", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    pages: Mapping[str, Page]
    timeout = _REQUEST_SECONDS
    server_version = "ourvidz"
    sys_version = ""

    def do_GET(self) -> None:
        page = self.pages.get(self.path.partition("?")[0])
        if page is None:
            self._send(Answer.of(False, {"pages": sorted(self.pages)}), HTTPStatus.NOT_FOUND)
            return
        try:
            answer = page({name.lower(): value for name, value in self.headers.items()})
        except Exception:
            logger.exception("the page %s failed", self.path.partition("?")[0])
            answer = Answer.of(False, {"reason": "it failed; the log says why"})
        self._send(answer, answer.status)

    do_HEAD = do_GET  # noqa: N815 - the base class looks for this name

    def _send(self, answer: Answer, status: HTTPStatus) -> None:
        self.send_response(status)
        self.send_header("Content-Type", answer.media_type)
        self.send_header("Content-Length", str(len(answer.body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002 - the base class names it
        logger.debug(format, *arguments)
