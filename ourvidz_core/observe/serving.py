"""An HTTP server in threads of its own, that ends at once when it is closed."""

from __future__ import annotations

import contextlib
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

_CLOSE_SECONDS = 2.0


class ThreadedServer(ThreadingHTTPServer):
    """Answers each request in a thread that holds nobody up; its address may be one of IPv6."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        super().__init__(address, handler)


class Serving:
    """A server that answers until it is closed."""

    def __init__(self, server: ThreadedServer, *, name: str, poll_interval: float = 0.5) -> None:
        """``poll_interval`` is how often, in seconds, the server does what it does between requests."""
        self._server = server
        self._thread = threading.Thread(
            target=server.serve_forever, kwargs={"poll_interval": poll_interval}, name=name, daemon=True
        )
        self._thread.start()

    @property
    def address(self) -> str:
        """``host:port``, with the port that was found where 0 was asked for."""
        host, port = self._server.server_address[:2]
        return f"[{host!s}]:{port}" if ":" in str(host) else f"{host!s}:{port}"

    def close(self) -> None:
        """Answer no more."""
        # The loop looks whether it shall end when somebody connects, so that it need not wake to look.
        ending = threading.Thread(target=self._server.shutdown, daemon=True)
        ending.start()
        with contextlib.suppress(OSError):
            host, port = self._server.server_address[:2]
            socket.create_connection((str(host), port), timeout=1.0).close()
        ending.join(timeout=_CLOSE_SECONDS)
        self._server.server_close()
        self._thread.join(timeout=_CLOSE_SECONDS)
