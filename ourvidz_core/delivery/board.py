"""The board: what every worker is doing right now and what ended lately, for other processes to read.

Nothing depends on it: a job is claimed, done and reported the same while the board is
away. It holds no prompt, no message and no query string of a URL.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar, cast

import redis
from attrs import field, frozen
from cattrs.errors import BaseValidationError
from cattrs.preconf.json import make_converter
from redis.backoff import NoBackoff
from redis.retry import Retry

from ourvidz_core.delivery.redis_queue import translated
from ourvidz_core.errors import QueueError
from ourvidz_core.wire.callbacks import JobStatus
from ourvidz_core.wire.previews import PREVIEW_BYTES
from ourvidz_core.wire.states import EngineState, WorkerState

#: How often a worker says that it lives when nothing else has changed.
HEARTBEAT_SECONDS = 10.0
#: A worker that has said nothing for this long is off the board.
LIFETIME_SECONDS = 3 * HEARTBEAT_SECONDS
#: Ended jobs that the board remembers.
RECENT_JOBS = 500
#: A preview that is not put there again for this long is off the board.
PREVIEW_SECONDS = 30.0
#: The board is asked beside the work and by people who wait; it answers soon or not at all.
_TIMEOUT_SECONDS = 3.0

# A hash tag of its own keeps all of it on one node of a cluster.
_NAMES_KEY = "{ourvidz}:workers"
_WORKER_KEY = "{ourvidz}:worker:"
_RECENT_KEY = "{ourvidz}:recent"
_PREVIEW_KEY = "{ourvidz}:preview:"

_converter = make_converter()

Entry = TypeVar("Entry")


@frozen(kw_only=True)
class RunningJob:
    """A job that a worker has. Times are seconds since the epoch."""

    id: str
    type: str
    #: Counts from 1.
    attempt: int
    #: What is done now: ``references``, ``waiting`` for the engine, ``generate`` or, where the plugin says it, a
    #: stage of that such as ``denoise``, ``store``, ``report``.
    stage: str
    #: Steps of that stage; None where it counts none.
    step: int | None = None
    total: int | None = None
    claimed_at: float
    #: When the engine began with it; None before that.
    started_at: float | None = None
    #: When its newest preview was made; None where it has none.
    previewed_at: float | None = None


@frozen(kw_only=True)
class DeviceMemory:
    """Memory of the device that the engine uses, all processes on it counted. GiB."""

    used_gb: float
    total_gb: float


@frozen(kw_only=True)
class WorkerStatus:
    """One worker as it was a moment ago. Times are seconds since the epoch."""

    name: str
    host: str
    pid: int
    version: str
    queues: tuple[str, ...]
    state: WorkerState
    started_at: float
    published_at: float = field(factory=time.time)
    engine: EngineState = EngineState.STOPPED
    #: What the engine is about while it warms up, in words; None at other times.
    engine_doing: str | None = None
    jobs: tuple[RunningJob, ...] = ()
    #: None where there is no device, or nothing to ask it with.
    device: DeviceMemory | None = None
    #: Outcomes since the worker started.
    completed: int = 0
    failed: int = 0
    retried: int = 0
    #: ``host:port`` of its health endpoint; None where it has none.
    health_address: str | None = None


@frozen(kw_only=True)
class StoredAsset:
    """Where an asset of a finished job lies."""

    bucket: str
    #: Path inside the bucket.
    path: str
    media_type: str
    size_bytes: int


@frozen(kw_only=True)
class FinishedJob:
    """A job that is over. Times are seconds since the epoch."""

    id: str
    #: Empty where the message could not be read.
    type: str
    status: JobStatus
    finished_at: float
    worker: str
    #: Why it failed, as in its callback and shortened; None where it completed.
    error_type: str | None = None
    reason: str | None = None
    attempt: int = 1
    #: Wall time by stage: ``references``, ``waiting``, ``generate``, ``store``; ``total`` from the claim to the end.
    seconds: Mapping[str, float] = field(factory=dict)
    assets: tuple[StoredAsset, ...] = ()


class Board(Protocol):
    """Where workers publish and others read."""

    def publish(self, status: WorkerStatus) -> None:
        """Say what a worker is doing. It is forgotten after ``LIFETIME_SECONDS`` unless it is said again."""
        ...

    def withdraw(self, name: str) -> None:
        """Take a worker that ends off the board."""
        ...

    def finished(self, record: FinishedJob) -> None:
        """Say that a job is over."""
        ...

    def show_preview(self, job_id: str, content: bytes) -> None:
        """Put the newest preview of a running job there for ``PREVIEW_SECONDS``, unless it is too large."""
        ...

    def preview(self, job_id: str) -> bytes | None:
        """The newest preview of a job, or None."""
        ...

    def workers(self) -> list[WorkerStatus]:
        """The workers that live, by name."""
        ...

    def recent(self, limit: int = RECENT_JOBS) -> list[FinishedJob]:
        """The jobs that ended last, newest first."""
        ...

    def close(self) -> None:
        """Let go of connections."""
        ...


class RedisBoard:
    """A board on the queue's Redis, with connections of its own. Thread-safe.

    One key a worker and one a preview, which expire, and one list of ended jobs, which is capped.
    Every method raises :class:`~ourvidz_core.errors.QueueUnavailable` where Redis does not answer.
    """

    def __init__(
        self,
        client: redis.Redis,
        *,
        lifetime_seconds: float = LIFETIME_SECONDS,
        recent_jobs: int = RECENT_JOBS,
        preview_seconds: float = PREVIEW_SECONDS,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        self._client = client
        self._lifetime_ms = int(lifetime_seconds * 1000)
        self._recent_jobs = recent_jobs
        self._preview_ms = int(preview_seconds * 1000)
        self._on_close = on_close

    @classmethod
    def connect(cls, address: str, **options: Any) -> RedisBoard:
        """The board at ``address``: redis://, rediss:// or unix://. Nothing is asked yet."""
        try:
            client = redis.Redis.from_url(
                address,
                socket_timeout=_TIMEOUT_SECONDS,
                socket_connect_timeout=_TIMEOUT_SECONDS,
                retry=Retry(NoBackoff(), 0),
            )
        except ValueError as error:
            raise QueueError(f"REDIS_URL cannot be used: {error}") from None
        return cls(client, **options)

    def publish(self, status: WorkerStatus) -> None:
        with translated(), self._client.pipeline(transaction=False) as pipe:
            pipe.set(_WORKER_KEY + status.name, _encode(status), px=self._lifetime_ms)
            pipe.sadd(_NAMES_KEY, status.name)
            pipe.execute()

    def withdraw(self, name: str) -> None:
        with translated(), self._client.pipeline(transaction=False) as pipe:
            pipe.delete(_WORKER_KEY + name)
            pipe.srem(_NAMES_KEY, name)
            pipe.execute()

    def finished(self, record: FinishedJob) -> None:
        with translated(), self._client.pipeline(transaction=False) as pipe:
            pipe.lpush(_RECENT_KEY, _encode(record))
            pipe.ltrim(_RECENT_KEY, 0, self._recent_jobs - 1)
            pipe.execute()

    def show_preview(self, job_id: str, content: bytes) -> None:
        if len(content) <= PREVIEW_BYTES:
            with translated():
                self._client.set(_preview_key(job_id), content, px=self._preview_ms)

    def preview(self, job_id: str) -> bytes | None:
        with translated():
            # One of another's making may be of any size.
            content = cast(bytes, self._client.getrange(_preview_key(job_id), 0, PREVIEW_BYTES))
        return content if 0 < len(content) <= PREVIEW_BYTES else None

    def workers(self) -> list[WorkerStatus]:
        with translated():
            names = sorted(cast(set[bytes], self._client.smembers(_NAMES_KEY)))
            if not names:
                return []
            entries = cast(list[bytes | None], self._client.mget([_WORKER_KEY.encode() + name for name in names]))
            gone = [name for name, entry in zip(names, entries, strict=True) if entry is None]
            if gone:  # one that was only slow puts its name back with the next word it says
                self._client.srem(_NAMES_KEY, *gone)
        decoded = (_decode(entry, WorkerStatus) for entry in entries if entry is not None)
        return [status for status in decoded if status is not None]

    def recent(self, limit: int = RECENT_JOBS) -> list[FinishedJob]:
        if limit < 1:
            return []
        with translated():
            entries = cast(list[bytes], self._client.lrange(_RECENT_KEY, 0, limit - 1))
        return [record for record in (_decode(entry, FinishedJob) for entry in entries) if record is not None]

    def close(self) -> None:
        self._client.close()
        self._on_close()


