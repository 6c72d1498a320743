"""Keeps the leases of a worker's jobs, stops what was cancelled, and takes over from workers that fell silent."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence

from ourvidz_core.delivery.queue import CancelState
from ourvidz_core.errors import JobCancelled, QueueError, RepeatedlyInterrupted
from ourvidz_core.worker.parts import ActiveJob, ActiveJobs, Stopping, WorkerParts
from ourvidz_core.worker.settling import Settler

logger = logging.getLogger(__name__)

#: How often a worker that has jobs looks whether they shall stop. With the second that an engine gets to stop by
#: itself, a cancelled job is off the device within two.
_CANCEL_SECONDS = 0.5
#: Beyond what an engine may take to start and a job to run, a silence is no work.
_SILENCE_MARGIN_SECONDS = 60.0


class LeaseKeeper:
    """A thread that keeps a worker's jobs its own for as long as they get on."""

    def __init__(
        self, parts: WorkerParts, queues: Sequence[str], jobs: ActiveJobs, settler: Settler, stopping: Stopping
    ) -> None:
        self._queue = parts.queue
        self._settings = parts.settings
        self._vitals = parts.vitals
        self._queues = tuple(queues)
        self._jobs = jobs
        self._settler = settler
        self._stopping = stopping
        self._longest_silence = _longest_honest_silence(parts)
        self._thread = threading.Thread(target=self._keep, name="leases", daemon=True)

    def start(self) -> None:
        """Begin to keep them."""
        self._thread.start()

    def join(self, timeout: float) -> None:
        """Return when the thread has seen that the worker's end is complete."""
        self._thread.join(timeout)

    def _keep(self) -> None:
        lease = self._settings.lease_seconds
        due = time.monotonic() + lease / 3
        while not self._stopping.complete.wait(min(_CANCEL_SECONDS, lease / 3)):
            self._vitals.turn("leases")
            is_due = time.monotonic() >= due
            try:
                if is_due:
                    due = time.monotonic() + lease / 3
                    for active in self._jobs.all():
                        self._renew(active, lease)
                if is_due or len(self._jobs):
                    self._look_for_cancelled(lease)
                if is_due:
                    self._recover(lease)
                if is_due or len(self._jobs):
                    self._vitals.queue_answered()
            except QueueError as error:
                logger.warning("cancelled jobs and jobs of silent workers wait: %s", error)
            except Exception:  # whatever it is of, the leases of the other jobs go on
                logger.exception("cancelled jobs and jobs of silent workers wait")

    def _renew(self, active: ActiveJob, lease: float) -> None:
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
        elif active in self._jobs:
            logger.warning("job %s is somebody else's now; it is stopped here", active.claim.key)
            active.is_lost = True
            active.watch.cancelled.set()

    def _look_for_cancelled(self, lease: float) -> None:
        actives = {active.claim: active for active in self._jobs.all()}
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
                self._settler.end_unrun(cancellation.claim, JobCancelled("the job was cancelled before it ran"))

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
            self._settler.end_unrun(claim, error)


def _longest_honest_silence(parts: WorkerParts) -> float:
    timeouts = {job_type.name: job_type.timeout_seconds for job_type in parts.registry.job_types}
    longest = max({**timeouts, **parts.settings.job_timeouts_seconds}.values(), default=0.0)
    return longest + parts.settings.engine_start_seconds + _SILENCE_MARGIN_SECONDS
