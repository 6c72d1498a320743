"""The queue: where messages come from, what is in flight, and callbacks on their way out.

A job is at every instant either in the producer's list, or in the queue's books as in
flight, waiting for another try, or finished: never only in a worker's memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Protocol

from attrs import field, frozen


@frozen(kw_only=True)
class Claim:
    """A job that this worker may work on while it keeps the lease."""

    queue: str
    #: The job's id in the queue's books; derived from the bytes where the message has none.
    key: str
    #: Rises with every claim; whoever holds an older one can no longer finish the job.
    token: int
    #: Counts from 1.
    attempt: int
    raw: bytes = field(repr=False)
    #: Why earlier attempts ended, oldest first.
    reasons: tuple[str, ...] = ()
    #: Somebody asked for it to stop before it was claimed: it is to be reported, not to be run.
    is_cancelled: bool = False


@frozen(kw_only=True)
class QueuedCallback:
    """A callback body that is durable and not yet accepted by the endpoint."""

    queue: str
    #: Stays the same for every try, so a receiver can tell a repetition.
    callback_id: str
    job_id: str
    body: bytes = field(repr=False)
    #: Refusals so far, and the last one's reason.
    failures: int = 0
    reason: str = ""
    #: Seconds since the epoch of the first try; 0 before it.
    first_tried_at: float = 0.0


@frozen(kw_only=True)
class DeadLetter:
    """A message that will not be tried again, kept with the reason."""

    raw: bytes = field(repr=False)
    job_id: str | None
    error_type: str
    reason: str
    #: ISO 8601, UTC.
    buried_at: str
    worker: str


@frozen(kw_only=True)
class Recovery:
    """What became of the jobs of silent workers."""

    recovered: tuple[str, ...] = ()
    #: Jobs that interrupted too many workers. The caller holds them and reports their failure.
    given_up: tuple[Claim, ...] = ()


class FinishAnswer(StrEnum):
    """What the queue says to an attempt to finish a job."""

    DONE = "done"
    #: This very claim has finished it before; its reply was lost.
    ALREADY = "already"
    #: Somebody else has the job; nothing was recorded.
    FENCED = "fenced"


class CancelState(StrEnum):
    """Where a job was found that is to be cancelled."""

    #: It waited, and is out of the queue now; the caller holds it and reports it.
    TAKEN = "taken"
    #: A worker has it, and will stop it.
    RUNNING = "running"
    #: It is over, or was never there.
    ABSENT = "absent"


@frozen(kw_only=True)
class Cancellation:
    """What became of a wish to cancel a job."""

    state: CancelState
    #: The job, where it was taken out.
    claim: Claim | None = None


@frozen(kw_only=True)
class CancelRequests:
    """Which jobs were asked to stop."""

    #: Asked for since anybody looked last, as (queue, key); whoever is told sees to them.
    fresh: tuple[tuple[str, str], ...] = ()
    #: Those of the given claims that shall stop.
    running: tuple[Claim, ...] = ()


@frozen(kw_only=True)
class JobInFlight:
    """A job that a worker has, or that waits for another try."""

    queue: str
    key: str
    worker: str
    attempt: int
    #: Seconds until the lease ends; None where the job waits for another try.
    lease_left_seconds: float | None = None
    #: Seconds since the worker claimed it; None where the job waits for another try.
    age_seconds: float | None = None


class RequeueAnswer(StrEnum):
    """What became of a dead letter that shall run again."""

    DONE = "done"
    ABSENT = "absent"
    #: The producer pushed the job again, and it runs already.
    IN_FLIGHT = "in flight"


@frozen(kw_only=True)
class QueueDepth:
    """How much a queue holds."""

    waiting: int
    in_flight: int
    retrying: int
    dead: int
    callbacks: int
    undelivered: int


class Queue(Protocol):
    """What a worker needs of a queue. All times are seconds."""

    def push(self, queue: str, raw: bytes) -> None:
        """Add a message the way the producer does."""
        ...

    def wait(self, queues: Sequence[str], timeout: float) -> None:
        """Return when one of ``queues`` may hold a job, at the latest after ``timeout``."""
        ...

    def claim(self, queues: Sequence[str], *, worker: str, lease: float) -> Claim | None:
        """Take the oldest job of the first of ``queues`` that has one."""
        ...

    def renew(self, claim: Claim, *, lease: float) -> bool:
        """Keep a job; False says that it is somebody else's now."""
        ...

    def finish(
        self,
        claim: Claim,
        *,
        is_final: bool,
        callback: QueuedCallback | None = None,
        callback_delay: float = 0.0,
        dead_letter: DeadLetter | None = None,
    ) -> FinishAnswer:
        """End a job for good, with its callback and its dead letter, in one step.

        With ``is_final`` its id is dropped when it is pushed again within the duplicate window.
        """
        ...

    def hand_back(self, claim: Claim, *, delay: float, reason: str = "", counts_as_attempt: bool = True) -> bool:
        """Let the job run again after ``delay``; False says that it is somebody else's now."""
        ...

    def recover(
        self, queues: Sequence[str], *, worker: str, lease: float, delay: float, max_interruptions: int
    ) -> Recovery:
        """Put the jobs of silent workers back, and those that lost their lease some other way."""
        ...

    def request_cancel(self, queue: str, key: str) -> None:
        """Ask for a job to stop the way a producer does: see the wire format."""
        ...

    def cancel_requests(self, queues: Sequence[str], claims: Sequence[Claim]) -> CancelRequests:
        """Which jobs were asked to stop; of those that run, only the given ones are looked at."""
        ...

    def cancel(self, queue: str, key: str, *, worker: str, lease: float) -> Cancellation:
        """Take a job that waits out of the queue, or mark one that runs."""
        ...

    def take_callbacks(
        self, queues: Sequence[str], *, limit: int, hold: float
    ) -> tuple[list[QueuedCallback], float | None]:
        """Callbacks that are due, kept from others for ``hold``; and the time until the next is due."""
        ...

    def callback_delivered(self, callback: QueuedCallback) -> None:
        """Forget a callback that was accepted."""
        ...

    def callback_postponed(self, callback: QueuedCallback, *, delay: float) -> None:
        """Keep a callback, as given, for another try."""
        ...

    def callback_given_up(self, callback: QueuedCallback) -> None:
        """Put a callback, as given, with the undelivered ones."""
        ...

    def dead_letters(self, queue: str) -> list[DeadLetter]:
        """The messages that will not be tried again, newest first."""
        ...

    def undelivered(self, queue: str) -> list[QueuedCallback]:
        """The callbacks that were given up, newest first."""
        ...

    def peek(self, queue: str, limit: int) -> list[bytes]:
        """The next messages in the producer's list, the oldest first."""
        ...

    def in_flight(self, queue: str) -> list[JobInFlight]:
        """The jobs that workers have and those that wait for another try."""
        ...

    def requeue(self, queue: str, letter: DeadLetter) -> RequeueAnswer:
        """Push a dead letter again, at the end of the line, although its id may have ended for good."""
        ...

    def drop(self, queue: str, letter: DeadLetter) -> bool:
        """Throw a dead letter away; False says that it is not there."""
        ...

    def waiting_callbacks(self, queue: str, limit: int | None = None) -> list[QueuedCallback]:
        """The callbacks that are not accepted yet and not given up: all, or those that are due next."""
        ...

    def replay(self, callback: QueuedCallback) -> bool:
        """Send a callback now, and for as long as a new one, whether it waits or was given up."""
        ...

    def depth(self, queue: str) -> QueueDepth:
        """How much the queue holds."""
        ...

    def close(self) -> None:
        """Let go of connections."""
        ...
