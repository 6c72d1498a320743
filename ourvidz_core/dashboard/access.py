"""Who may see the page and change anything: hosts, tokens, sessions, and requests that another site wrote."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from http.cookies import CookieError, SimpleCookie
from urllib.parse import urlsplit

from attrs import frozen

from ourvidz_core.errors import SettingsError

SHORTEST_TOKEN = 16
SESSION_SECONDS = 12 * 3600.0
COOKIE = "ourvidz_dashboard"
CSRF_HEADER = "x-csrf-token"
#: Of more, the oldest are logged out.
_SESSIONS = 100
_HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+)(:\d{1,5})?")


class Refused(Exception):
    """A request that is not answered; says why, and nothing that was not in it."""

    def __init__(self, status: HTTPStatus, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


@frozen(kw_only=True)
class Caller:
    """Whoever asks, once he may."""

    #: Empty where no token is set, and for a script that sends the token itself.
    session: str = ""
    is_script: bool = False


class Access:
    """The rules for every request. Thread-safe."""

    def __init__(self, *, token: str = "", hosts: Sequence[str] = ()) -> None:
        self._token_digest = _digest(token) if token else b""
        self._hosts = frozenset({"localhost", *(host.lower() for host in hosts)})
        self._key = secrets.token_bytes(32)
        self._lock = threading.Lock()
        self._sessions: dict[bytes, float] = {}

    @property
    def needs_token(self) -> bool:
        """Whether one is set."""
        return bool(self._token_digest)

    def check_host(self, headers: Mapping[str, str]) -> None:
        """Refuse a name that is not ours: a page of another site whose name was led to this address.

        A literal address cannot be led anywhere.
        """
        name = _host_name(headers.get("host", ""))
        if name is None or not (name in self._hosts or _is_address(name)):
            raise Refused(
                HTTPStatus.MISDIRECTED_REQUEST,
                "the dashboard is not known under this name; ourvidz dashboard --host NAME allows one",
            )

    def caller(self, headers: Mapping[str, str]) -> Caller:
        """Who sent the request.

        :raises Refused: a token is set, and neither it nor a session came.
        """
        if not self._token_digest:
            return Caller()
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and self._is_token(given.strip()):
            return Caller(is_script=True)
        session = _cookie(headers.get("cookie", ""))
        if session and self._is_open(session):
            return Caller(session=session)
        raise Refused(HTTPStatus.UNAUTHORIZED, "the token is needed")

    def check_origin(self, headers: Mapping[str, str]) -> None:
        """Refuse what a page of another site sent.

        :raises Refused: the browser says so, or says nothing of where it comes from.
        """
        origin = headers.get("origin")
        is_ours = headers.get("sec-fetch-site") == "same-origin" if origin is None else self._is_ours(origin, headers)
        if not is_ours or headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
            raise Refused(HTTPStatus.FORBIDDEN, "the request comes from another site")

    @staticmethod
    def check_reader(headers: Mapping[str, str]) -> None:
        """Refuse to answer another site's page: it could not read the answer, but hold our connections."""
        if headers.get("sec-fetch-site") in ("cross-site", "same-site"):
            raise Refused(HTTPStatus.FORBIDDEN, "the request comes from another site")

    def check_change(self, caller: Caller, headers: Mapping[str, str]) -> None:
        """Refuse a change that our own page did not ask for. A script that sends the token is no browser."""
        if caller.is_script:
            return
        if headers.get("origin") is not None or headers.get("sec-fetch-site") is not None:
            self.check_origin(headers)
        if not hmac.compare_digest(headers.get(CSRF_HEADER, "").encode(), self.csrf(caller).encode()):
            raise Refused(HTTPStatus.FORBIDDEN, f"the header {CSRF_HEADER} is missing or of another session")

    def csrf(self, caller: Caller) -> str:
        """What a change must carry: a page of another site can neither read nor guess it."""
        return hmac.new(self._key, b"csrf:" + caller.session.encode(), hashlib.sha256).hexdigest()

    def log_in(self, token: str) -> str | None:
        """A new session, or None where the token is another."""
        if not self._token_digest or not self._is_token(token):
            return None
        session = secrets.token_urlsafe(32)
        now = time.monotonic()
        with self._lock:
            open_ones = [item for item in self._sessions.items() if item[1] > now]
            self._sessions = dict(open_ones[-(_SESSIONS - 1) :])
            self._sessions[_digest(session)] = now + SESSION_SECONDS
        return session

    def log_out(self, session: str) -> None:
        """End a session."""
        with self._lock:
            self._sessions.pop(_digest(session), None)

    def _is_token(self, given: str) -> bool:
        return hmac.compare_digest(_digest(given), self._token_digest)

    def _is_open(self, session: str) -> bool:
        # Looked up by digest, so that the time it takes tells nothing of a session that is open.
        with self._lock:
            return self._sessions.get(_digest(session), 0.0) > time.monotonic()

    def _is_ours(self, origin: str, headers: Mapping[str, str]) -> bool:
        try:
            parts = urlsplit(origin)
        except ValueError:
            return False
        host = headers.get("host", "").lower()
        # A proxy that ends TLS may ask us under another name than the browser asked it.
        return parts.scheme in ("http", "https") and (
            parts.netloc.lower() == host or parts.hostname in self._hosts - {"localhost"}
        )


def check_token(token: str, source: str) -> str:
    """``token`` without the line's end.

    :raises SettingsError: it is too short to keep anybody out.
    """
    stripped = token.strip()
    if len(stripped) < SHORTEST_TOKEN:
        raise SettingsError(
            f"the token in {source} has {len(stripped)} characters and needs {SHORTEST_TOKEN} or more; make one with"
            " python -c 'import secrets; print(secrets.token_urlsafe(32))'"
        )
    return stripped


def parse_address(address: str) -> tuple[str, int]:
    """Host and port of ``host:port``.

    :raises SettingsError: it is none.
    """
    host, _, port = address.rpartition(":")
    if not (host and port.isdecimal() and int(port) < 2**16):
        raise SettingsError(f"--listen must be host:port, such as 127.0.0.1:8765, not {address!r}")
    return host.strip("[]"), int(port)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches ``host``."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _host_name(host: str) -> str | None:
    found = _HOST.fullmatch(host)
    return found[1].strip("[]").lower() if found else None


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _cookie(header: str) -> str:
    try:
        morsel = SimpleCookie(header).get(COOKIE)
    except CookieError:
        return ""
    return morsel.value if morsel is not None else ""


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()
