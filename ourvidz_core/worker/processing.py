"""Sends the ``processing`` callback: once, on the first try, and never when it could be too late."""

from __future__ import annotations

import logging
import time
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import wait as wait_for_futures

from ourvidz_core.delivery.callbacks import CallbackClient
from ourvidz_core.errors import CallbackError
from ourvidz_core.wire.callbacks import Callback
from ourvidz_core.wire.jobs import Job
from ourvidz_core.worker.parts import ActiveJob
from ourvidz_core.worker.reports import processing_report

logger = logging.getLogger(__name__)


class ProcessingReports:
    """Threads that send ``processing`` beside the work."""

    def __init__(self, callbacks: CallbackClient) -> None:
        self._callbacks = callbacks
        self._senders = ThreadPoolExecutor(2, thread_name_prefix="processing")

    def send(self, active: ActiveJob, job: Job) -> None:
        """Begin to send it. Only on the first try: after a terminal report it would set the job back."""
        if active.claim.attempt == 1:
            report = processing_report(job, active.attempt_facts)
            active.processing = self._senders.submit(self._send, active, report)

    def wait(self, active: ActiveJob, timeout: float | None = None) -> None:
        """Return when it is over, one way or the other."""
        if active.processing is not None:
            wait_for_futures([active.processing], timeout=timeout)

    def close(self) -> None:
        """Send no more."""
        self._senders.shutdown(wait=False, cancel_futures=True)

    def _send(self, active: ActiveJob, callback: Callback) -> None:
        def is_ours() -> bool:
            # Whoever was frozen until the lease ran out must not report after another worker's terminal report.
            return not active.is_lost and time.monotonic() < active.held_until

        if not is_ours():
            return
        callback_id = f"{callback.job_id}-processing"
        try:
            self._callbacks.send(callback_id, callback.job_id, callback.to_bytes(), may_send=is_ours)
        except CallbackError as error:
            logger.warning("job %s: its processing callback was not accepted: %s", callback.job_id, error)
