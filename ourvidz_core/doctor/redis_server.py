"""What the doctor asks of Redis. Reads, and one blocking move of a key that does not exist."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast
from urllib.parse import urlsplit

import redis
from attrs import define, field
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, RedisError, ResponseError
from redis.retry import Retry

from ourvidz_core.delivery.embedded import EmbeddedRedis
from ourvidz_core.delivery.redis_queue import RedisQueue
from ourvidz_core.errors import QueueUnsupported
from ourvidz_core.settings import Settings
from ourvidz_core.wire.findings import Check, Finding

_TIMEOUT_SECONDS = 5.0
#: A claim and a finish are two round trips each; beyond this the network is what a job waits for.
SLOW_SECONDS = 0.05
_PINGS = 7
#: Receivers of Standard Webhooks refuse what is signed five minutes off; a signed URL is as easily too early.
SKEWED_SECONDS = 5.0
REFUSED_SECONDS = 300.0
#: Share of the memory limit from which new jobs may soon be refused.
_NEARLY_FULL = 0.9


def redis_checks(settings: Settings, *, clock: Callable[[], float] = time.time) -> list[Check]:
    """The checks of the configured Redis, or of the embedded one. ``clock`` is this machine's."""
    return [
        Check(name="redis", run=lambda: _look_at_server(settings), is_at_start=True),
        Check(name="clock", run=lambda: _compare_clocks(settings, clock)),
    ]


def _look_at_server(settings: Settings) -> Iterator[Finding]:
    with _connected(settings) as (client, place):
        try:
            server = _Server(client, place)
            server.client.ping()
        except AuthenticationError:
            yield Finding.red(
                f"{place} refuses the password",
                cure="put the right user and password into REDIS_URL: redis://USER:PASSWORD@HOST:PORT",
            )
            return
        except (RedisError, OSError) as error:
            yield Finding.red(
                f"{place} does not answer: {error}",
                cure="start it, or correct the host, the port and the scheme (rediss:// for TLS) in REDIS_URL",
            )
            return
        yield from server.findings()


@define
class _Server:
    """A server that answers, and what it says of itself; a managed one may not tell."""

    client: redis.Redis
    place: str
    info: Mapping[str, Any] = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.info = self._told(self.client.info)

    def findings(self) -> Iterator[Finding]:
        try:
            RedisQueue(self.client).probe()
        except QueueUnsupported as error:
            yield Finding.red(
                str(error),
                cure="use Redis 6.2 or newer as a primary, with a user who may call BLMOVE and EVAL",
                forbids_start=True,
            )
            return
        version = self.info.get("redis_version", "of unknown version")
        yield Finding.green(f"Redis {version} at {self.place}: blocking moves and scripts work")
        yield self._eviction()
        yield from self._memory()
        yield from self._persistence()
        yield self._latency()

    def _eviction(self) -> Finding:
        policy = self._config("maxmemory-policy")
        if policy is None:
            return Finding.green("it does not tell its maxmemory-policy; its console should say noeviction")
        cure = "CONFIG SET maxmemory-policy noeviction, and the same in redis.conf or in the provider's console"
        if policy.startswith("allkeys"):
            return Finding.red(
                f"maxmemory-policy is {policy}: when its memory is full, it throws jobs away",
                cure=cure,
                forbids_start=True,
            )
        if policy != "noeviction":
            return Finding.yellow(
                f"maxmemory-policy is {policy}: it removes keys that expire, among them what workers publish",
                cure=cure,
            )
        return Finding.green("maxmemory-policy is noeviction")

    def _memory(self) -> Iterator[Finding]:
        used, limit = self.info.get("used_memory", 0), self.info.get("maxmemory", 0)
        if limit and used >= _NEARLY_FULL * limit:
            yield Finding.yellow(
                f"{used / 1e6:.0f} of {limit / 1e6:.0f} MB of memory are in use; a full Redis refuses producers",
                cure="raise maxmemory, or look with ourvidz queue status for what piles up",
            )

    def _persistence(self) -> Iterator[Finding]:
        append, save = self._config("appendonly"), self._config("save")
        if "err" in (self.info.get("aof_last_write_status"), self.info.get("rdb_last_bgsave_status")):
            yield Finding.red(
                "its last write to disk failed; it may refuse every change until one succeeds",
                cure="look for a full disk and at the log of the Redis server",
                forbids_start=True,
            )
        if append is None:
            yield Finding.green("it does not tell whether it keeps data on disk; its console should say so")
        elif append == "yes":
            yield Finding.green("it keeps an append-only file")
        elif save:
            yield Finding.yellow(
                f"it keeps snapshots only (save {save}): a crash forgets the changes since the last one",
                cure="CONFIG SET appendonly yes, and the same in redis.conf",
            )
        else:
            yield Finding.yellow(
                "it keeps nothing on disk: jobs and callbacks end with it",
                cure="CONFIG SET appendonly yes, and the same in redis.conf",
            )

    def _latency(self) -> Finding:
        times = []
        for _ in range(_PINGS):
            started = time.perf_counter()
            self.client.ping()
            times.append(time.perf_counter() - started)
        # A busy machine adds to most of them; the way to the server is in all.
        shortest = min(times)
        said = f"a round trip takes {shortest * 1000:.1f} ms"
        if shortest > SLOW_SECONDS:
            return Finding.yellow(said, cure="run the workers in the region of the Redis, or name a nearer one")
        return Finding.green(said)

    def _config(self, name: str) -> str | None:
        answer: dict[str, str] = self._told(lambda: self.client.config_get(name))
        return answer.get(name)

    @staticmethod
    def _told(ask: Callable[[], Any]) -> dict[str, Any]:
        try:
            return cast(dict[str, Any], ask())
        except ResponseError:  # the command is renamed, or this user may not call it
            return {}


