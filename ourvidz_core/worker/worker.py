"""The worker: claims jobs, keeps their leases, settles their outcomes with the queue, and drains.

Each claimed job has a thread of its own. They take turns at the engine, so while one
generates, the next fetches its references and the one before is uploaded.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for_futures
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, TypeVar

import attrs
from attrs import field, frozen

from ourvidz_core.delivery.callbacks import CallbackClient, retry_delay
from ourvidz_core.delivery.queue import CancelState, Claim, DeadLetter, FinishAnswer, Queue, QueuedCallback
from ourvidz_core.delivery.spool import Ending, NoSpool, Spool
from ourvidz_core.errors import (
    CallbackError,
    JobCancelled,
    JobError,
    OutOfMemory,
    PayloadError,
    QueueError,
    QueueUnavailable,
    RepeatedlyInterrupted,
)
from ourvidz_core.plugins.registry import Registry
from ourvidz_core.settings import Settings
from ourvidz_core.wire import events
from ourvidz_core.wire.callbacks import Callback
from ourvidz_core.wire.jobs import Job
from ourvidz_core.worker.dispatcher import CallbackDispatcher
from ourvidz_core.worker.reports import attempt_facts, processing_report, unrun_report
from ourvidz_core.worker.runner import JobRunner, Outcome, Watch
from ourvidz_core.worker.slot import EngineSlot
from ourvidz_core.worker.workspace import Workspace

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")

#: One job fetches, one generates, one is uploaded.
MAX_ACTIVE = 3
#: How long before the engine is free the next job is claimed, to fetch its references meanwhile.
#: Not sooner: until then another worker may take it and start at once.
PREFETCH_SECONDS = 3.0
_IDLE_SECONDS = 2.0
#: How often a worker that has jobs looks whether they shall stop. With the second that an engine gets to stop by
#: itself, a cancelled job is off the device within two.
_CANCEL_SECONDS = 0.5
#: Beyond what an engine may take to start and a job to run, a silence is no work.
_SILENCE_MARGIN_SECONDS = 60.0
_LONGEST_BACKOFF = 10.0


class Until(StrEnum):
    """When a worker ends by itself."""

    STOPPED = "stopped"
    ONE_JOB = "one job"
    DRAINED = "drained"


@attrs.define(kw_only=True, eq=False)
class _Active:
    """A job that this worker works on."""

    claim: Claim
    watch: Watch
    is_generated: bool = False
    is_lost: bool = False
    is_cancelled: bool = False
    #: Until then nobody else can have taken the job.
    held_until: float
    #: When the job last got on.
    last_sign: float = field(factory=time.monotonic)
    processing: Future[None] | None = None
    thread: threading.Thread | None = None


@frozen(kw_only=True)
class WorkerParts:
    """What a worker is made of; each can be a double."""

    queue: Queue
    callbacks: CallbackClient
    runner: JobRunner
    slot: EngineSlot
    registry: Registry
    workspace: Workspace
    settings: Settings = field(repr=False)
    spool: Spool = field(factory=NoSpool)


class Worker:
    """Works on the jobs of some queues until it is told to stop."""

    def __init__(self, parts: WorkerParts, queues: Sequence[str]) -> None:
        self._parts = parts
        self._queue = parts.queue
        self._settings = parts.settings
        self._queues = tuple(queues)
        self._active: dict[int, _Active] = {}
        self._changed = threading.Condition()
        self._stopping = threading.Event()
        self._handing_back = threading.Event()
        self._closed = threading.Event()
        self._random = random.Random()
        self._dispatcher = CallbackDispatcher(
            parts.queue,
            queues,
            parts.callbacks,
            first_retry=parts.settings.callback_retry_seconds,
            give_up=parts.settings.callback_give_up_seconds,
            request_timeout=parts.settings.callback_timeout_seconds,
        )
        self._senders = ThreadPoolExecutor(2, thread_name_prefix="processing")
        self._longest_silence = self._longest_honest_silence()

    def run(self, until: Until = Until.STOPPED) -> None:
        """Work until ``until``, or until :meth:`stop`. Returns when nothing of this worker runs any more."""
        self._replay_spool()
        self._dispatcher.start()
        keeper = threading.Thread(target=self._keep, name="leases", daemon=True)
        keeper.start()
        logger.info("worker %s takes jobs from %s", self._settings.worker_name, ", ".join(self._queues))
        try:
            self._claim_until(until)
            self._finish_active()
            if until is not Until.STOPPED and not self._stopping.is_set():
                self._wait_for_callbacks()
        finally:
            self._handing_back.set()
            self._cancel_active()
            self._finish_active()
            self._closed.set()
            self._dispatcher.close()
            self._senders.shutdown(wait=False, cancel_futures=True)
            keeper.join(timeout=5.0)

    def stop(self) -> None:
        """Take no more jobs, finish those at hand within the grace time, then hand them back.

        Called a second time, it hands them back at once.
        """
        if self._stopping.is_set():
            self._handing_back.set()
            self._cancel_active()
        else:
            grace = threading.Timer(self._settings.drain_seconds, self.stop)
            grace.daemon = True
            grace.start()
        self._stopping.set()
        with self._changed:
            self._changed.notify_all()

    def _replay_spool(self) -> None:
        try:
            self._parts.spool.replay(self._queue)
        except QueueError as error:
            logger.warning("what dead workers left in the spool waits for the next start: %s", error)

    def _longest_honest_silence(self) -> float:
        timeouts = {job_type.name: job_type.timeout_seconds for job_type in self._parts.registry.job_types}
        longest = max({**timeouts, **self._settings.job_timeouts_seconds}.values(), default=0.0)
        return longest + self._settings.engine_start_seconds + _SILENCE_MARGIN_SECONDS

    # -- claiming

    def _claim_until(self, until: Until) -> None:
        backoff = 0.0
        while not self._stopping.is_set():
            if not self._may_claim():
                with self._changed:
                    self._changed.wait(0.1)
                continue
            try:
                asked_at = time.monotonic()
                claim = self._queue.claim(
                    self._queues, worker=self._settings.worker_name, lease=self._settings.lease_seconds
                )
                if claim is not None:
                    if claim.is_cancelled:
                        self._end_unrun(claim, JobCancelled("the job was cancelled before it ran"))
                    else:
                        self._begin(claim, held_until=asked_at + self._settings.lease_seconds)
                    if until is Until.ONE_JOB:
                        return
                elif until is Until.DRAINED and not self._active and self._is_drained():
                    return
                else:
                    self._queue.wait(self._queues, 0.1 if until is Until.DRAINED else _IDLE_SECONDS)
                backoff = 0.0
            except QueueError as error:
                backoff = min(max(backoff * 2, 0.5), _LONGEST_BACKOFF)
                logger.warning("no jobs can be taken, next try in %.1f s: %s", backoff, error)
                self._stopping.wait(backoff)

    def _may_claim(self) -> bool:
        active = list(self._active.values())
        before_generation = sum(not job.is_generated for job in active)
        if len(active) >= MAX_ACTIVE or before_generation > 1:
            return False
        if before_generation == 1 and not self._parts.slot.is_nearly_free(PREFETCH_SECONDS):
            return False
        free_mb = min(self._parts.workspace.free_mb(), self._parts.spool.free_mb())
        if free_mb < self._settings.min_free_disk_mb:
            logger.error(
                "no jobs are taken: %.0f MB of disk are free and OURVIDZ_MIN_FREE_DISK_MB is %.0f",
                free_mb,
                self._settings.min_free_disk_mb,
            )
            self._stopping.wait(5.0)
            return False
        return True

    def _is_drained(self) -> bool:
        depths = [self._queue.depth(queue) for queue in self._queues]
        return not any(depth.waiting or depth.retrying or depth.in_flight for depth in depths)

    def _begin(self, claim: Claim, held_until: float) -> None:
        active = _Active(claim=claim, watch=Watch(), held_until=held_until)
        active.watch = attrs.evolve(
            active.watch,
            on_job=lambda job: self._send_processing(active, job),
            on_progress=lambda stage, step, total: _note_sign(active),
            on_generated=lambda: self._mark_generated(active),
            on_stored=lambda asset: _note_sign(active),
        )
        active.thread = threading.Thread(target=self._work_on, args=[active], name=f"job-{claim.token}", daemon=True)
        with self._changed:
            self._active[claim.token] = active
        active.thread.start()

    def _mark_generated(self, active: _Active) -> None:
        _note_sign(active)
        with self._changed:
            active.is_generated = True
            self._changed.notify_all()

    def _send_processing(self, active: _Active, job: Job) -> None:
        # Once, on the first try only: after a terminal report it would set the job back.
        if active.claim.attempt == 1:
            report = processing_report(job, _attempt_facts(active.claim))
            active.processing = self._senders.submit(self._send_once, active, report)

    def _send_once(self, active: _Active, callback: Callback) -> None:
        def is_ours() -> bool:
            # Whoever was frozen until the lease ran out must not report after another worker's terminal report.
            return not active.is_lost and time.monotonic() < active.held_until

        if not is_ours():
            return
        callback_id = f"{callback.job_id}-processing"
        try:
            self._parts.callbacks.send(callback_id, callback.job_id, callback.to_bytes(), may_send=is_ours)
        except CallbackError as error:
            logger.warning("job %s: its processing callback was not accepted: %s", callback.job_id, error)

    # -- one job

    def _work_on(self, active: _Active) -> None:
        claim = active.claim
        try:
            outcome = self._parts.runner.run(
                claim.raw,
                attempt=claim.attempt,
                attempts=_attempt_facts(claim),
                watch=active.watch,
            )
            if active.processing is not None:
                # It must be over before a terminal report can go out. A job that is handed back has none.
                wait_for_futures([active.processing], timeout=0.0 if self._is_handed_back(active, outcome) else None)
            if active.is_lost:
                logger.warning("job %s was lost to another worker; nothing is reported", claim.key)
            else:
                self._settle(active, outcome)
        except QueueUnavailable as error:
            logger.warning("job %s is left to the spool, or to the end of its lease: %s", claim.key, error)
        except Exception:
            # The lease runs out and the job is tried again; there is nothing better to do with it here.
            logger.exception("job %s could not be settled", claim.key)
        finally:
            with self._changed:
                self._active.pop(claim.token, None)
                self._changed.notify_all()

    def _settle(self, active: _Active, outcome: Outcome) -> None:
        claim, error = active.claim, outcome.error
        if self._is_handed_back(active, outcome):
            self._insist(active, lambda: self._queue.hand_back(claim, delay=0.0, counts_as_attempt=False))
            logger.info("job %s was handed back", claim.key)
        elif error is not None and self._may_run_again(claim, error):
            self._retry(active, outcome, error)
        else:
            self._finish(active, outcome)

    def _is_handed_back(self, active: _Active, outcome: Outcome) -> bool:
        return isinstance(outcome.error, JobCancelled) and self._handing_back.is_set() and not active.is_cancelled

    def _may_run_again(self, claim: Claim, error: JobError) -> bool:
        if not error.is_transient or claim.attempt >= self._settings.max_attempts:
            return False
        # The second try has the device to itself, in a fresh engine. Where that was too little, a third is the same.
        has_been = any(reason.startswith(f"{OutOfMemory.__name__}:") for reason in claim.reasons)
        return not (isinstance(error, OutOfMemory) and has_been)

    def _retry(self, active: _Active, outcome: Outcome, error: JobError) -> None:
        claim = active.claim
        delay = retry_delay(
            claim.attempt, first_seconds=max(self._settings.retry_delay_seconds, 0.01), random=self._random
        )
        reason = f"{error.error_type}: {error.message}"
        self._insist(active, lambda: self._queue.hand_back(claim, delay=delay, reason=reason))
        logger.warning("job %s runs again in %.1f s after attempt %s: %s", claim.key, delay, claim.attempt, reason)
        if outcome.job_id is not None and outcome.job_type is not None:
            self._parts.registry.report(
                events.JobRetried(
                    job_id=outcome.job_id,
                    job_type=outcome.job_type,
                    error_type=error.error_type,
                    message=error.message,
                    attempt=claim.attempt,
                    delay_seconds=delay,
                )
            )

    def _finish(self, active: _Active, outcome: Outcome) -> None:
        claim, error = active.claim, outcome.error
        letter = None
        # What another producer or another day could mend is kept for a person to look at.
        if error is not None and (isinstance(error, PayloadError) or error.is_transient or outcome.callback is None):
            letter = self._dead_letter(claim, outcome.job_id, error)
        ending = Ending(
            claim=claim,
            # A producer may push a failed job again; what somebody stopped stays stopped.
            is_final=error is None or isinstance(error, JobCancelled),
            callback=self._queued(claim, outcome.callback) if outcome.callback is not None else None,
            callback_delay=self._callback_delay(outcome.job),
            dead_letter=letter,
        )
        self._parts.spool.keep(ending)
        answer = self._insist(active, lambda: ending.tell(self._queue))
        self._parts.spool.forget(ending)
        self._dispatcher.wake()
        if answer is FinishAnswer.FENCED:
            logger.warning("job %s is somebody else's now; nothing was reported", claim.key)
            return
        if error is None:
            logger.info("job %s (%s) completed in %.1f s", claim.key, outcome.job_type, outcome.seconds)
            return
        logger.error("job %s (%s) failed: %s: %s", claim.key, outcome.job_type, error.error_type, error.message)
        self._parts.registry.report(
            events.JobFailed(
                job_id=outcome.job_id or claim.key,
                job_type=outcome.job_type or "",
                error_type=error.error_type,
                message=error.message,
            )
        )

    def _callback_delay(self, job: Job | None) -> float:
        """A terminal report that is too early finds the client's rows not linked yet."""
        least = self._settings.callback_min_age_seconds
        if job is None or job.created_at is None:
            return least
        age = (datetime.now(UTC) - job.created_at).total_seconds()
        return min(max(least - age, 0.0), least)  # a producer's clock may be wrong either way

    def _queued(self, claim: Claim, callback: Callback) -> QueuedCallback:
        return QueuedCallback(
            queue=claim.queue,
            callback_id=f"{callback.job_id}-{claim.token}",
            job_id=callback.job_id,
            body=callback.to_bytes(),
        )

    def _dead_letter(self, claim: Claim, job_id: str | None, error: JobError) -> DeadLetter:
        return DeadLetter(
            raw=claim.raw,
            job_id=job_id,
            error_type=error.error_type,
            reason=error.message,
            buried_at=datetime.now(UTC).isoformat(),
            worker=self._settings.worker_name,
        )

    def _insist(self, active: _Active, ask: Callable[[], Answer]) -> Answer:
        """Ask the queue until it answers: the work is done and must not be lost to a short outage."""
        backoff = 0.1
        while True:
            try:
                return ask()
            except QueueUnavailable as error:
                if self._handing_back.is_set() or active.is_lost:
                    raise
                logger.warning("job %s waits to be settled: %s", active.claim.key, error)
                time.sleep(backoff)
                backoff = min(backoff * 2, _LONGEST_BACKOFF)

    # -- leases

    def _keep(self) -> None:
        lease = self._settings.lease_seconds
        due = time.monotonic() + lease / 3
        while not self._closed.wait(min(_CANCEL_SECONDS, lease / 3)):
            is_due = time.monotonic() >= due
            if is_due:
                due = time.monotonic() + lease / 3
                for active in list(self._active.values()):
                    self._renew(active, lease)
            try:
                if is_due or self._active:
                    self._look_for_cancelled(lease)
                if is_due:
                    self._recover(lease)
            except QueueError as error:
                logger.warning("cancelled jobs and jobs of silent workers wait: %s", error)

    def _look_for_cancelled(self, lease: float) -> None:
        actives = {active.claim: active for active in list(self._active.values())}
        requests = self._queue.cancel_requests(self._queues, list(actives))
        for claim in requests.running:
            if not actives[claim].is_cancelled:
                logger.warning("job %s was cancelled; it is stopped here", claim.key)
                actives[claim].is_cancelled = True
                actives[claim].watch.cancelled.set()
        for queue, key in requests.fresh:
            cancellation = self._queue.cancel(queue, key, worker=self._settings.worker_name, lease=lease)
            if cancellation.state is CancelState.TAKEN and cancellation.claim is not None:
                logger.warning("job %s was cancelled before it ran", key)
                self._end_unrun(cancellation.claim, JobCancelled("the job was cancelled before it ran"))

    def _renew(self, active: _Active, lease: float) -> None:
        silence = time.monotonic() - active.last_sign
        if silence > self._longest_silence:
            # Whatever holds it up is here, in this process: another worker shall have it.
            logger.error("job %s has not got on for %.0f s; its lease is not renewed", active.claim.key, silence)
            return
        asked_at = time.monotonic()
        try:
            is_ours = self._queue.renew(active.claim, lease=lease)
        except QueueError as error:
            logger.warning("the lease of job %s was not renewed: %s", active.claim.key, error)
            return
        if is_ours:
            active.held_until = asked_at + lease
        elif active.claim.token in self._active:
            logger.warning("job %s is somebody else's now; it is stopped here", active.claim.key)
            active.is_lost = True
            active.watch.cancelled.set()

    def _recover(self, lease: float) -> None:
        recovery = self._queue.recover(
            self._queues,
            worker=self._settings.worker_name,
            lease=lease,
            delay=self._settings.retry_delay_seconds,
            max_interruptions=self._settings.max_attempts,
        )
        for key in recovery.recovered:
            logger.warning("job %s runs again: its worker stopped responding", key)
        for claim in recovery.given_up:
            # It ended as many workers as are allowed, and would end this one too.
            error = RepeatedlyInterrupted(
                f"{self._settings.max_attempts} workers stopped responding while they worked on this job"
            )
            self._end_unrun(claim, error)

    def _end_unrun(self, claim: Claim, error: JobError) -> None:
        """Report a job that shall not run as failed."""
        callback = unrun_report(claim.raw, error, attempts=_attempt_facts(claim))
        self._finish(
            _Active(claim=claim, watch=Watch(), held_until=time.monotonic()),
            Outcome(
                callback=callback,
                job_id=callback.job_id if callback else None,
                job_type=callback.metadata.get("job_type") if callback else None,
                error=error,
            ),
        )

    # -- ending

    def _cancel_active(self) -> None:
        for active in list(self._active.values()):
            active.watch.cancelled.set()

    def _finish_active(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._active)

    def _wait_for_callbacks(self) -> None:
        while not self._stopping.is_set():
            try:
                if self._dispatcher.is_idle:
                    return
            except QueueError as error:
                logger.warning("callbacks wait: %s", error)
            self._stopping.wait(0.05)


def _attempt_facts(claim: Claim) -> dict[str, Any]:
    return attempt_facts(claim.attempt, claim.reasons, claim.token)


def _note_sign(active: _Active) -> None:
    active.last_sign = time.monotonic()
