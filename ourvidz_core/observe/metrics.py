"""Prometheus metrics of a worker, fed by its events.

Every label is of a bounded set: job types that a loaded plugin owns, errors that we name,
queues that this worker serves. Whatever else there is counts as ``other``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, Info
from prometheus_client.exposition import choose_encoder

import ourvidz_core
from ourvidz_core import errors
from ourvidz_core.observe import catalog
from ourvidz_core.observe.catalog import Spec
from ourvidz_core.wire import events
from ourvidz_core.wire.callbacks import JobStatus

if TYPE_CHECKING:
    from prometheus_client.registry import Collector

OTHER = "other"
_ERROR_TYPES = frozenset(name for name, cls in vars(errors).items() if isinstance(cls, type))
_STATUSES = frozenset(status.value for status in JobStatus)


class Metrics:
    """Counts what a worker does, in a registry of its own. Hears events from any thread."""

    def __init__(self, job_types: Iterable[str]) -> None:
        self._registry = CollectorRegistry()
        self._job_types = frozenset(job_types)
        Info("ourvidz_worker", "Version of the worker", registry=self._registry).info(
            {"version": ourvidz_core.__version__}
        )
        self._jobs = self._counter(catalog.JOBS)
        self._errors = self._counter(catalog.ERRORS)
        self._retries = self._counter(catalog.RETRIES)
        self._dead_letters = self._counter(catalog.DEAD_LETTERS)
        self._assets = self._counter(catalog.ASSETS)
        self._asset_bytes = self._counter(catalog.ASSET_BYTES)
        self._waited = self._histogram(catalog.WAITED)
        self._stages = self._histogram(catalog.STAGES)
        self._ratio = self._histogram(catalog.RATIO)
        self._callbacks = self._counter(catalog.CALLBACKS)

    def add(self, collector: Collector) -> None:
        """Let the page hold what ``collector`` finds when the page is asked for."""
        self._registry.register(collector)

    def page(self, accept: str) -> tuple[bytes, str]:
        """The metrics in the text format that ``accept``, a request's header, asks for; and its media type."""
        encode, media_type = choose_encoder(accept)
        return encode(self._registry), media_type

    def __call__(self, *, event: events.Event) -> None:
        """Hear of one event."""
        job_type = event.job_type if event.job_type in self._job_types else OTHER
        match event:
            case events.JobStarted(attempt=attempt, waited_seconds=waited, claim_seconds=seconds):
                self._stages.labels(job_type, "claim").observe(seconds)
                if attempt == 1 and waited is not None:
                    self._waited.labels(job_type).observe(waited)
            case events.ReferencesFetched(seconds=seconds):
                self._stages.labels(job_type, "references").observe(seconds)
            case events.GenerationStarted(waited_seconds=seconds):
                self._stages.labels(job_type, "waiting").observe(seconds)
            case events.GenerationFinished(seconds=seconds, expected_seconds=expected):
                self._stages.labels(job_type, "generate").observe(seconds)
                if expected and math.isfinite(ratio := seconds / expected):  # an expectation of 5e-324 s is above 0
                    self._ratio.labels(job_type).observe(ratio)
            case events.AssetStored(seconds=seconds, size_bytes=size_bytes):
                self._stages.labels(job_type, "store").observe(seconds)
                self._assets.labels(job_type).inc()
                self._asset_bytes.labels(job_type).inc(size_bytes)
            case events.CallbackDelivered(status=status):
                self._callbacks.labels(_known(status, _STATUSES), "delivered").inc()
            case events.CallbackRefused(status=status, is_given_up=is_given_up):
                self._callbacks.labels(_known(status, _STATUSES), "given_up" if is_given_up else "refused").inc()
            case _:
                self._count_ending(job_type, event)

    def _count_ending(self, job_type: str, event: events.Event) -> None:
        match event:
            case events.JobCompleted(seconds=seconds):
                self._jobs.labels(job_type, "completed").inc()
                self._stages.labels(job_type, "total").observe(seconds)
            case events.JobFailed(error_type=error_type, is_dead_letter=is_dead_letter):
                self._jobs.labels(job_type, "failed").inc()
                self._errors.labels(job_type, _known(error_type, _ERROR_TYPES)).inc()
                self._dead_letters.inc(is_dead_letter)
            case events.JobRetried(error_type=error_type):
                self._retries.labels(job_type).inc()
                self._errors.labels(job_type, _known(error_type, _ERROR_TYPES)).inc()
            case events.JobReleased():
                self._jobs.labels(job_type, "released").inc()

    def _counter(self, spec: Spec) -> Counter:
        return Counter(spec.name, spec.meaning, spec.labels, registry=self._registry)

    def _histogram(self, spec: Spec) -> Histogram:
        return Histogram(spec.name, spec.meaning, spec.labels, buckets=spec.buckets, registry=self._registry)


def _known(name: str, names: frozenset[str]) -> str:
    return name if name in names else OTHER
