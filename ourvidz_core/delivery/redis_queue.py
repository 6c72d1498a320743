"""The queue in Redis. Every change is one script, so no crash can fall between two steps.

Works on Redis 6.2 to 8. All keys of a queue share its hash tag, so a cluster keeps them
on one node.
"""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from importlib.resources import files
from typing import Any, cast

import attrs
import redis
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.retry import Retry

from ourvidz_core.delivery.queue import (
    Claim,
    DeadLetter,
    FinishAnswer,
    QueuedCallback,
    QueueDepth,
    Recovery,
)
from ourvidz_core.errors import QueueError, QueueUnavailable, QueueUnsupported
from ourvidz_core.settings import PopSide

logger = logging.getLogger(__name__)


_BLOCK_SECONDS = 20.0
_SCRIPTS = ("claim", "renew", "finish", "hand_back", "recover", "take_callbacks", "settle_callback")


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
        """Make sure that the server can keep our promises."""
        with _translated():
            version = str(self._client.info("server")["redis_version"])
        if tuple(int(part) for part in version.split(".")[:2]) < (6, 2):
            raise QueueUnsupported(f"Redis {version} lacks BLMOVE; 6.2 or newer is needed")
        with contextlib.suppress(ResponseError):  # a managed server may not tell
            policy = cast(dict[str, str], self._client.config_get("maxmemory-policy")).get("maxmemory-policy")
            if policy not in (None, "noeviction"):
                logger.warning(
                    "Redis has maxmemory-policy %s: when its memory is full it throws jobs away; set noeviction", policy
                )

    def push(self, queue: str, raw: bytes) -> None:
        with _translated():
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
                    ["", "lease", "job", "meta", "done", "fence", "retry"],
                    [int(lease * 1000), worker, self._side.value],
                )
                if answer is None:
                    break
                kind, key, raw = answer[0], answer[1].decode("utf-8", "surrogateescape"), answer[2]
                if kind == b"claimed":
                    return _claim(queue, key, raw, answer[3])
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
        is_completed: bool,
        callback: QueuedCallback | None = None,
        callback_delay: float = 0.0,
        dead_letter: DeadLetter | None = None,
    ) -> FinishAnswer:
        answer = self._run(
            "finish",
            claim.queue,
            ["lease", "job", "meta", "done", "retry", "finished", "outbox", "rows", "dead"],
            [
                _key(claim),
                claim.token,
                int(is_completed),
                callback.callback_id if callback else "",
                _encode_callback(callback) if callback else "",
                int(callback_delay * 1000),
                _encode_dead_letter(dead_letter) if dead_letter else "",
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
                ["lease", "job", "meta", "fence", "retry"],
                [max_interruptions, int(delay * 1000), int(lease * 1000), worker],
            )
            recovered.extend(key.decode("utf-8", "surrogateescape") for key in back)
            given_up.extend(
                _claim(queue, key.decode("utf-8", "surrogateescape"), raw, meta) for key, raw, meta in buried
            )
        return Recovery(recovered=tuple(recovered), given_up=tuple(given_up))

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
            taken.extend(_decode_callback(queue, row) for row in answer[1::2])
        return taken, soonest

    def callback_delivered(self, callback: QueuedCallback) -> None:
        self._settle(callback, "delivered")

    def callback_postponed(self, callback: QueuedCallback, *, delay: float) -> None:
        self._settle(callback, "postponed", delay)

    def callback_given_up(self, callback: QueuedCallback) -> None:
        self._settle(callback, "given_up")

    def dead_letters(self, queue: str) -> list[DeadLetter]:
        with _translated():
            entries = cast(list[bytes], self._client.lrange(_name(queue, "dead"), 0, -1))
        return [_decode_dead_letter(entry) for entry in entries]

    def undelivered(self, queue: str) -> list[QueuedCallback]:
        with _translated():
            rows = cast(list[bytes], self._client.lrange(_name(queue, "undelivered"), 0, -1))
        return [_decode_callback(queue, row) for row in rows]

    def depth(self, queue: str) -> QueueDepth:
        with _translated(), self._client.pipeline(transaction=False) as pipe:
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

    def _settle(self, callback: QueuedCallback, verdict: str, delay: float = 0.0) -> None:
        self._run(
            "settle_callback",
            callback.queue,
            ["outbox", "rows", "undelivered"],
            [callback.callback_id, verdict, _encode_callback(callback), int(delay * 1000)],
        )

    def _run(self, script: str, queue: str, names: Sequence[str], arguments: Sequence[Any]) -> Any:
        with _translated():
            return self._scripts[script](keys=[_name(queue, name) for name in names], args=arguments)


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
    return claim.key.encode("utf-8", "surrogateescape")


def _name(queue: str, name: str) -> str:
    return f"{{{queue}}}:{name}" if name else queue


def _encode_callback(callback: QueuedCallback) -> bytes:
    fields = attrs.asdict(callback, filter=lambda attribute, _: attribute.name not in ("queue", "body"))
    return json.dumps({**fields, "body": callback.body.decode()}).encode()


def _decode_callback(queue: str, row: bytes) -> QueuedCallback:
    fields = json.loads(row)
    return QueuedCallback(queue=queue, **{**fields, "body": fields["body"].encode()})


def _encode_dead_letter(letter: DeadLetter) -> bytes:
    # The message is whatever a producer sent: text where it is text, so that a person can read it.
    try:
        raw = {"raw": letter.raw.decode()}
    except UnicodeDecodeError:
        raw = {"raw_base64": base64.b64encode(letter.raw).decode()}
    fields = attrs.asdict(letter, filter=lambda attribute, _: attribute.name != "raw")
    return json.dumps({**fields, **raw}).encode()


def _decode_dead_letter(entry: bytes) -> DeadLetter:
    fields = json.loads(entry)
    encoded = fields.pop("raw_base64", None)
    raw = base64.b64decode(encoded) if encoded is not None else fields["raw"].encode()
    return DeadLetter(**{**fields, "raw": raw})


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """Redis's errors in our words."""
    try:
        yield
    except (RedisConnectionError, RedisTimeoutError, OSError) as error:
        raise QueueUnavailable(f"Redis does not answer: {error}") from error
    except ResponseError as error:
        if "WRONGTYPE" in str(error):
            raise QueueError(f"a key of the queue is in use for something else: {error}") from error
        raise QueueError(f"Redis refuses: {error}") from error
    except RedisError as error:
        raise QueueUnavailable(f"Redis fails: {error}") from error
