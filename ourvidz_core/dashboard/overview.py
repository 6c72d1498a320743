"""One reading of everything that an operator looks at: queues, workers, ended jobs, dead letters."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

from attrs import frozen

from ourvidz_core.delivery.board import Board, FinishedJob, WorkerStatus
from ourvidz_core.delivery.queue import DeadLetter, Queue, RequeueAnswer
from ourvidz_core.errors import PayloadError, QueueError
from ourvidz_core.observe.collectors import QueueFacts, facts_of
from ourvidz_core.redaction import redact
from ourvidz_core.wire.payloads import decode_message

#: Dead letters of a queue that are shown; there may be any number.
SHOWN_LETTERS = 50
#: Their list is read whole, so it is read again only when its length has changed, or now and then.
_LETTERS_SECONDS = 15.0
_REASON_CHARACTERS = 500


@frozen(kw_only=True)
class DeadJob:
    """A dead letter as it is shown: without its message, which holds a prompt."""

    queue: str
    #: What identifies this letter, also beside others of the same job.
    letter: str
    job_id: str | None
    #: Empty where the message does not say.
    job_type: str
    error_type: str
    reason: str
    #: ISO 8601, UTC.
    buried_at: str


@frozen(kw_only=True)
class Overview:
    """What was true at one moment. Times are seconds since the epoch."""

    at: float
    queues: dict[str, QueueFacts]
    workers: tuple[WorkerStatus, ...]
    #: The newest first.
    recent: tuple[FinishedJob, ...]
    #: The newest of each queue first, at most ``SHOWN_LETTERS`` of each.
    dead: tuple[DeadJob, ...]


class Reader:
    """Reads overviews, and puts dead letters back. Only :meth:`requeue` and :meth:`preview` are thread-safe."""

    def __init__(self, queue: Queue, board: Board, names: Sequence[str]) -> None:
        self._queue = queue
        self._board = board
        self._names = tuple(names)
        self._letters: dict[str, tuple[float, int, tuple[DeadJob, ...]]] = {}

    def read(self) -> Overview:
        """The queues that were named and those that workers serve, and all that is on the board.

        :raises QueueError: Redis does not say.
        """
        with _understood():
            workers = tuple(self._board.workers())
            served = sorted({name for worker in workers for name in worker.queues} - set(self._names))
            queues = {name: facts_of(self._queue, name) for name in (*self._names, *served)}
            return Overview(
                at=time.time(),
                queues=queues,
                workers=workers,
                recent=tuple(self._board.recent()),
                dead=tuple(letter for name, facts in queues.items() for letter in self._dead(name, facts.depth.dead)),
            )

    def requeue(self, queue: str, letter: str) -> RequeueAnswer:
        """Let the dead letter that :attr:`DeadJob.letter` names run again.

        :raises QueueError: Redis does not answer.
        """
        with _understood():
            for known in self._queue.dead_letters(queue):
                if _name_of(known) == letter:
                    return self._queue.requeue(queue, known)
        return RequeueAnswer.ABSENT

    def preview(self, job_id: str) -> bytes | None:
        """The newest preview of a job, or None.

        :raises QueueError: Redis does not answer.
        """
        return self._board.preview(job_id)

    def _dead(self, queue: str, count: int) -> tuple[DeadJob, ...]:
        now = time.monotonic()
        read_at, known, shown = self._letters.get(queue, (0.0, 0, ()))
        if count and (count != known or now - read_at > _LETTERS_SECONDS):
            shown = tuple(_shown(queue, letter) for letter in self._queue.dead_letters(queue)[:SHOWN_LETTERS])
            self._letters[queue] = (now, count, shown)
        return shown if count else ()


@contextlib.contextmanager
def _understood() -> Iterator[None]:
    """What somebody else wrote into the books is an error of theirs, and nothing that ends whoever reads on."""
    try:
        yield
    except (ValueError, LookupError, TypeError) as error:
        raise QueueError(f"the books in Redis hold what no worker of this version wrote: {error!r:.200}") from error


def _shown(queue: str, letter: DeadLetter) -> DeadJob:
    return DeadJob(
        queue=queue,
        letter=_name_of(letter),
        job_id=letter.job_id,
        job_type=_type_of(letter.raw),
        error_type=letter.error_type,
        reason=redact(letter.reason)[:_REASON_CHARACTERS],
        buried_at=letter.buried_at,
    )


def _name_of(letter: DeadLetter) -> str:
    return hashlib.sha256(letter.raw + letter.buried_at.encode()).hexdigest()[:24]


def _type_of(raw: bytes) -> str:
    try:
        job_type: Any = decode_message(raw).get("type")
    except PayloadError:
        return ""
    return job_type[:100] if isinstance(job_type, str) else ""
