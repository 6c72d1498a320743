"""The queue in Redis. Every change is one script, so no crash can fall between two steps.

Works on Redis 6.2 to 8. All keys of a queue share its hash tag, so a cluster keeps them
on one node.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from importlib.resources import files
from typing import Any, cast

import attrs
import redis
from redis.backoff import NoBackoff
from redis.exceptions import (
    ClusterDownError,
    MasterDownError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TryAgainError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.retry import Retry

from ourvidz_core.delivery.queue import (
    Cancellation,
    CancelRequests,
    CancelState,
    Claim,
    DeadLetter,
    FinishAnswer,
    JobInFlight,
    QueuedCallback,
    QueueDepth,
    Recovery,
    RequeueAnswer,
)
from ourvidz_core.delivery.rows import decode_callback, decode_dead_letter, encode_callback, encode_dead_letter
from ourvidz_core.errors import QueueError, QueueUnavailable, QueueUnsupported
from ourvidz_core.settings import PopSide

logger = logging.getLogger(__name__)


_BLOCK_SECONDS = 20.0
#: A full disk or memory, a failover, a start: each is over some time, and what was asked for can be asked again.
_REFUSALS_FOR_NOW = (ReadOnlyError, OutOfMemoryError, ClusterDownError, MasterDownError, TryAgainError)
#: The same within a script's error, and those that the client has no class for.
_FOR_NOW = re.compile(r"\b(MISCONF|OOM|READONLY|LOADING|BUSY|CLUSTERDOWN|MASTERDOWN|NOREPLICAS|TRYAGAIN)\b")
_SCRIPTS = (
    "claim",
    "renew",
    "finish",
    "hand_back",
    "recover",
    "cancel",
    "cancellations",
    "take_callbacks",
    "settle_callback",
    "replay_callback",
    "settle_dead",
)
#: A wish to cancel a job that nobody has seen is remembered for as long.
_CANCEL_SECONDS = 3600.0
#: Messages that one script looks through; a server does nothing else meanwhile.
_SEARCHED_AT_ONCE = 5000


class RedisQueue:
    """A queue on one Redis. Thread-safe."""

    def __init__(
        self,
        client: redis.Redis,
        *,
        pop_side: PopSide = PopSide.RIGHT,
        duplicate_window: float = 7 * 86400.0,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        self._client = client
        self._side = pop_side
        self._window_ms = int(duplicate_window * 1000)
        self._on_close = on_close
        self._bells: dict[str, _Bell] = {}
        self._rang = threading.Event()
        lua = files("ourvidz_core.delivery") / "lua"
        common = (lua / "common.lua").read_text("utf-8")
        self._scripts = {
            name: client.register_script(common + (lua / f"{name}.lua").read_text("utf-8")) for name in _SCRIPTS
        }

    @classmethod
    def connect(cls, address: str, **options: Any) -> RedisQueue:
        """The queue at ``address``: redis://, rediss:// or unix://.

        :raises QueueUnavailable: it does not answer.
        :raises QueueUnsupported: it is too old, or would throw jobs away when its memory is full.
        """
        try:
            # Without the client's own retries: a script whose reply was lost must not run twice unseen.
            client = redis.Redis.from_url(
                address,
                socket_timeout=_BLOCK_SECONDS + 10,
                socket_connect_timeout=5,
                health_check_interval=30,
                retry=Retry(NoBackoff(), 0),
            )
        except ValueError as error:
            raise QueueError(f"REDIS_URL cannot be used: {error}") from None
        made = cls(client, **options)
        made.check()
        return made

    def check(self) -> None:
        """Make sure that the server can keep our promises, and warn of what it may do that loses jobs.

        :raises QueueUnsupported: it lacks something without which nothing works.
        """
        self.probe()
        for warning in self._shortcomings():
            logger.warning("%s", warning)

    def probe(self) -> None:
        """Try on the server what nothing works without.

        What we use is tried rather than read from a version: managed servers speak Redis without being it.

        :raises QueueUnsupported: it lacks something without which nothing works.
        """
        probe = _name("ourvidz", "probe")
        with translated():
            try:
                self._client.blmove(probe, probe, cast(int, 0.01), "RIGHT", "RIGHT")
            except ReadOnlyError:
                raise QueueUnsupported("REDIS_URL names a replica, which takes no writes; name its primary") from None
            except ResponseError as error:
                if _is_for_now(error):
                    raise
                raise QueueUnsupported(
                    f"{self._said_version()} lacks BLMOVE, or this user may not call it: Redis 6.2 or newer is needed,"
                    f" and a user who may touch every key ({error})"
                ) from None
            try:
                # Under RESP3 a script's reply has other types, and one with no keys may run where others may not.
                answer = self._client.eval("return {redis.call('TIME')[1], cjson.encode(KEYS)}", 1, probe)
            except ResponseError as error:
                raise QueueUnsupported(
                    f"{self._said_version()} runs no Lua scripts, or this user may not call EVAL ({error})"
                ) from None
        if not isinstance(answer, list) or answer[1] != json.dumps([probe], separators=(",", ":")).encode():
            raise QueueUnsupported(f"{self._said_version()} runs Lua scripts and answers {answer!r} to a simple one")

    def _shortcomings(self) -> Iterator[str]:
        """What a server may do that loses jobs. A managed one may not tell."""
        if self._info("cluster").get("cluster_enabled") == 1:
            yield (
                "Redis is a cluster and this client speaks to one node: each queue must lie on the node that REDIS_URL"
                " names, or behind an address that finds the node by itself"
            )
        policy = self._config("maxmemory-policy")
        if policy is not None and policy.startswith("allkeys"):
            yield f"Redis has maxmemory-policy {policy}: when its memory is full it throws jobs away; set noeviction"
        if self._config("appendonly") == "no" and self._config("save") == "":
            yield "Redis keeps nothing on disk: jobs and callbacks end with it; set appendonly yes"

    def _said_version(self) -> str:
        return f"Redis {self._info('server').get('redis_version', 'of unknown version')}"

    def _info(self, section: str) -> dict[str, Any]:
        try:
            return self._client.info(section)
        except RedisError:
            return {}

    def _config(self, name: str) -> str | None:
        try:
            return cast(dict[str, str], self._client.config_get(name)).get(name)
        except RedisError:
            return None

    def push(self, queue: str, raw: bytes) -> None:
        with translated():
            if self._side is PopSide.RIGHT:
                self._client.lpush(queue, raw)
            else:
                self._client.rpush(queue, raw)

    def wait(self, queues: Sequence[str], timeout: float) -> None:
        for queue in queues:
            bell = self._bells.get(queue)
            if bell is None or not bell.is_alive():
                bell = self._bells[queue] = _Bell(self._client, queue, self._side, self._rang)
                bell.start()
            bell.arm()
        self._rang.wait(timeout)
        self._rang.clear()

    def claim(self, queues: Sequence[str], *, worker: str, lease: float) -> Claim | None:
        for queue in queues:
            while True:
                answer = self._run(
                    "claim",
                    queue,
                    ["", "lease", "job", "meta", "done", "fence", "retry", "cancel", "cancelled"],
                    [int(lease * 1000), worker, self._side.value],
                )
                if answer is None:
                    break
                kind, key, raw = answer[0], _text(answer[1]), answer[2]
                if kind == b"claimed":
                    return attrs.evolve(_claim(queue, key, raw, answer[3]), is_cancelled=bool(answer[4]))
                logger.warning("dropped a duplicate of job %s from %s: it is in flight or has completed", key, queue)
        return None

    def renew(self, claim: Claim, *, lease: float) -> bool:
        answer = self._run(
            "renew", claim.queue, ["lease", "meta", "retry"], [_key(claim), claim.token, int(lease * 1000)]
        )
        return bool(answer)

    def finish(
        self,
        claim: Claim,
        *,
        is_final: bool,
        callback: QueuedCallback | None = None,
        callback_delay: float = 0.0,
        dead_letter: DeadLetter | None = None,
    ) -> FinishAnswer:
        answer = self._run(
            "finish",
            claim.queue,
            ["lease", "job", "meta", "done", "retry", "finished", "outbox", "rows", "dead", "cancel", "cancelled"],
            [
                _key(claim),
                claim.token,
                int(is_final),
                callback.callback_id if callback else "",
                encode_callback(callback) if callback else "",
                int(callback_delay * 1000),
                encode_dead_letter(dead_letter) if dead_letter else "",
                self._window_ms,
            ],
        )
        return FinishAnswer(answer.decode())

    def hand_back(self, claim: Claim, *, delay: float, reason: str = "", counts_as_attempt: bool = True) -> bool:
        answer = self._run(
            "hand_back",
            claim.queue,
            ["lease", "meta", "retry"],
            [_key(claim), claim.token, int(delay * 1000), " ".join(reason.split()), int(counts_as_attempt)],
        )
        if answer:
            self._rang.set()
        return bool(answer)

    def recover(
        self, queues: Sequence[str], *, worker: str, lease: float, delay: float, max_interruptions: int
    ) -> Recovery:
        recovered: list[str] = []
        given_up: list[Claim] = []
        for queue in queues:
            back, buried = self._run(
                "recover",
                queue,
                ["lease", "job", "meta", "fence", "retry", "done", "finished"],
                [max_interruptions, int(delay * 1000), int(lease * 1000), worker, self._window_ms],
            )
            recovered.extend(_text(key) for key in back)
            given_up.extend(_claim(queue, _text(key), raw, meta) for key, raw, meta in buried)
        return Recovery(recovered=tuple(recovered), given_up=tuple(given_up))

    def request_cancel(self, queue: str, key: str) -> None:
        with translated():
            self._client.sadd(_name(queue, "cancel"), _bytes(key))

    def cancel_requests(self, queues: Sequence[str], claims: Sequence[Claim]) -> CancelRequests:
        fresh: list[tuple[str, str]] = []
        running: list[Claim] = []
        for queue in queues:
            held = {_bytes(claim.key): claim for claim in claims if claim.queue == queue}
            asked, marked = self._run(
                "cancellations", queue, ["cancel", "cancelled"], [int(_CANCEL_SECONDS * 1000), *held]
            )
            fresh.extend((queue, _text(key)) for key in asked)
            running.extend(held[key] for key in marked)
        return CancelRequests(fresh=tuple(fresh), running=tuple(running))

    def cancel(self, queue: str, key: str, *, worker: str, lease: float) -> Cancellation:
        start = 0
        while True:
            answer = self._run(
                "cancel",
                queue,
                ["", "lease", "job", "meta", "done", "fence", "retry", "cancel", "cancelled"],
                [_bytes(key), worker, int(lease * 1000), start, _SEARCHED_AT_ONCE, self._side.value],
            )
            start += _SEARCHED_AT_ONCE
            kind = answer[0].decode()
            if kind == "taken":
                return Cancellation(state=CancelState.TAKEN, claim=_claim(queue, key, answer[2], answer[3]))
            if kind != "more":
                return Cancellation(state=CancelState(kind))

    def take_callbacks(
        self, queues: Sequence[str], *, limit: int, hold: float
    ) -> tuple[list[QueuedCallback], float | None]:
        taken: list[QueuedCallback] = []
        soonest: float | None = None
        for queue in queues:
            answer = self._run("take_callbacks", queue, ["outbox", "rows"], [limit, int(hold * 1000)])
            until = int(answer.pop())
            if until >= 0:
                soonest = min(until / 1000, soonest) if soonest is not None else until / 1000
            taken.extend(decode_callback(queue, row) for row in answer[1::2])
        return taken, soonest

    def callback_delivered(self, callback: QueuedCallback) -> None:
        self._settle(callback, "delivered")

    def callback_postponed(self, callback: QueuedCallback, *, delay: float) -> None:
        self._settle(callback, "postponed", delay)

    def callback_given_up(self, callback: QueuedCallback) -> None:
        self._settle(callback, "given_up")

    def dead_letters(self, queue: str) -> list[DeadLetter]:
        with translated():
            entries = cast(list[bytes], self._client.lrange(_name(queue, "dead"), 0, -1))
        return [decode_dead_letter(entry) for entry in entries]

    def undelivered(self, queue: str) -> list[QueuedCallback]:
        with translated():
            rows = cast(list[bytes], self._client.lrange(_name(queue, "undelivered"), 0, -1))
        return [decode_callback(queue, row) for row in rows]

    def peek(self, queue: str, limit: int) -> list[bytes]:
        with translated():
            if self._side is PopSide.LEFT:
                return cast(list[bytes], self._client.lrange(queue, 0, limit - 1))
            return cast(list[bytes], self._client.lrange(queue, -limit, -1))[::-1]

    def in_flight(self, queue: str) -> list[JobInFlight]:
        with translated(), self._client.pipeline(transaction=False) as pipe:
            pipe.hgetall(_name(queue, "meta"))
            pipe.zrange(_name(queue, "lease"), 0, -1, withscores=True)
            pipe.time()
            kept, leases, (seconds, microseconds) = pipe.execute()
        now, until = seconds + microseconds / 1e6, {key: score / 1000 for key, score in leases}
        jobs = []
        for key, meta in kept.items():
            facts = json.loads(meta)
            is_leased = key in until
            jobs.append(
                JobInFlight(
                    queue=queue,
                    key=_text(key),
                    worker=facts["worker"],
                    attempt=int(facts["attempt"]),
                    lease_left_seconds=round(until[key] - now, 3) if is_leased else None,
                    age_seconds=round(now - facts["claimed_at"] / 1000, 3)
                    if is_leased and "claimed_at" in facts
                    else None,
                )
            )
        return jobs

    def requeue(self, queue: str, letter: DeadLetter) -> RequeueAnswer:
        answer = self._settle_dead(queue, letter, "requeue")
        return {1: RequeueAnswer.DONE, 0: RequeueAnswer.ABSENT, -1: RequeueAnswer.IN_FLIGHT}[answer]

    def drop(self, queue: str, letter: DeadLetter) -> bool:
        return self._settle_dead(queue, letter, "drop") == 1

    def waiting_callbacks(self, queue: str, limit: int | None = None) -> list[QueuedCallback]:
        with translated():
            if limit is None:
                rows = cast(list[bytes | None], self._client.hvals(_name(queue, "rows")))
            else:
                due = cast(list[bytes], self._client.zrange(_name(queue, "outbox"), 0, limit - 1))
                rows = cast(list[bytes | None], self._client.hmget(_name(queue, "rows"), due)) if due else []
        # One that was accepted between two questions is gone.
        return [decode_callback(queue, row) for row in rows if row is not None]

    def replay(self, callback: QueuedCallback) -> bool:
        fresh = attrs.evolve(callback, failures=0, first_tried_at=0.0)
        with translated():
            given_up = cast(list[bytes], self._client.lrange(_name(callback.queue, "undelivered"), 0, -1))
        entry = next((row for row in given_up if decode_callback(callback.queue, row) == callback), b"")
        answer = self._run(
            "replay_callback",
            callback.queue,
            ["outbox", "rows", "undelivered"],
            [callback.callback_id, entry, encode_callback(fresh)],
        )
        return bool(answer)

    def depth(self, queue: str) -> QueueDepth:
        with translated(), self._client.pipeline(transaction=False) as pipe:
            pipe.llen(queue)
            pipe.zcard(_name(queue, "lease"))
            pipe.zcard(_name(queue, "retry"))
            pipe.llen(_name(queue, "dead"))
            pipe.zcard(_name(queue, "outbox"))
            pipe.llen(_name(queue, "undelivered"))
            waiting, in_flight, retrying, dead, callbacks, undelivered = pipe.execute()
        return QueueDepth(
            waiting=waiting,
            in_flight=in_flight,
            retrying=retrying,
            dead=dead,
            callbacks=callbacks,
            undelivered=undelivered,
        )

    def close(self) -> None:
        for bell in self._bells.values():
            bell.stop()
        self._client.close()
        self._on_close()

    def _settle_dead(self, queue: str, letter: DeadLetter, verdict: str) -> int:
        with translated():
            entries = cast(list[bytes], self._client.lrange(_name(queue, "dead"), 0, -1))
        entry = next((entry for entry in entries if decode_dead_letter(entry) == letter), b"")
        answer = self._run(
            "settle_dead",
            queue,
            ["", "dead", "meta", "done", "cancel", "cancelled"],
            [entry, verdict, letter.raw, self._side.value],
        )
        return int(answer)

    def _settle(self, callback: QueuedCallback, verdict: str, delay: float = 0.0) -> None:
        self._run(
            "settle_callback",
            callback.queue,
            ["outbox", "rows", "undelivered"],
            [callback.callback_id, verdict, encode_callback(callback), int(delay * 1000)],
        )

    def _run(self, script: str, queue: str, names: Sequence[str], arguments: Sequence[Any]) -> Any:
        with translated():
            return self._scripts[script](keys=list(_keys(queue, tuple(names))), args=arguments)


class _Bell(threading.Thread):
    """Rings when a queue holds something: a blocking move of the last element onto its own place.

    Redis documents such a move as changing nothing, so any number of workers may wait
    on one list and none of them takes the job by waiting.
    """

    def __init__(self, client: redis.Redis, queue: str, side: PopSide, rang: threading.Event) -> None:
        super().__init__(name=f"bell-{queue}", daemon=True)
        self._client = client
        self._queue = queue
        self._side = side.value.upper()
        self._rang = rang
        self._armed = threading.Event()
        self._stopped = False

    def arm(self) -> None:
        self._armed.set()

    def stop(self) -> None:
        self._stopped = True
        self._armed.set()

    def run(self) -> None:
        while not self._stopped:
            self._armed.wait()
            try:
                found = self._client.blmove(self._queue, self._queue, cast(int, _BLOCK_SECONDS), self._side, self._side)
            except (RedisError, OSError, ValueError):
                # The claim that follows meets the same trouble and reports it.
                found = b""
            if found is not None:
                self._armed.clear()
                self._rang.set()
                if found == b"":
                    return


def _claim(queue: str, key: str, raw: bytes, meta: bytes) -> Claim:
    facts = json.loads(meta)
    return Claim(
        queue=queue,
        key=key,
        token=int(facts["token"]),
        attempt=int(facts["attempt"]),
        raw=raw,
        reasons=tuple(facts.get("reasons", "").split("\n")) if facts.get("reasons") else (),
    )


def _key(claim: Claim) -> bytes:
    return _bytes(claim.key)


def _bytes(key: str) -> bytes:
    return key.encode("utf-8", "surrogateescape")


def _text(key: bytes) -> str:
    return key.decode("utf-8", "surrogateescape")


@functools.cache
def _keys(queue: str, names: tuple[str, ...]) -> tuple[bytes, ...]:
    # Names of queues are few, and are made for every command.
    return tuple(_name(queue, name).encode() for name in names)


def _name(queue: str, name: str) -> str:
    return f"{{{queue}}}:{name}" if name else queue


def _is_for_now(error: ResponseError) -> bool:
    return isinstance(error, _REFUSALS_FOR_NOW) or _FOR_NOW.search(str(error)) is not None


@contextlib.contextmanager
def translated() -> Iterator[None]:
    """Redis's errors in our words."""
    try:
        yield
    except (RedisConnectionError, RedisTimeoutError, OSError) as error:
        raise QueueUnavailable(f"Redis does not answer: {error}") from error
    except ResponseError as error:
        if _is_for_now(error):
            raise QueueUnavailable(f"Redis refuses for now: {error}") from error
        if "WRONGTYPE" in str(error):
            raise QueueError(f"a key of the queue is in use for something else: {error}") from error
        raise QueueError(f"Redis refuses: {error}") from error
    except RedisError as error:
        raise QueueUnavailable(f"Redis fails: {error}") from error
