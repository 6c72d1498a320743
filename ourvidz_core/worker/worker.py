"""The worker: claims jobs, gives each a thread, and drains.

The threads take turns at the engine, so while one job generates, the next fetch their
references and those before are finished and uploaded.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from enum import StrEnum

import attrs

from ourvidz_core.delivery.queue import Claim
from ourvidz_core.errors import JobCancelled, PayloadError, QueueError, QueueUnavailable
from ourvidz_core.logs import job_context
from ourvidz_core.redaction import redact
from ourvidz_core.wire.jobs import Job
from ourvidz_core.wire.payloads import decode_message
from ourvidz_core.wire.states import WorkerState
from ourvidz_core.worker.dispatcher import CallbackDispatcher
from ourvidz_core.worker.leases import LeaseKeeper
from ourvidz_core.worker.parts import ActiveJob, ActiveJobs, Stopping, WorkerParts
from ourvidz_core.worker.processing import ProcessingReports
from ourvidz_core.worker.reports import prompts_of
from ourvidz_core.worker.settling import Settler
from ourvidz_core.worker.warming import warm_up

logger = logging.getLogger(__name__)

#: One job generates, the next are made ready, the others are finished and uploaded, which may take longer than to
#: generate them.
MAX_ACTIVE = 8
MAX_BEFORE_GENERATION = 4
#: How long before the device has done all jobs at hand the next is claimed, to fetch its references meanwhile.
#: Not sooner: until then another worker may take it and start at once.
PREFETCH_SECONDS = 3.0
_IDLE_SECONDS = 2.0
#: A job of a type that cannot be done here is offered again after this long, to whoever asks first then.
LEFT_SECONDS = 30.0
_LONGEST_BACKOFF = 10.0


class Until(StrEnum):
    """When a worker ends by itself."""

    STOPPED = "stopped"
    ONE_JOB = "one job"
    DRAINED = "drained"


class Worker:
    """Works on the jobs of some queues until it is told to stop."""

    def __init__(self, parts: WorkerParts, queues: Sequence[str]) -> None:
        settings = parts.settings
        self._parts = parts
        self._queue = parts.queue
        self._settings = settings
        self._queues = tuple(queues)
        self._jobs = ActiveJobs()
        self._stopping = Stopping()
        self._has_begun = False
        self._dispatcher = CallbackDispatcher(
            parts.queue,
            queues,
            parts.callbacks,
            first_retry=settings.callback_retry_seconds,
            give_up=settings.callback_give_up_seconds,
            request_timeout=settings.callback_timeout_seconds,
            report=parts.registry.report,
        )
        self._processing = ProcessingReports(parts.callbacks)
        self._settler = Settler(parts, self._stopping, on_callback=self._dispatcher.wake)
        self._keeper = LeaseKeeper(parts, queues, self._jobs, self._settler, self._stopping)

    def run(self, until: Until = Until.STOPPED) -> None:
        """Work until ``until``, or until :meth:`stop`. Returns when nothing of this worker runs any more."""
        self._replay_spool()
        self._dispatcher.start()
        self._keeper.start()
        if self._settings.preload:
            warm_up(self._parts, self._queues, self._stopping.begun)
        logger.info("worker %s takes jobs from %s", self._settings.worker_name, ", ".join(self._queues))
        try:
            self._has_begun = True
            self._claim_until(until)
            self._parts.vitals.end("claims")
            self._jobs.wait_until_none()
            if until is not Until.STOPPED and not self._stopping.begun.is_set():
                self._wait_for_callbacks()
        finally:
            self._stopping.handing_back.set()
            self._jobs.cancel()
            self._jobs.wait_until_none()
            self._stopping.complete.set()
            self._dispatcher.close()
            self._processing.close()
            self._keeper.join(timeout=5.0)

    @property
    def state(self) -> WorkerState:
        """What it is doing; may be asked from any thread."""
        if self._stopping.begun.is_set() or self._stopping.handing_back.is_set():
            return WorkerState.DRAINING
        if not self._has_begun:
            return WorkerState.STARTING
        return WorkerState.WORKING if len(self._jobs) else WorkerState.IDLE

    def stop(self) -> None:
        """Take no more jobs, finish those at hand within the grace time, then hand them back.

        Called a second time, it hands them back at once.
        """
        if self._stopping.begun.is_set():
            self._stopping.handing_back.set()
            self._jobs.cancel()
        else:
            grace = threading.Timer(self._settings.drain_seconds, self.stop)
            grace.daemon = True
            grace.start()
        self._stopping.begun.set()
        self._jobs.wake()

    def _replay_spool(self) -> None:
        try:
            self._parts.spool.replay(self._queue)
        except QueueError as error:
            logger.warning("what dead workers left in the spool waits for the next start: %s", error)

    # -- claiming

    def _claim_until(self, until: Until) -> None:
        backoff = 0.0
        while not self._stopping.begun.is_set():
            self._parts.vitals.turn("claims")
            if not self._may_claim():
                self._jobs.wait(0.1)
                continue
            try:
                asked_at = time.monotonic()
                claim = self._queue.claim(
                    self._queues, worker=self._settings.worker_name, lease=self._settings.lease_seconds
                )
                self._parts.vitals.queue_answered()
                if claim is not None and self._leaves(claim):
                    self._queue.hand_back(claim, delay=LEFT_SECONDS, counts_as_attempt=False)
                elif claim is not None:
                    if claim.is_cancelled:
                        self._settler.end_unrun(claim, JobCancelled("the job was cancelled before it ran"))
                    else:
                        held_until = asked_at + self._settings.lease_seconds
                        self._begin(ActiveJob(claim=claim, asked_at=asked_at, held_until=held_until))
                    if until is Until.ONE_JOB:
                        return
                elif until is Until.DRAINED and not len(self._jobs) and self._is_drained():
                    return
                else:
                    self._queue.wait(self._queues, 0.1 if until is Until.DRAINED else _IDLE_SECONDS)
                backoff = 0.0
            except QueueError as error:
                backoff = min(max(backoff * 2, 0.5), _LONGEST_BACKOFF)
                logger.warning("no jobs can be taken, next try in %.1f s: %s", backoff, error)
                self._stopping.begun.wait(backoff)

    def _may_claim(self) -> bool:
        active = self._jobs.all()
        coming = [job.job_type for job in active if not job.is_generated]
        if len(active) >= MAX_ACTIVE or len(coming) >= MAX_BEFORE_GENERATION:
            return False
        if coming:
            seconds = self._parts.slot.seconds_until_free(coming)
            if seconds is None or seconds > PREFETCH_SECONDS:
                return False
        free_mb = min(self._parts.workspace.free_mb(), self._parts.spool.free_mb())
        if free_mb < self._settings.min_free_disk_mb:
            logger.error(
                "no jobs are taken: %.0f MB of disk are free and OURVIDZ_MIN_FREE_DISK_MB is %.0f",
                free_mb,
                self._settings.min_free_disk_mb,
            )
            self._stopping.begun.wait(5.0)
            return False
        return True

    def _is_drained(self) -> bool:
        depths = [self._queue.depth(queue) for queue in self._queues]
        return not any(depth.waiting or depth.retrying or depth.in_flight for depth in depths)

    def _leaves(self, claim: Claim) -> bool:
        """Whether the job is of a type that cannot be done here."""
        if not self._parts.impossible:
            return False
        try:
            job_type = decode_message(claim.raw).get("type")
        except PayloadError:
            return False  # its report says what is wrong with it
        reason = self._parts.impossible.get(job_type) if isinstance(job_type, str) else None
        if reason is not None:
            logger.info("job %s (%s) is left to other workers: %s", claim.key, job_type, reason)
        return reason is not None

    # -- one job

    def _begin(self, active: ActiveJob) -> None:
        active.watch = attrs.evolve(
            active.watch,
            on_job=lambda job: self._report_begun(active, job),
            on_progress=lambda stage, step, total: active.note_sign(),
            on_generated=lambda: self._jobs.mark_generated(active),
            on_stored=lambda asset: active.note_sign(),
        )
        self._jobs.add(active)
        thread = threading.Thread(target=self._work_on, args=[active], name=f"job-{active.claim.key}", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # a limit of processes; nobody must wait for a job that no thread has
            self._jobs.remove(active)
            raise

    def _report_begun(self, active: ActiveJob, job: Job) -> None:
        active.job_type = job.job_type
        if self._settings.log_prompts:
            logger.info("job %s (%s) asks for: %s", job.id, job.job_type, job.prompt)
        self._processing.send(active, job)

    def _work_on(self, active: ActiveJob) -> None:
        with job_context(active.claim.key), redact.without_prompts(*prompts_of(active.claim.raw)):
            self._take(active)

    def _take(self, active: ActiveJob) -> None:
        claim = active.claim
        try:
            outcome = self._parts.runner.run(
                claim.raw,
                attempt=claim.attempt,
                attempts=active.attempt_facts,
                watch=active.watch,
                queue=claim.queue,
                asked_at=active.asked_at,
            )
            # It must be over before a terminal report can go out. A job that is handed back has none.
            self._processing.wait(active, 0.0 if self._settler.is_handed_back(active, outcome) else None)
            if active.is_lost:
                self._settler.release(active, "lost to another worker")
            else:
                self._settler.settle(active, outcome)
        except QueueUnavailable as error:
            logger.warning("the queue is away: %s", error)
            self._settler.release(active, "left to the spool, or to the end of its lease")
        except Exception:
            # The lease runs out and the job is tried again; there is nothing better to do with it here.
            logger.exception("job %s could not be settled", claim.key)
            self._settler.release(active, "left to the end of its lease")
        finally:
            self._jobs.remove(active)

    # -- ending

    def _wait_for_callbacks(self) -> None:
        while not self._stopping.begun.is_set():
            try:
                if self._dispatcher.is_idle:
                    return
            except QueueError as error:
                logger.warning("callbacks wait: %s", error)
            self._stopping.begun.wait(0.05)
