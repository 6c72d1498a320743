"""A queue in this process's memory: the same promises as Redis for as long as the process lives.

For tests and for running a job without a server. Time is handed in, so a test need not wait.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from typing import Any

import attrs
from attrs import define, field

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
from ourvidz_core.errors import PayloadError
from ourvidz_core.wire.payloads import decode_message

_ID_CHARACTERS = 128


@define
class _InFlight:
    claim: Claim
    worker: str
    claimed_at: float = 0.0
    lease_until: float | None = None
    retry_at: float | None = None
    interruptions: int = 0


@define
class _Books:
    waiting: deque[bytes] = field(factory=deque)
    in_flight: dict[str, _InFlight] = field(factory=dict)
    done: set[str] = field(factory=set)
    finished_tokens: set[int] = field(factory=set)
    last_token: int = 0
    callbacks: dict[str, tuple[float, QueuedCallback]] = field(factory=dict)
    undelivered: list[QueuedCallback] = field(factory=list)
    dead: list[DeadLetter] = field(factory=list)
    cancel_requests: set[str] = field(factory=set)
    cancelled: set[str] = field(factory=set)


class MemoryQueue:
    """See :class:`~ourvidz_core.delivery.queue.Queue`. Thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._books: defaultdict[str, _Books] = defaultdict(_Books)
        self._changed = threading.Condition(threading.RLock())

    def push(self, queue: str, raw: bytes) -> None:
        with self._changed:
            self._books[queue].waiting.appendleft(raw)
            self._changed.notify_all()

    def wait(self, queues: Sequence[str], timeout: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: any(self._books[queue].waiting for queue in queues), timeout)

    def claim(self, queues: Sequence[str], *, worker: str, lease: float) -> Claim | None:
        with self._changed:
            for queue in queues:
                claim = self._claim_from(queue, worker, lease)
                if claim is not None:
                    return claim
        return None

    def renew(self, claim: Claim, *, lease: float) -> bool:
        with self._changed:
            held = self._held(claim)
            if held is None:
                return False
            held.lease_until, held.retry_at = self._clock() + lease, None
            return True

    def finish(
        self,
        claim: Claim,
        *,
        is_final: bool,
        callback: QueuedCallback | None = None,
        callback_delay: float = 0.0,
        dead_letter: DeadLetter | None = None,
    ) -> FinishAnswer:
        with self._changed:
            books = self._books[claim.queue]
            if self._held(claim) is None:
                return FinishAnswer.ALREADY if claim.token in books.finished_tokens else FinishAnswer.FENCED
            if callback is not None:
                books.callbacks[callback.callback_id] = (self._clock() + callback_delay, callback)
            if dead_letter is not None:
                books.dead.insert(0, dead_letter)
            if is_final:
                books.done.add(claim.key)
            books.finished_tokens.add(claim.token)
            books.cancelled.discard(claim.key)
            books.cancel_requests.discard(claim.key)
            del books.in_flight[claim.key]
            return FinishAnswer.DONE

    def hand_back(self, claim: Claim, *, delay: float, reason: str = "", counts_as_attempt: bool = True) -> bool:
        with self._changed:
            held = self._held(claim)
            if held is None:
                return False
            held.claim = attrs.evolve(
                held.claim,
                attempt=claim.attempt if counts_as_attempt else claim.attempt - 1,
                reasons=(*claim.reasons, reason) if reason else claim.reasons,
            )
            held.lease_until, held.retry_at = None, self._clock() + delay
            self._changed.notify_all()
            return True

    def recover(
        self, queues: Sequence[str], *, worker: str, lease: float, delay: float, max_interruptions: int
    ) -> Recovery:
        recovered: list[str] = []
        given_up: list[Claim] = []
        with self._changed:
            for books in (self._books[queue] for queue in queues):
                for key, held in books.in_flight.items():
                    if held.lease_until is None or held.lease_until > self._clock():
                        continue
                    held.interruptions += 1
                    reasons = (*held.claim.reasons, f"worker {held.worker} stopped responding")
                    if held.interruptions >= max_interruptions:
                        held.claim = attrs.evolve(held.claim, token=_next_token(books), reasons=reasons)
                        held.worker, held.lease_until = worker, self._clock() + lease
                        given_up.append(held.claim)
                    else:
                        held.claim = attrs.evolve(held.claim, reasons=reasons)
                        held.lease_until, held.retry_at = None, self._clock() + delay
                        recovered.append(key)
        return Recovery(recovered=tuple(recovered), given_up=tuple(given_up))

    def request_cancel(self, queue: str, key: str) -> None:
        with self._changed:
            self._books[queue].cancel_requests.add(key)

    def cancel_requests(self, queues: Sequence[str], claims: Sequence[Claim]) -> CancelRequests:
        with self._changed:
            fresh = tuple((queue, key) for queue in queues for key in self._books[queue].cancel_requests)
            for queue, key in fresh:
                self._books[queue].cancelled.add(key)
                self._books[queue].cancel_requests.discard(key)
            running = tuple(claim for claim in claims if claim.key in self._books[claim.queue].cancelled)
        return CancelRequests(fresh=fresh, running=running)

    def cancel(self, queue: str, key: str, *, worker: str, lease: float) -> Cancellation:
        with self._changed:
            books = self._books[queue]
            held = books.in_flight.get(key)
            if held is not None and held.retry_at is None:
                books.cancelled.add(key)
                return Cancellation(state=CancelState.RUNNING)
            if held is None:
                raw = next((raw for raw in books.waiting if _key_of(raw) == key), None)
                if raw is None or key in books.done:
                    return Cancellation(state=CancelState.ABSENT)
                books.waiting.remove(raw)
                held = self._begin(queue, key, raw, worker)
            books.cancelled.add(key)
            return Cancellation(state=CancelState.TAKEN, claim=self._take(books, held, worker, lease))

    def take_callbacks(
        self, queues: Sequence[str], *, limit: int, hold: float
    ) -> tuple[list[QueuedCallback], float | None]:
        now = self._clock()
        with self._changed:
            books = [self._books[queue] for queue in queues]
            taken: list[QueuedCallback] = []
            for kept in books:
                due = [callback for due_at, callback in kept.callbacks.values() if due_at <= now][:limit]
                kept.callbacks.update({callback.callback_id: (now + hold, callback) for callback in due})
                taken.extend(due)
            waits = [max(due_at - now, 0.0) for kept in books for due_at, _ in kept.callbacks.values()]
        return taken, min(waits, default=None)

    def callback_delivered(self, callback: QueuedCallback) -> None:
        with self._changed:
            self._books[callback.queue].callbacks.pop(callback.callback_id, None)

    def callback_postponed(self, callback: QueuedCallback, *, delay: float) -> None:
        with self._changed:
            self._books[callback.queue].callbacks[callback.callback_id] = (self._clock() + delay, callback)

    def callback_given_up(self, callback: QueuedCallback) -> None:
        with self._changed:
            self.callback_delivered(callback)
            self._books[callback.queue].undelivered.insert(0, callback)

    def dead_letters(self, queue: str) -> list[DeadLetter]:
        return list(self._books[queue].dead)

    def undelivered(self, queue: str) -> list[QueuedCallback]:
        return list(self._books[queue].undelivered)

    def peek(self, queue: str, limit: int) -> list[bytes]:
        return list(reversed(self._books[queue].waiting))[:limit]

    def in_flight(self, queue: str) -> list[JobInFlight]:
        with self._changed:
            return [
                JobInFlight(
                    queue=queue,
                    key=key,
                    worker=held.worker,
                    attempt=held.claim.attempt,
                    lease_left_seconds=None if held.lease_until is None else held.lease_until - self._clock(),
                    age_seconds=None if held.lease_until is None else self._clock() - held.claimed_at,
                )
                for key, held in self._books[queue].in_flight.items()
            ]

    def requeue(self, queue: str, letter: DeadLetter) -> RequeueAnswer:
        with self._changed:
            books, key = self._books[queue], _key_of(letter.raw)
            if key in books.in_flight:
                return RequeueAnswer.IN_FLIGHT
            if not self.drop(queue, letter):
                return RequeueAnswer.ABSENT
            for marks in (books.done, books.cancelled, books.cancel_requests):
                marks.discard(key)
            self.push(queue, letter.raw)
            return RequeueAnswer.DONE

    def drop(self, queue: str, letter: DeadLetter) -> bool:
        with self._changed:
            dead = self._books[queue].dead
            is_there = letter in dead
            if is_there:
                dead.remove(letter)
            return is_there

    def waiting_callbacks(self, queue: str, limit: int | None = None) -> list[QueuedCallback]:
        with self._changed:
            due = sorted(self._books[queue].callbacks.values(), key=lambda row: row[0])
            return [callback for _, callback in due[:limit]]

    def replay(self, callback: QueuedCallback) -> bool:
        with self._changed:
            books = self._books[callback.queue]
            if callback in books.undelivered:
                books.undelivered.remove(callback)
            elif callback.callback_id not in books.callbacks:
                return False
            fresh = attrs.evolve(callback, failures=0, first_tried_at=0.0)
            books.callbacks[callback.callback_id] = (self._clock(), fresh)
            return True

    def depth(self, queue: str) -> QueueDepth:
        with self._changed:
            books = self._books[queue]
            return QueueDepth(
                waiting=len(books.waiting),
                in_flight=sum(held.lease_until is not None for held in books.in_flight.values()),
                retrying=sum(held.retry_at is not None for held in books.in_flight.values()),
                dead=len(books.dead),
                callbacks=len(books.callbacks),
                undelivered=len(books.undelivered),
            )

    def close(self) -> None:
        """Nothing to let go of."""

    def _claim_from(self, queue: str, worker: str, lease: float) -> Claim | None:
        books, now = self._books[queue], self._clock()
        for held in books.in_flight.values():
            if held.retry_at is not None and held.retry_at <= now:
                return self._take(books, held, worker, lease)
        while books.waiting:
            raw = books.waiting.pop()
            key = _key_of(raw)
            if key in books.done or key in books.in_flight:
                continue
            return self._take(books, self._begin(queue, key, raw, worker), worker, lease)
        return None

    def _begin(self, queue: str, key: str, raw: bytes, worker: str) -> _InFlight:
        held = _InFlight(claim=Claim(queue=queue, key=key, token=0, attempt=0, raw=raw), worker=worker)
        self._books[queue].in_flight[key] = held
        return held

    def _take(self, books: _Books, held: _InFlight, worker: str, lease: float) -> Claim:
        held.claim = attrs.evolve(
            held.claim,
            token=_next_token(books),
            attempt=held.claim.attempt + 1,
            is_cancelled=held.claim.key in books.cancelled | books.cancel_requests,
        )
        held.worker, held.claimed_at = worker, self._clock()
        held.lease_until, held.retry_at = held.claimed_at + lease, None
        return held.claim

    def _held(self, claim: Claim) -> _InFlight | None:
        held = self._books[claim.queue].in_flight.get(claim.key)
        return held if held is not None and held.claim.token == claim.token else None


def _next_token(books: _Books) -> int:
    books.last_token += 1
    return books.last_token


def _key_of(raw: bytes) -> str:
    try:
        job_id: Any = decode_message(raw).get("id")
    except PayloadError:
        job_id = None
    if isinstance(job_id, str) and 0 < len(job_id) <= _ID_CHARACTERS:
        return job_id
    return f"sha1:{hashlib.sha1(raw, usedforsecurity=False).hexdigest()}"