def _compare_clocks(settings: Settings, clock: Callable[[], float]) -> Iterator[Finding]:
    with _connected(settings) as (client, place):
        try:
            before = clock()
            seconds, microseconds = client.time()
            after = clock()
        except (RedisError, OSError) as error:
            yield Finding.yellow(
                f"there is nothing to compare with: {place} does not answer ({error})", cure="see redis"
            )
            return
    skew = (before + after) / 2 - (seconds + microseconds / 1e6)
    said = f"this machine's clock is {abs(skew):.1f} s {'ahead of' if skew > 0 else 'behind'} that of Redis"
    cure = "synchronise the clock of this machine (chrony, systemd-timesyncd), or that of the Redis server"
    if abs(skew) >= REFUSED_SECONDS:
        yield Finding.red(f"{said}: signed callbacks and signed addresses will be refused", cure=cure)
    elif abs(skew) >= SKEWED_SECONDS:
        yield Finding.yellow(f"{said}; leases do not depend on it, signatures and times in callbacks do", cure=cure)
    else:
        yield Finding.green(f"this machine's clock agrees with that of Redis to {max(abs(skew), 0.001):.3f} s")


@contextmanager
def _connected(settings: Settings) -> Iterator[tuple[redis.Redis, str]]:
    """A client that has asked nothing yet, and where it asks, without the password."""
    address = settings.redis_address
    server = EmbeddedRedis(settings.state_dir / "redis") if address is None else None
    try:
        client = redis.Redis.from_url(
            server.address if server is not None else str(address),
            socket_timeout=_TIMEOUT_SECONDS,
            socket_connect_timeout=_TIMEOUT_SECONDS,
            retry=Retry(NoBackoff(), 0),
        )
        with client:
            yield client, "the embedded server" if address is None else shown_place(address)
    finally:
        if server is not None:
            server.close()


def shown_place(address: str) -> str:
    """The address of a Redis as it may be shown: without user and password.

    >>> shown_place("rediss://default:secret@redis.example:6380/0")
    'redis.example:6380'
    """
    parts = urlsplit(address)
    return parts.netloc.rpartition("@")[2] or parts.path
