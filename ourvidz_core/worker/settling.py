"""Settles outcomes with the queue: finished with a callback, to run again, or handed back."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TypeVar

from ourvidz_core.delivery.callbacks import retry_delay
from ourvidz_core.delivery.queue import Claim, DeadLetter, FinishAnswer, QueuedCallback
from ourvidz_core.delivery.spool import Ending
from ourvidz_core.errors import EngineLost, JobCancelled, JobError, OutOfMemory, PayloadError, QueueUnavailable
from ourvidz_core.wire import events
from ourvidz_core.wire.callbacks import Callback
from ourvidz_core.wire.jobs import Job
from ourvidz_core.worker.parts import ActiveJob, Stopping, WorkerParts
from ourvidz_core.worker.reports import unrun_report
from ourvidz_core.worker.runner import Outcome
from ourvidz_core.worker.usage import completion_record, worker_record

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")

#: Between two questions to a queue that does not answer.
_LONGEST_BACKOFF = 10.0


class Settler:
    """Tells the queue what became of a job, and asks until it answers. Thread-safe."""

    def __init__(self, parts: WorkerParts, stopping: Stopping, *, on_callback: Callable[[], None]) -> None:
        self._queue = parts.queue
        self._spool = parts.spool
        self._registry = parts.registry
        self._settings = parts.settings
        self._usage = parts.usage
        self._stopping = stopping
        self._on_callback = on_callback
        self._random = random.Random()

    def is_handed_back(self, active: ActiveJob, outcome: Outcome) -> bool:
        """Whether the worker's end stopped the job, and nobody who wants it stopped."""
        was_stopped = isinstance(outcome.error, JobCancelled)
        return was_stopped and self._stopping.handing_back.is_set() and not active.is_cancelled

    def settle(self, active: ActiveJob, outcome: Outcome) -> None:
        """Finish the job, let it run again, or hand it back.

        :raises QueueUnavailable: the queue is away and the worker ends; the outcome is in the spool.
        """
        claim, error = active.claim, outcome.error
        if self.is_handed_back(active, outcome):
            self._insist(active, lambda: self._queue.hand_back(claim, delay=0.0, counts_as_attempt=False))
            self.release(active, "handed back")
        elif error is not None and self._may_run_again(claim, error):
            self._retry(active, outcome, error)
        else:
            self._finish(active, outcome)

    def release(self, active: ActiveJob, reason: str) -> None:
        """Say that a job goes on elsewhere; nothing is reported of it here."""
        job = {"job_id": active.claim.key, "job_type": active.job_type}
        self._registry.report(events.JobReleased(**job, reason=reason))

    def end_unrun(self, claim: Claim, error: JobError) -> None:
        """Report a job that shall not run as failed."""
        active = ActiveJob(claim=claim, held_until=time.monotonic())
        callback = unrun_report(claim.raw, error, attempts=active.attempt_facts)
        self._finish(
            active,
            Outcome(
                callback=callback,
                job_id=callback.job_id if callback else None,
                job_type=callback.metadata.get("job_type") if callback else None,
                error=error,
            ),
        )

    @staticmethod
    def _is_anothers_fault(claim: Claim, error: JobError) -> bool:
        """Whether its engine died of another job, for the first time: the second time it may be this one after all."""
        has_been = any(reason.startswith(f"{EngineLost.__name__}:") for reason in claim.reasons)
        return isinstance(error, EngineLost) and not has_been

    def _may_run_again(self, claim: Claim, error: JobError) -> bool:
        if self._is_anothers_fault(claim, error):
            return True
        if not error.is_transient or claim.attempt >= self._settings.max_attempts:
            return False
        # The second try has the device to itself, in a fresh engine. Where that was too little, a third is the same.
        has_been = any(reason.startswith(f"{OutOfMemory.__name__}:") for reason in claim.reasons)
        return not (isinstance(error, OutOfMemory) and has_been)

    def _retry(self, active: ActiveJob, outcome: Outcome, error: JobError) -> None:
        claim = active.claim
        delay = retry_delay(
            claim.attempt, first_seconds=max(self._settings.retry_delay_seconds, 0.01), random=self._random
        )
        reason = f"{error.error_type}: {error.message}"
        counts = not self._is_anothers_fault(claim, error)
        self._insist(active, lambda: self._queue.hand_back(claim, delay=delay, reason=reason, counts_as_attempt=counts))
        self._registry.report(
            events.JobRetried(
                job_id=outcome.job_id or claim.key,
                job_type=outcome.job_type or "",
                error_type=error.error_type,
                message=error.message,
                attempt=claim.attempt,
                delay_seconds=delay,
            )
        )

    def _finish(self, active: ActiveJob, outcome: Outcome) -> None:
        claim, error = active.claim, outcome.error
        letter = None
        # What another producer or another day could mend is kept for a person to look at.
        if error is not None and (isinstance(error, PayloadError) or error.is_transient or outcome.callback is None):
            letter = self._dead_letter(claim, outcome.job_id, error)
        ending = Ending(
            claim=claim,
            # A producer may push a failed job again; what somebody stopped stays stopped.
            is_final=error is None or isinstance(error, JobCancelled),
            callback=_queued(claim, outcome.callback) if outcome.callback is not None else None,
            callback_delay=self._callback_delay(outcome.job),
            dead_letter=letter,
        )
        self._spool.keep(ending)
        answer = self._insist(active, lambda: ending.tell(self._queue))
        self._spool.forget(ending)
        self._on_callback()
        if answer is FinishAnswer.FENCED:
            self.release(active, "lost to another worker")
            return
        self._tell_usage(outcome)
        self._registry.report(outcome.as_event(key=claim.key, attempt=claim.attempt, is_dead_letter=letter is not None))

    def _tell_usage(self, outcome: Outcome) -> None:
        for record in (worker_record(self._settings.worker_name, outcome), completion_record(outcome)):
            if record is not None:
                self._usage.put(record)

    def _callback_delay(self, job: Job | None) -> float:
        """A terminal report that is too early finds the client's rows not linked yet."""
        least = self._settings.callback_min_age_seconds
        if job is None or job.created_at is None:
            return least
        age = (datetime.now(UTC) - job.created_at).total_seconds()
        return min(max(least - age, 0.0), least)  # a producer's clock may be wrong either way

    def _dead_letter(self, claim: Claim, job_id: str | None, error: JobError) -> DeadLetter:
        return DeadLetter(
            raw=claim.raw,
            job_id=job_id,
            error_type=error.error_type,
            reason=error.message,
            buried_at=datetime.now(UTC).isoformat(),
            worker=self._settings.worker_name,
        )

    def _insist(self, active: ActiveJob, ask: Callable[[], Answer]) -> Answer:
        """Ask the queue until it answers: the work is done and must not be lost to a short outage."""
        backoff = 0.1
        while True:
            try:
                return ask()
            except QueueUnavailable as error:
                if self._stopping.handing_back.is_set() or active.is_lost:
                    raise
                logger.warning("job %s waits to be settled: %s", active.claim.key, error)
                time.sleep(backoff)
                backoff = min(backoff * 2, _LONGEST_BACKOFF)


def _queued(claim: Claim, callback: Callback) -> QueuedCallback:
    return QueuedCallback(
        queue=claim.queue,
        callback_id=f"{callback.job_id}-{claim.token}",
        job_id=callback.job_id,
        body=callback.to_bytes(),
    )
