"""Real HTTP servers for tests, on 127.0.0.1 and a free port.

:class:`FileServer` serves reference images as well or as badly as a test needs.
:class:`SupabaseServer` is the part of Supabase that a worker talks to: storage with bucket
limits, and the callback endpoint. Both are context managers and both keep what they were
asked, so that a test can look at the bytes that really went over the wire::

    with SupabaseServer() as supabase, FileServer({"/dog.png": picture}) as files:
        storage = SupabaseStorage(supabase.url, supabase.key)
        references = HttpReferences(allowed_hosts=[files.host], ...)
"""

from __future__ import annotations

import hashlib
import http.client
import json
import socket
import ssl
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Literal, Self, cast
from urllib.parse import parse_qs, unquote, urlsplit

from attrs import field, frozen

#: The requests of a :class:`SupabaseServer` that can be told to go wrong: uploading an
#: object, looking it up or reading it, signing its URL, and taking a callback.
Operation = Literal["storage", "info", "sign", "callback"]

_PIECE_BYTES = 64 * 1024
#: How long a hanging answer waits for its client to leave, at most.
_HANG_SECONDS = 60.0


@frozen(kw_only=True)
class ReceivedRequest:
    """A request as it came in. Header names are in lower case."""

    method: str
    #: Path and query, as they were sent.
    target: str
    headers: Mapping[str, str]
    body: bytes = b""
    #: Seconds since the epoch.
    received_at: float = field(factory=time.time)

    @property
    def path(self) -> str:
        """The decoded path, without the query."""
        return unquote(urlsplit(self.target).path)

    def json(self) -> Any:
        """The body, as JSON."""
        return json.loads(self.body)


@frozen(kw_only=True)
class Answer:
    """What a server answers, and how well it behaves while it does.

    By default the whole body goes out at once with a true ``Content-Length``.
    """

    body: bytes = b""
    status: int = 200
    headers: Mapping[str, str] = field(factory=dict)
    #: Wait before the status line.
    delay_seconds: float = 0.0
    #: Declare this length, whatever the body has.
    content_length: int | None = None
    #: Declare no length; the end of the connection ends the body.
    is_length_absent: bool = False
    #: Drip: this many bytes at a time ...
    piece_bytes: int | None = None
    #: ... with this wait between them. Applies to the head too if ``is_head_slow``.
    piece_delay_seconds: float = 0.0
    is_head_slow: bool = False
    #: Hang up in place of answering.
    is_lost: bool = False
    #: Hang up after this many bytes of the body.
    cut_after_bytes: int | None = None

    @classmethod
    def redirect(cls, location: str, status: int = 302) -> Answer:
        """Send the client elsewhere."""
        return cls(status=status, headers={"Location": location})

    @classmethod
    def of_json(cls, value: Any, status: int = 200) -> Answer:
        """A JSON body."""
        return cls(body=json.dumps(value).encode(), status=status, headers={"Content-Type": "application/json"})


