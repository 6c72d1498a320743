"""Fetch reference images: from a URL of unknown intent to a clean local PNG.

The rules of fetching hold for every job type, so they are here and not in a plugin: who
may be connected to, how much is read, for how long, and what counts as an image. Nothing
is tried again here; the worker retries the job where the error is transient.
"""

from __future__ import annotations

import errno
import http.cookiejar
import json
import os
import queue
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urljoin

import attrs
import requests
from attrs import frozen
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import HTTPError, LocationParseError
from urllib3.util import Url, parse_url

from ourvidz_core import __version__
from ourvidz_core.delivery import decode_image
from ourvidz_core.delivery.addresses import AddressPolicy, Resolver, resolve
from ourvidz_core.delivery.deadlines import Deadline
from ourvidz_core.errors import (
    DiskFull,
    InternalError,
    JobError,
    ReferenceInvalid,
    ReferenceRefused,
    ReferenceServerFailed,
    ReferenceUnavailable,
)
from ourvidz_core.wire.jobs import Reference

MAX_REDIRECTS = 5
MAX_URL_CHARACTERS = 8192
_PIECE_BYTES = 64 * 1024
_SHOWN_CHARACTERS = 120
_LENGTH_DIGITS = 18
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
#: Other 4xx answers mean that the image is not to be had; these ask to come back.
_BUSY = frozenset({408, 421, 425, 429})
_NO_SUCH_HOST = frozenset({socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)})
_HEADERS = {
    "Accept": "image/png, image/jpeg, image/webp",
    "Accept-Encoding": "identity",
    "User-Agent": f"ourvidz/{__version__}",
}
#: All of the environment that the decoder gets.
_DECODER_VARIABLES = ("PATH", "HOME", "TMPDIR", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONHOME")
#: Beginnings of files that people send for images, and what to call them.
_LOOKALIKES = (
    (b"GIF8", "a GIF"),
    (b"%PDF", "a PDF"),
    (b"BM", "a BMP image"),
    (b"II*\0", "a TIFF image"),
    (b"MM\0*", "a TIFF image"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"PK\x03\x04", "a zip archive"),
)

Connect = Callable[[str, int], socket.socket]


class ReferenceSource(Protocol):
    """Where the worker gets reference images from."""

    def fetch(self, reference: Reference, directory: Path, name: str) -> Reference:
        """Bring one reference to ``directory/{name}.png``.

        The file is an RGB PNG written by us: upright, in sRGB, without transparency or
        metadata. The answer is ``reference`` with ``path``, ``width`` and ``height``.

        :raises ReferenceImageError: it cannot be used; the message is fit for the job's user.
        """
        ...


@frozen(kw_only=True)
class HttpReferences:
    """References over http and https, from public addresses and ``allowed_hosts``."""

    max_bytes: int
    max_pixels: int
    timeout_seconds: float
    #: Hosts, or ``host:port``, that may have any address.
    allowed_hosts: Sequence[str] = ()
    #: Certificates to trust in place of the usual authorities, for storage with its own.
    ca_bundle: Path | None = None
    resolver: Resolver = resolve

    def fetch(self, reference: Reference, directory: Path, name: str) -> Reference:
        """See :meth:`ReferenceSource.fetch`."""
        fetched = directory / f".{name}.fetched"
        try:
            self._download(reference.url, fetched)
            return _decoded(reference, fetched, directory / f"{name}.png", self.max_pixels)
        finally:
            fetched.unlink(missing_ok=True)

    def _download(self, url: str, destination: Path) -> None:
        policy = AddressPolicy.allowing(self.allowed_hosts)
        check_url(url)
        with ExitStack() as stack:
            deadline = stack.enter_context(Deadline(self.timeout_seconds))
            session = stack.enter_context(_session(_connector(policy, self.resolver, deadline)))
            session.verify = str(self.ca_bundle) if self.ca_bundle else True
            response = stack.enter_context(_follow(session, url, deadline))
            _save(response, destination, max_bytes=self.max_bytes, deadline=deadline)


@frozen
class StubReferences:
    """References from memory, for tests: what each URL stands for, decoded as a real one is.

    >>> StubReferences({"https://a.example/x.png": ReferenceUnavailable("gone")}).max_pixels
    50000000
    """

    answers: Mapping[str, Path | bytes | JobError]
    max_pixels: int = 50_000_000

    def fetch(self, reference: Reference, directory: Path, name: str) -> Reference:
        """See :meth:`ReferenceSource.fetch`. A URL that is not among the answers is unavailable."""
        answer = self.answers.get(reference.url)
        if answer is None:
            raise ReferenceUnavailable(f"the stub has no reference {shown_url(reference.url)}; give it an answer")
        if isinstance(answer, JobError):
            raise answer
        source = directory / f".{name}.fetched"
        try:
            source.write_bytes(answer if isinstance(answer, bytes) else answer.read_bytes())
            return _decoded(reference, source, directory / f"{name}.png", self.max_pixels)
        finally:
            source.unlink(missing_ok=True)


def check_url(url: str) -> Url:
    """Split the URL of a reference, if it is one that may be fetched at all.

    :raises ReferenceRefused: another scheme, credentials in it, or no URL.
    """
    if len(url) > MAX_URL_CHARACTERS:
        raise ReferenceRefused(f"the reference's URL has {len(url)} characters; at most {MAX_URL_CHARACTERS} are taken")
    scheme = url.partition(":")[0].strip().lower()
    if scheme == "blob":
        raise ReferenceRefused(
            "the reference is a blob: URL, which exists only inside the browser that made it; "
            "upload the image first and send the URL it gets"
        )
    if scheme == "data":
        raise ReferenceRefused("the reference is a data: URL; upload the image first and send the URL it gets")
    if scheme not in ("http", "https"):
        raise ReferenceRefused("the reference's URL does not begin with http:// or https://; send one that does")
    # Parsers disagree about these, and a disagreement is a way past a check.
    if "\\" in url or any(character <= " " or character == "\x7f" for character in url):
        raise ReferenceRefused("the reference's URL has spaces, backslashes or control characters; percent-encode them")
    try:
        parts = parse_url(url)
    except LocationParseError:
        parts = Url()
    if not parts.host:
        raise ReferenceRefused("the reference's URL names no host that could be asked; check its spelling")
    if parts.auth is not None:
        raise ReferenceRefused("the reference's URL has a user name or password in it; send one without")
    if "%" in unquote(parts.host) or "%" in parts.host:
        raise ReferenceRefused("the reference's host has a zone or escapes in it; send a plain host name")
    return parts


def shown_url(url: str) -> str:
    """``url`` as a message may show it: scheme, host and path, without the tokens of its query."""
    try:
        parts = parse_url(url)
    except LocationParseError:
        parts = Url()
    if parts.scheme not in ("http", "https") or not parts.host:
        return f"{url.partition(':')[0][:20]}: URL" if ":" in url else "that is no URL"
    text = Url(scheme=parts.scheme, host=parts.host, port=parts.port, path=parts.path).url
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."


def _follow(session: requests.Session, url: str, deadline: Deadline) -> requests.Response:
    """The answer at the end of the redirects, each hop under the same rules as the first."""
    for _ in range(MAX_REDIRECTS + 1):
        check_url(url)
        response = _get(session, url, deadline)
        if response.status_code not in _REDIRECTS or "location" not in response.headers:
            _check_status(response, url)
            return response
        response.close()
        url = _redirected(url, session.get_redirect_target(response) or "")
    raise ReferenceUnavailable(
        f"the reference is redirected more than {MAX_REDIRECTS} times, the last time to {shown_url(url)}; "
        "send the URL where it really is"
    )


def _redirected(url: str, target: str) -> str:
    try:
        return urljoin(url, target)
    except ValueError:
        raise ReferenceRefused(f"the reference {shown_url(url)} is redirected to what is no URL") from None


def _get(session: requests.Session, url: str, deadline: Deadline) -> requests.Response:
    try:
        prepared = session.prepare_request(requests.Request("GET", url, headers=_HEADERS))
        return session.send(prepared, allow_redirects=False, stream=True, timeout=deadline.socket_timeout)
    except ValueError:  # whoever parses it: requests, urllib3, the IDNA codec, or the library for a redirect's target
        raise ReferenceRefused(
            f"the reference's URL {shown_url(url)}, or what it redirects to, is malformed; check its spelling"
        ) from None
    # The library's own messages hold the whole URL, so none of them is passed on.
    except (requests.RequestException, HTTPError, OSError) as error:
        raise _failure(error, url, deadline) from None


def _failure(error: Exception, url: str, deadline: Deadline) -> ReferenceUnavailable:
    shown = shown_url(url)
    chain = list(_causes(error))
    if any(isinstance(cause, socket.gaierror) and cause.errno in _NO_SUCH_HOST for cause in chain):
        return ReferenceUnavailable(f"the reference's host does not exist: {shown}; check its spelling")
    if any("CERTIFICATE_VERIFY_FAILED" in str(cause) for cause in chain):
        return ReferenceUnavailable(f"the server of the reference {shown} has no valid certificate for that name")
    if deadline.is_past or any(isinstance(cause, TimeoutError) for cause in chain):
        return ReferenceServerFailed(f"the reference {shown} did not arrive within {deadline.seconds:g} s")
    return ReferenceServerFailed(f"the connection to the server of the reference {shown} failed")


def _causes(error: BaseException) -> list[BaseException]:
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    return chain


def _check_status(response: requests.Response, url: str) -> None:
    status, shown = response.status_code, shown_url(url)
    if status == 200:
        return
    response.close()
    if status >= 500 or status in _BUSY:
        raise ReferenceServerFailed(f"the server of the reference {shown} answered {status}")
    # Storage answers 400 to a signed URL whose time is over.
    if status in (400, 401, 403, 404, 410):
        raise ReferenceUnavailable(
            f"the reference {shown} is gone, or its link has expired (the server answered {status}); upload it again "
            "or send a fresh link"
        )
    raise ReferenceUnavailable(f"the server of the reference {shown} answered {status} in place of an image")


def _save(response: requests.Response, destination: Path, *, max_bytes: int, deadline: Deadline) -> None:
    """Write the body to ``destination`` as it comes, and stop where it goes over a limit."""
    shown = shown_url(response.url)
    encoding = response.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise ReferenceInvalid(
            f"the reference {shown} comes compressed ({encoding[:20]}), unasked; serve the image as it is"
        )
    too_large = ReferenceInvalid(f"the reference {shown} is larger than {max_bytes / 1e6:g} MB; send a smaller file")
    declared = response.headers.get("content-length", "")
    # Python refuses to read a number of thousands of digits.
    if declared.isdecimal() and (len(declared) > _LENGTH_DIGITS or int(declared) > max_bytes):
        raise too_large
    received = 0
    with destination.open("wb") as file:
        try:
            for piece in response.raw.stream(_PIECE_BYTES, decode_content=False):
                received += len(piece)
                if received > max_bytes:
                    raise too_large
                deadline.check()
                file.write(piece)
            deadline.check()
            file.flush()
        # ValueError: chunks of a negative size.
        except (requests.RequestException, HTTPError, OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DiskFull("no room for a reference on this machine; free some disk space") from None
            raise _failure(error, response.url, deadline) from None


def _session(connect: Connect) -> requests.Session:
    """A session that knows no proxy, no stored password, no cookie, and connects by ``connect`` only."""
    session = requests.Session()
    session.trust_env = False
    session.headers.clear()
    session.cookies.set_policy(http.cookiejar.DefaultCookiePolicy(allowed_domains=[]))
    session.adapters.clear()
    for scheme in ("http://", "https://"):
        session.mount(scheme, _VettedAdapter(connect))
    return session


class _VettedAdapter(HTTPAdapter):
    """Opens every connection by ``connect``; TLS is checked against the host's name as ever."""

    def __init__(self, connect: Connect) -> None:
        self._connect = connect
        super().__init__(max_retries=0)

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        connect = self._connect

        class PlainConnection(HTTPConnection):
            def _new_conn(self) -> socket.socket:
                return connect(self._dns_host, self.port or 80)

        class TlsConnection(HTTPSConnection):
            def _new_conn(self) -> socket.socket:
                return connect(self._dns_host, self.port or 443)

        class PlainPool(HTTPConnectionPool):
            ConnectionCls = PlainConnection

        class TlsPool(HTTPSConnectionPool):
            ConnectionCls = TlsConnection

        self.poolmanager.pool_classes_by_scheme = {"http": PlainPool, "https": TlsPool}


def _connector(policy: AddressPolicy, resolver: Resolver, deadline: Deadline) -> Connect:
    """Resolve, vet and connect in one step.

    The connection goes to the very address that was vetted: between a check and a second
    look-up by someone else, a name server could answer differently.
    """

    def connect(host: str, port: int) -> socket.socket:
        addresses = policy.vetted(host, port, _resolved(resolver, host, port, deadline))
        failure: OSError = socket.gaierror(socket.EAI_NONAME, "no address")
        for address in addresses:
            deadline.check()
            try:
                connection = socket.create_connection((address, port), timeout=deadline.socket_timeout)
            except OSError as error:
                failure = error
                continue
            deadline.guard(connection)
            return connection
        raise failure

    return connect


def _resolved(resolver: Resolver, host: str, port: int, deadline: Deadline) -> Sequence[str]:
    """Ask ``resolver``, and no longer than there is time: the system's has no limit that we could set."""
    answers: queue.SimpleQueue[Sequence[str] | Exception] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put(resolver(host, port))
        except (OSError, ValueError) as error:  # UnicodeError, of a label too long, is a ValueError
            answers.put(error)

    threading.Thread(target=ask, name="resolve-reference", daemon=True).start()
    try:
        answer = answers.get(timeout=deadline.socket_timeout)
    except queue.Empty:
        raise TimeoutError("the name was not resolved in time") from None
    if isinstance(answer, OSError):
        raise answer
    if isinstance(answer, Exception):
        raise socket.gaierror(socket.EAI_NONAME, "not a name")
    return answer


def _decoded(reference: Reference, source: Path, destination: Path, max_pixels: int) -> Reference:
    """Decode ``source`` in a process of its own, which foreign bytes may crash or fill as they like."""
    shown = shown_url(reference.url)
    kind = _lookalike(source)
    if kind is not None:
        raise ReferenceInvalid(f"the reference {shown} is {kind}; send a PNG, JPEG or WebP image")
    seconds = 2 * decode_image.cpu_limit(max_pixels)
    environment = {name: os.environ[name] for name in _DECODER_VARIABLES if name in os.environ}
    try:
        finished = subprocess.run(
            # By its path: the module is complete in itself, however the package is installed.
            [sys.executable, "-P", decode_image.__file__, str(source), str(destination), str(max_pixels)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env=environment,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        destination.unlink(missing_ok=True)
        raise ReferenceInvalid(f"the reference {shown} takes more than {seconds} s to decode; save it again") from None
    outcome = _outcome(finished.stdout)
    if finished.returncode == 0 and "width" in outcome:
        return attrs.evolve(reference, path=destination, width=outcome["width"], height=outcome["height"])
    destination.unlink(missing_ok=True)
    if finished.returncode == decode_image.EXIT_NO_ROOM:
        raise DiskFull("no room for a decoded reference on this machine; free some disk space")
    if finished.returncode == decode_image.EXIT_BROKEN:
        raise InternalError(f"the image decoder does not start ({outcome.get('error')}); reinstall Pillow")
    reason = outcome.get("error", f"decoding it took more than it may, or broke the decoder ({finished.returncode})")
    raise ReferenceInvalid(f"the reference {shown} is no usable image: {reason}; send a PNG, JPEG or WebP image")


def _outcome(stdout: bytes) -> dict[str, Any]:
    with suppress(ValueError):
        outcome = json.loads(stdout)
        if isinstance(outcome, dict):
            return outcome
    return {}


def _lookalike(source: Path) -> str | None:
    """What a file is that is no image we take, as far as its first bytes tell."""
    with source.open("rb") as file:
        start = file.read(1024)
    if not start:
        return "empty"
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith(b"<"):
        return "an SVG drawing" if b"<svg" in text else "an HTML or XML page, perhaps one that asks to log in"
    if text.startswith((b"{", b"[")):
        return "a JSON document, perhaps an error"
    if start[4:8] == b"ftyp":
        return "an AVIF or HEIC image, or a video"
    return next((kind for beginning, kind in _LOOKALIKES if start.startswith(beginning)), None)