class MemoryBoard:
    """A board in this process: for tests, and for a worker that nobody watches. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._workers: dict[str, WorkerStatus] = {}
        self._recent: deque[FinishedJob] = deque(maxlen=RECENT_JOBS)
        self._previews: dict[str, tuple[float, bytes]] = {}

    def publish(self, status: WorkerStatus) -> None:
        with self._lock:
            self._workers[status.name] = status

    def withdraw(self, name: str) -> None:
        with self._lock:
            self._workers.pop(name, None)

    def finished(self, record: FinishedJob) -> None:
        with self._lock:
            self._recent.appendleft(record)

    def show_preview(self, job_id: str, content: bytes) -> None:
        now = time.monotonic()
        with self._lock:
            self._previews = {known: entry for known, entry in self._previews.items() if entry[0] > now}
            if len(content) <= PREVIEW_BYTES:
                self._previews[job_id] = (now + PREVIEW_SECONDS, content)

    def preview(self, job_id: str) -> bytes | None:
        with self._lock:
            until, content = self._previews.get(job_id, (0.0, b""))
        return content if until > time.monotonic() else None

    def workers(self) -> list[WorkerStatus]:
        with self._lock:
            return [self._workers[name] for name in sorted(self._workers)]

    def recent(self, limit: int = RECENT_JOBS) -> list[FinishedJob]:
        with self._lock:
            return list(self._recent)[:limit]

    def close(self) -> None:
        """There is nothing to let go of."""


def _preview_key(job_id: str) -> str:
    # An id is whatever a producer wrote.
    return _PREVIEW_KEY + hashlib.sha256(job_id.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _encode(entry: WorkerStatus | FinishedJob) -> bytes:
    return json.dumps(_converter.unstructure(entry), separators=(",", ":")).encode("utf-8", "replace")


def _decode(entry: bytes, kind: type[Entry]) -> Entry | None:
    """An entry, or None where it is of a version that this one does not understand."""
    try:
        return _converter.structure(json.loads(entry), kind)
    except (ValueError, TypeError, BaseValidationError):
        return None