class LocalServer:
    """A threaded HTTP server that runs from ``__enter__`` to ``__exit__``; subclasses answer."""

    def __init__(self, *, tls: ssl.SSLContext | None = None) -> None:
        self._tls = tls
        self._server: _Server | None = None
        self._lock = threading.RLock()
        #: Set at the end, so that answers which wait do not outlive the test.
        self._stopped = threading.Event()
        self.requests: list[ReceivedRequest] = []

    @property
    def port(self) -> int:
        """The port, once the server runs."""
        if self._server is None:
            raise RuntimeError("the server does not run; use it in a with statement")
        return int(self._server.server_address[1])

    @property
    def host(self) -> str:
        """``127.0.0.1:port``, as ``reference_allowed_hosts`` takes it."""
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        """The address of the server, without a slash at its end."""
        return f"{'https' if self._tls else 'http'}://{self.host}"

    def answer(self, request: ReceivedRequest) -> Answer:
        """What to answer. Called with the server's lock held."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        self._server = _Server(self, self._tls)
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()

    def respond(self, request: ReceivedRequest) -> Answer:
        """Note the request, and find its answer."""
        with self._lock:
            self.requests.append(request)
            return self.answer(request)

    def wait(self, seconds: float) -> None:
        """Sleep, but not beyond the end of the server."""
        self._stopped.wait(seconds)


class FileServer(LocalServer):
    """Serves what it is given: bytes, or an :class:`Answer` that misbehaves.

    Keys are paths with their slash; a query is ignored. What is not there is answered 404.

    >>> with FileServer({"/dog.png": b"..."}) as files:
    ...     files.url.startswith("http://127.0.0.1:")
    True
    """

    def __init__(self, files: Mapping[str, bytes | Answer], *, tls: ssl.SSLContext | None = None) -> None:
        super().__init__(tls=tls)
        #: May be changed while the server runs.
        self.files: dict[str, bytes | Answer] = dict(files)

    def answer(self, request: ReceivedRequest) -> Answer:
        """The file of that path."""
        found = self.files.get(request.path)
        if found is None:
            return Answer(body=b"not found", status=404, headers={"Content-Type": "text/plain"})
        return Answer(body=found) if isinstance(found, bytes) else found


@frozen(kw_only=True)
class Bucket:
    """A storage bucket and its limits; None is no limit."""

    size_limit_bytes: int | None = None
    media_types: tuple[str, ...] | None = None
    is_public: bool = False


def _image_bucket(megabytes: int) -> Bucket:
    return Bucket(size_limit_bytes=megabytes * 1024 * 1024, media_types=("image/png", "image/jpeg", "image/webp"))


def _video_bucket(megabytes: int) -> Bucket:
    return Bucket(size_limit_bytes=megabytes * 1024 * 1024, media_types=("video/mp4", "image/png"))


#: The buckets of the deployed system.
DEPLOYED_BUCKETS: Mapping[str, Bucket] = {
    "sdxl_image_fast": _image_bucket(5),
    "sdxl_image_high": _image_bucket(10),
    "image_fast": _image_bucket(5),
    "image_high": _image_bucket(10),
    "video_fast": _video_bucket(50),
    "video_high": _video_bucket(200),
    "image7b_fast_enhanced": _image_bucket(20),
    "image7b_high_enhanced": _image_bucket(20),
    "video7b_fast_enhanced": _video_bucket(100),
    "video7b_high_enhanced": _video_bucket(100),
    "reference_images": _image_bucket(10),
}


@frozen(kw_only=True)
class StoredObject:
    """An object in a bucket of a :class:`SupabaseServer`."""

    body: bytes
    media_type: str


@frozen(kw_only=True)
class _Script:
    """What the next request of one kind meets."""

    kind: Literal["fail", "hang", "drop", "truncate"]
    answer: Answer = field(factory=Answer)
    after_commit: bool = False


class SupabaseServer(LocalServer):
    """Supabase as a worker knows it: object storage and the ``job-callback`` function.

    Checks the bearer key, bucket names, size limits and MIME types, and refuses in
    Supabase's own words: HTTP 400 with the real status inside the body. Uploads replace an
    object only with ``x-upsert: true``.

    What was stored is in ``objects``, by ``(bucket, path)``; callbacks are in ``callbacks``.
    A test scripts trouble with the ``*_next`` methods, each for the next ``times`` requests
    of one kind, first come, first served::

        supabase.fail_next("storage", status=500, times=2)
        supabase.drop_next("storage", after_commit=True)   # stored, but the answer is lost
        supabase.truncate_next()                           # answers 200 and keeps half the file
        supabase.hang_next("callback")
    """

    def __init__(
        self,
        *,
        key: str = "test-service-key",
        buckets: Mapping[str, Bucket] = DEPLOYED_BUCKETS,
        is_info_supported: bool = True,
    ) -> None:
        super().__init__()
        self.key = key
        self.buckets = dict(buckets)
        #: Whether the info route has a body, as it has since 2024.
        self.is_info_supported = is_info_supported
        self.objects: dict[tuple[str, str], StoredObject] = {}
        #: Callbacks that were answered 200, refused ones left out.
        self.callbacks: list[ReceivedRequest] = []
        self._scripts: dict[str, list[_Script]] = {}

    @property
    def callback_url(self) -> str:
        """Where callbacks go."""
        return f"{self.url}/functions/v1/job-callback"

    def fail_next(
        self,
        operation: Operation,
        *,
        status: int,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
        times: int = 1,
    ) -> None:
        """Answer ``status`` and do nothing."""
        answer = Answer(body=body, status=status, headers=headers or {})
        self._plan(operation, _Script(kind="fail", answer=answer), times)

    def hang_next(self, operation: Operation, *, seconds: float = _HANG_SECONDS, times: int = 1) -> None:
        """Take the request and say nothing for ``seconds``."""
        self._plan(operation, _Script(kind="hang", answer=Answer(status=504, delay_seconds=seconds)), times)

    def drop_next(self, operation: Operation, *, after_commit: bool = False, times: int = 1) -> None:
        """Hang up without an answer, before or after doing what was asked."""
        self._plan(operation, _Script(kind="drop", after_commit=after_commit), times)

    def truncate_next(self, *, times: int = 1) -> None:
        """Answer the upload with success, and keep only the first half of it."""
        self._plan("storage", _Script(kind="truncate"), times)

    def answer(self, request: ReceivedRequest) -> Answer:
        """Route the request, past what was scripted for it."""
        operation = self._operation(request)
        if operation is None:
            if (managed := self._manage(request)) is not None:
                return managed
            return _refusal("404", "Not Found", f"Route {request.method}:{request.path} not found", http_status=404)
        waiting = self._scripts.get(operation, [])
        script = waiting.pop(0) if waiting else None
        if script is None:
            return self._perform(operation, request)
        if script.kind in ("fail", "hang"):
            return script.answer
        if script.kind == "truncate":
            body = request.body[: len(request.body) // 2]
            return self._perform(
                operation,
                ReceivedRequest(method=request.method, target=request.target, headers=request.headers, body=body),
            )
        if script.after_commit:
            self._perform(operation, request)
        return Answer(is_lost=True)

    def _plan(self, operation: Operation, script: _Script, times: int) -> None:
        with self._lock:
            self._scripts.setdefault(operation, []).extend([script] * times)

    def _manage(self, request: ReceivedRequest) -> Answer | None:
        """What no job depends on, and is never scripted: a look at a bucket or at the endpoint, and a removal."""
        if (request.method, request.path) == ("OPTIONS", "/functions/v1/job-callback"):
            return Answer(body=b"ok", headers={"Access-Control-Allow-Origin": "*"})
        route = request.path.removeprefix("/storage/v1/")
        kind, _, rest = route.partition("/")
        if (request.method, kind) not in (("GET", "bucket"), ("DELETE", "object")) or route == request.path:
            return None
        if request.headers.get("authorization") != f"Bearer {self.key}":
            return _refusal("403", "Unauthorized", "Invalid Compact JWS")
        if kind == "object":
            name, _, path = rest.partition("/")
            if self.objects.pop((name, path), None) is None:
                return _refusal("404", "not_found", "Object not found")
            return Answer.of_json({"message": "Successfully deleted"})
        bucket = self.buckets.get(rest)
        if bucket is None:
            return _refusal("404", "Bucket not found", "Bucket not found")
        described = {
            "id": rest,
            "name": rest,
            "public": bucket.is_public,
            "file_size_limit": bucket.size_limit_bytes,
            "allowed_mime_types": bucket.media_types,
        }
        return Answer.of_json(described)

    def _operation(self, request: ReceivedRequest) -> Operation | None:
        path = request.path
        if path == "/functions/v1/job-callback":
            return "callback" if request.method == "POST" else None
        if not path.startswith("/storage/v1/object/"):
            return None
        if request.method == "POST":
            return "sign" if path.startswith("/storage/v1/object/sign/") else "storage"
        return "info" if request.method in ("GET", "HEAD") else None

    def _perform(self, operation: Operation, request: ReceivedRequest) -> Answer:
        is_open = operation == "info" and request.path.startswith(
            ("/storage/v1/object/public/", "/storage/v1/object/sign/")
        )
        if not is_open and request.headers.get("authorization") != f"Bearer {self.key}":
            if operation == "callback":
                return Answer.of_json({"code": 401, "message": "Invalid JWT"}, status=401)
            return _refusal("403", "Unauthorized", "Invalid Compact JWS")
        if operation == "callback":
            return self._take_callback(request)
        route = request.path.removeprefix("/storage/v1/object/")
        if operation == "storage":
            return self._upload(route, request)
        if operation == "sign":
            return self._sign(route.removeprefix("sign/"), request)
        return self._read(route, request)

    def _take_callback(self, request: ReceivedRequest) -> Answer:
        try:
            body = request.json()
        except ValueError:
            return Answer.of_json({"error": "invalid JSON"}, status=400)
        if not isinstance(body, dict) or not body.get("job_id"):
            return Answer.of_json({"error": "job_id is required"}, status=400)
        self.callbacks.append(request)
        return Answer.of_json({"success": True})

    def _upload(self, route: str, request: ReceivedRequest) -> Answer:
        name, _, path = route.partition("/")
        bucket = self.buckets.get(name)
        if bucket is None:
            return _refusal("404", "Bucket not found", "Bucket not found")
        if not path or ".." in path.split("/"):
            return _refusal("400", "InvalidKey", f"Invalid key: {path}")
        media_type = request.headers.get("content-type", "")
        if bucket.media_types is not None and media_type not in bucket.media_types:
            return _refusal("415", "invalid_mime_type", f"mime type {media_type} is not supported")
        if bucket.size_limit_bytes is not None and len(request.body) > bucket.size_limit_bytes:
            return _refusal("413", "Payload too large", "The object exceeded the maximum allowed size")
        if (name, path) in self.objects and request.headers.get("x-upsert") != "true":
            return _refusal("409", "Duplicate", "The resource already exists")
        self.objects[name, path] = StoredObject(body=request.body, media_type=media_type)
        return Answer.of_json(
            {"Key": f"{name}/{path}", "Id": hashlib.md5(path.encode(), usedforsecurity=False).hexdigest()}
        )

    def _sign(self, route: str, request: ReceivedRequest) -> Answer:
        name, _, path = route.partition("/")
        if (name, path) not in self.objects:
            return _refusal("404", "not_found", "Object not found")
        expires = int(time.time()) + int(request.json()["expiresIn"])
        # Not a JWT as the real one is, but as opaque to a client.
        token = f"{expires}.{self._token(name, path, expires)}"
        return Answer.of_json({"signedURL": f"/object/sign/{name}/{path}?token={token}"})

    def _read(self, route: str, request: ReceivedRequest) -> Answer:
        is_info = route.startswith("info/")
        first, _, rest = route.removeprefix("info/").partition("/")
        place = rest if first in ("authenticated", "public", "sign") else route.removeprefix("info/")
        name, _, path = place.partition("/")
        stored = self.objects.get((name, path))
        if stored is None:
            return _refusal("404", "not_found", "Object not found")
        if first == "public" and not self.buckets[name].is_public:
            return _refusal("404", "Bucket not found", "Bucket not found")
        if first == "sign" and not self._is_signed(name, path, request):
            return _refusal("400", "InvalidJWT", '"exp" claim timestamp check failed')
        headers = {"ETag": f'"{hashlib.md5(stored.body, usedforsecurity=False).hexdigest()}"'}
        if not is_info:
            return Answer(body=stored.body, headers={**headers, "Content-Type": stored.media_type})
        if not self.is_info_supported:
            return Answer(headers=headers)
        described = {"name": path, "bucket_id": name, "size": len(stored.body), "content_type": stored.media_type}
        return Answer(
            body=json.dumps(described).encode(),
            headers={**headers, "Content-Type": "application/json", "Cache-Control": "no-cache"},
        )

    def _is_signed(self, name: str, path: str, request: ReceivedRequest) -> bool:
        token = parse_qs(urlsplit(request.target).query).get("token", [""])[0]
        expires, _, proof = token.partition(".")
        return expires.isdecimal() and int(expires) > time.time() and proof == self._token(name, path, int(expires))

    def _token(self, name: str, path: str, expires: int) -> str:
        return hashlib.sha256(f"{self.key}/{name}/{path}/{expires}".encode()).hexdigest()


def _refusal(status: str, error: str, message: str, *, http_status: int = 400) -> Answer:
    """An error as Supabase Storage words it: nearly always HTTP 400, the status in the body."""
    return Answer.of_json({"statusCode": status, "error": error, "message": message}, status=http_status)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    # Answers that hang must not hold up the end of a test.
    block_on_close = False
    request_queue_size = 64

    def __init__(self, owner: LocalServer, tls: ssl.SSLContext | None) -> None:
        self.owner = owner
        super().__init__(("127.0.0.1", 0), _Handler)
        if tls is not None:
            # The handshake belongs to the connection's own thread, at its first read.
            self.socket = tls.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are what these servers are for; say nothing."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def handle_any(self) -> None:
        owner = cast(_Server, self.server).owner
        request = ReceivedRequest(
            method=self.command,
            target=self.path,
            headers={name.lower(): value for name, value in self.headers.items()},
            body=self._read_body(),
        )
        self._send(owner.respond(request), owner)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_OPTIONS = handle_any  # noqa: N815

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        """Tests want a quiet terminal."""

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = bytearray()
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return bytes(body)

    def _send(self, answer: Answer, owner: LocalServer) -> None:
        if answer.delay_seconds:
            owner.wait(answer.delay_seconds)
        if answer.is_lost:
            self._hang_up()
            return
        head = [f"HTTP/1.1 {answer.status} {http.client.responses.get(answer.status, '')}"]
        head += [f"{name}: {value}" for name, value in answer.headers.items()]
        length = len(answer.body) if answer.content_length is None else answer.content_length
        if not answer.is_length_absent:
            head.append(f"Content-Length: {length}")
        if answer.is_length_absent or length != len(answer.body):
            head.append("Connection: close")
            self.close_connection = True
        body = b"" if self.command == "HEAD" else answer.body
        if answer.cut_after_bytes is not None:
            body = body[: answer.cut_after_bytes]
        with suppress(OSError):
            self._drip("\r\n".join([*head, "", ""]).encode("latin-1"), answer, owner, is_slow=answer.is_head_slow)
            self._drip(body, answer, owner, is_slow=True)
        if answer.cut_after_bytes is not None:
            self._hang_up()

    def _drip(self, content: bytes, answer: Answer, owner: LocalServer, *, is_slow: bool) -> None:
        step = answer.piece_bytes if is_slow and answer.piece_bytes else _PIECE_BYTES
        for start in range(0, len(content), step):
            if is_slow and start and answer.piece_delay_seconds:
                owner.wait(answer.piece_delay_seconds)
            self.wfile.write(content[start : start + step])

    def _hang_up(self) -> None:
        self.close_connection = True
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
