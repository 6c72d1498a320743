"""Metrics that are read when somebody asks: what the worker does now, and what its queues hold."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from datetime import UTC, datetime
from enum import StrEnum

from attrs import field, frozen
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from ourvidz_core.delivery.board import WorkerStatus
from ourvidz_core.delivery.queue import Queue, QueueDepth
from ourvidz_core.errors import PayloadError
from ourvidz_core.observe import catalog
from ourvidz_core.observe.catalog import Spec
from ourvidz_core.wire.payloads import decode_message
from ourvidz_core.wire.states import EngineState, WorkerState

logger = logging.getLogger(__name__)

#: Several scrapers, or an impatient one, cost Redis no more than one.
CACHE_SECONDS = 5.0
#: A scrape is given up by Prometheus after 10 s; an older answer is better than none.
TIMEOUT_SECONDS = 3.0
_OUTBOX_ROWS = 100


class StateCollector:
    """What the worker and its engine are doing."""

    def __init__(
        self,
        status: Callable[[], WorkerStatus],
        *,
        is_ready: Callable[[], bool],
        busy_seconds: Callable[[], float],
        dropped_records: Callable[[], int],
    ) -> None:
        self._status = status
        self._is_ready = is_ready
        self._busy_seconds = busy_seconds
        self._dropped_records = dropped_records

    def collect(self) -> Iterator[Metric]:
        """What is true now."""
        status = self._status()
        yield _gauge(catalog.READY, self._is_ready())
        yield _state(catalog.WORKER_STATE, status.state, WorkerState)
        yield _state(catalog.ENGINE_STATE, status.engine, EngineState)
        yield _gauge(catalog.RUNNING, len(status.jobs))
        yield CounterMetricFamily(catalog.BUSY.name, catalog.BUSY.meaning, value=self._busy_seconds())
        yield CounterMetricFamily(
            catalog.USAGE_DROPPED.name, catalog.USAGE_DROPPED.meaning, value=self._dropped_records()
        )
        if status.device is not None:
            yield _gauge(catalog.DEVICE_USED, status.device.used_gb * 2**30)
            yield _gauge(catalog.DEVICE_TOTAL, status.device.total_gb * 2**30)

    def describe(self) -> list[Metric]:
        """Nothing: it need not be asked when it is registered."""
        return []


@frozen(kw_only=True)
class QueueFacts:
    """What one queue holds, and how old it is. Ages in seconds; None where it is not known."""

    depth: QueueDepth
    oldest_seconds: float | None
    lease_oldest_seconds: float = 0.0
    lease_overdue_seconds: float = 0.0
    outbox_oldest_seconds: float = 0.0


@frozen(kw_only=True)
class _Reading:
    at: float
    by_queue: dict[str, QueueFacts] = field(factory=dict)
    is_up: bool = False


class QueueCollector:
    """What the queues hold, asked of Redis at most every few seconds, and never for longer than a scrape may take."""

    def __init__(
        self,
        queue: Queue,
        names: Sequence[str],
        *,
        cache_seconds: float = CACHE_SECONDS,
        timeout_seconds: float = TIMEOUT_SECONDS,
    ) -> None:
        self._queue = queue
        self._names = tuple(names)
        self._cache_seconds = cache_seconds
        self._timeout_seconds = timeout_seconds
        self._lock = threading.Lock()
        self._asked: Future[dict[str, QueueFacts]] | None = None
        self._last = _Reading(at=float("-inf"))

    def collect(self) -> Iterator[Metric]:
        """What is known by now."""
        with self._lock:
            if time.monotonic() - self._last.at >= self._cache_seconds:
                self._last = self._read()
            reading = self._last
        yield _gauge(catalog.QUEUE_UP, reading.is_up)
        yield from _families(reading.by_queue)

    def describe(self) -> list[Metric]:
        """Nothing: Redis need not be asked when it is registered."""
        return []

    def _read(self) -> _Reading:
        # A question that hangs is waited for again by the next scrape; there is never a second one beside it.
        if self._asked is None:
            self._asked = Future()
            # A daemon: the end of the process must not wait for an answer that nobody wants any more.
            threading.Thread(target=self._ask, args=[self._asked], name="queue-metrics", daemon=True).start()
        try:
            by_queue = self._asked.result(timeout=self._timeout_seconds)
        except TimeoutError:
            return _Reading(at=time.monotonic(), by_queue=self._last.by_queue)
        except Exception as error:  # the page has other things to say
            logger.debug("no metrics of the queues: %s", error)
            self._asked = None
            return _Reading(at=time.monotonic(), by_queue=self._last.by_queue)
        self._asked = None
        return _Reading(at=time.monotonic(), by_queue=by_queue, is_up=True)

    def _ask(self, asked: Future[dict[str, QueueFacts]]) -> None:
        try:
            asked.set_result({name: facts_of(self._queue, name) for name in self._names})
        except Exception as error:
            asked.set_exception(error)


def facts_of(queue: Queue, name: str) -> QueueFacts:
    """What the queue ``name`` holds now.

    :raises QueueError: it does not say.
    """
    depth = queue.depth(name)
    in_flight = [job for job in queue.in_flight(name) if job.lease_left_seconds is not None]
    now = time.time()
    tried = [
        callback.first_tried_at
        for callback in queue.waiting_callbacks(name, limit=_OUTBOX_ROWS)
        if callback.first_tried_at
    ]
    return QueueFacts(
        depth=depth,
        oldest_seconds=_age_of_next(queue, name) if depth.waiting else 0.0,
        lease_oldest_seconds=max((job.age_seconds or 0.0 for job in in_flight), default=0.0),
        lease_overdue_seconds=max((-(job.lease_left_seconds or 0.0) for job in in_flight), default=0.0),
        outbox_oldest_seconds=max((now - at for at in tried), default=0.0),
    )


def _age_of_next(queue: Queue, name: str) -> float | None:
    raw = next(iter(queue.peek(name, 1)), None)
    if raw is None:
        return 0.0
    try:
        created_at = datetime.fromisoformat(str(decode_message(raw).get("created_at")))
    except (PayloadError, ValueError):
        return None
    if created_at.tzinfo is None:
        created_at = created_at.replace(tzinfo=UTC)
    return max((datetime.now(UTC) - created_at).total_seconds(), 0.0)


def _families(by_queue: dict[str, QueueFacts]) -> Iterator[Metric]:
    jobs = _labelled(catalog.QUEUE_JOBS)
    oldest = _labelled(catalog.QUEUE_OLDEST)
    lease_oldest = _labelled(catalog.LEASE_OLDEST)
    overdue = _labelled(catalog.LEASE_OVERDUE)
    outbox = _labelled(catalog.OUTBOX)
    outbox_oldest = _labelled(catalog.OUTBOX_OLDEST)
    for name, facts in by_queue.items():
        for state in ("waiting", "in_flight", "retrying", "dead"):
            jobs.add_metric([name, state], getattr(facts.depth, state))
        if facts.oldest_seconds is not None:
            oldest.add_metric([name], facts.oldest_seconds)
        lease_oldest.add_metric([name], facts.lease_oldest_seconds)
        overdue.add_metric([name], max(facts.lease_overdue_seconds, 0.0))
        outbox.add_metric([name, "waiting"], facts.depth.callbacks)
        outbox.add_metric([name, "undelivered"], facts.depth.undelivered)
        outbox_oldest.add_metric([name], facts.outbox_oldest_seconds)
    yield from (jobs, oldest, lease_oldest, overdue, outbox, outbox_oldest)


def _labelled(spec: Spec) -> GaugeMetricFamily:
    return GaugeMetricFamily(spec.name, spec.meaning, labels=spec.labels)


def _gauge(spec: Spec, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(spec.name, spec.meaning, value=float(value))


def _state(spec: Spec, present: StrEnum, states: type[StrEnum]) -> GaugeMetricFamily:
    family = _labelled(spec)
    for state in states:
        family.add_metric([state.value], float(state is present))
    return family
