"""Delivers callbacks from the queue's books until the endpoint accepts them or they are given up."""

from __future__ import annotations

import json
import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import attrs

from ourvidz_core.delivery.callbacks import CallbackClient, retry_delay
from ourvidz_core.delivery.queue import Queue, QueuedCallback
from ourvidz_core.errors import CallbackRejected, CallbackUndelivered, QueueError
from ourvidz_core.logs import job_context
from ourvidz_core.wire.events import CallbackDelivered, CallbackRefused, Event

logger = logging.getLogger(__name__)

#: Callbacks in flight at once, so that one slow answer does not hold up the others.
PARALLEL = 4
_LONGEST_WAIT = 5.0
#: An endpoint that was refusing for an hour is asked less often, and for longer.
_PATIENT_AFTER_SECONDS = 3600.0
_PATIENT_WAIT_SECONDS = 3600.0


class CallbackDispatcher:
    """A thread that sends what is due. Any worker may deliver any callback."""

    def __init__(
        self,
        queue: Queue,
        queues: Sequence[str],
        client: CallbackClient,
        *,
        first_retry: float,
        give_up: float,
        request_timeout: float,
        report: Callable[[Event], None] = lambda event: None,
    ) -> None:
        self._queue = queue
        self._queues = tuple(queues)
        self._client = client
        self._report = report
        self._first_retry = first_retry
        self._give_up = give_up
        # Longer than a request can take, so that nobody sends the same one meanwhile.
        self._hold = 2 * request_timeout + 10
        self._wake = threading.Event()
        self._stopped = threading.Event()
        self._random = random.Random()
        self._thread = threading.Thread(target=self._loop, name="callbacks", daemon=True)
        self._pool = ThreadPoolExecutor(PARALLEL, thread_name_prefix="callback")

    def start(self) -> None:
        """Begin to deliver."""
        self._thread.start()

    def wake(self) -> None:
        """Say that a callback was added."""
        self._wake.set()

    @property
    def is_idle(self) -> bool:
        """Whether every callback there is was tried, and those left were refused."""
        return not any(
            self._queue.depth(queue).callbacks
            and not all(callback.failures for callback in self._queue.waiting_callbacks(queue))
            for queue in self._queues
        )

    def close(self, timeout: float = 20.0) -> None:
        """Finish the requests that are out and stop; the rest stays in the queue's books."""
        self._stopped.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout)
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _loop(self) -> None:
        while not self._stopped.is_set():
            try:
                taken, soonest = self._queue.take_callbacks(self._queues, limit=PARALLEL, hold=self._hold)
                list(self._pool.map(self._deliver, taken))
            except QueueError as error:
                logger.warning("callbacks wait: %s", error)
                taken, soonest = [], None
            except Exception:  # one row that cannot be read must not keep the others from going out
                logger.exception("callbacks wait")
                taken, soonest = [], None
            if not taken:
                self._wake.wait(_LONGEST_WAIT if soonest is None else min(soonest, _LONGEST_WAIT))
                self._wake.clear()

    def _deliver(self, callback: QueuedCallback) -> None:
        with job_context(callback.job_id, _facts_of(callback)["job_type"]):
            self._try_to_deliver(callback)

    def _try_to_deliver(self, callback: QueuedCallback) -> None:
        now = time.time()
        callback = attrs.evolve(callback, first_tried_at=callback.first_tried_at or now)
        started = time.monotonic()
        try:
            self._client.send(callback.callback_id, callback.job_id, callback.body)
        except CallbackRejected as error:
            self._settle_refusal(callback, str(error), started, is_final=True)
        except CallbackUndelivered as error:
            is_final = now - callback.first_tried_at >= self._give_up
            self._settle_refusal(callback, str(error), started, is_final=is_final, wait=error.retry_after_seconds)
        except Exception as error:  # a client's fault must not lose the callback
            logger.exception("callback of job %s could not be sent", callback.job_id)
            self._settle_refusal(callback, f"{type(error).__name__}: {error}", started, is_final=False)
        else:
            self._queue.callback_delivered(callback)
            self._report(
                CallbackDelivered(**_facts_of(callback), refusals=callback.failures, seconds=time.monotonic() - started)
            )

    def _settle_refusal(
        self, callback: QueuedCallback, reason: str, started: float, *, is_final: bool, wait: float | None = None
    ) -> None:
        callback = attrs.evolve(callback, failures=callback.failures + 1, reason=reason)
        seconds = time.monotonic() - started
        self._report(CallbackRefused(**_facts_of(callback), reason=reason, seconds=seconds, is_given_up=is_final))
        if is_final:
            logger.error(
                "callback of job %s is given up after %s tries: %s", callback.job_id, callback.failures, reason
            )
            self._queue.callback_given_up(callback)
            return
        is_old = time.time() - callback.first_tried_at >= _PATIENT_AFTER_SECONDS
        delay = retry_delay(
            callback.failures,
            first_seconds=self._first_retry,
            random=self._random,
            **({"ceiling_seconds": _PATIENT_WAIT_SECONDS} if is_old else {}),
        )
        delay = max(delay, wait or 0.0)
        logger.warning("callback of job %s goes out again in %.1f s: %s", callback.job_id, delay, reason)
        self._queue.callback_postponed(callback, delay=delay)


def _facts_of(callback: QueuedCallback) -> dict[str, Any]:
    """What an event says of a callback, read from its body: it may be of a job that another worker has done."""
    body = json.loads(callback.body)
    return {
        "job_id": callback.job_id,
        "job_type": str(body.get("metadata", {}).get("job_type") or ""),
        "status": str(body.get("status")),
    }
