"""OpenTelemetry traces made of a worker's events: one trace a job, one span a stage.

Without a ``traceparent`` in the message the trace's id is drawn from the job's id, so that attempts
on several workers, and a callback that another worker delivers, are one trace with nothing passed on.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING

from attrs import define, field
from opentelemetry import trace
from opentelemetry.trace import NonRecordingSpan, Span, SpanContext, Status, StatusCode, TraceFlags, Tracer

import ourvidz_core
from ourvidz_core.redaction import redact
from ourvidz_core.wire import events

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider

logger = logging.getLogger(__name__)

#: Jobs whose callbacks are still to come.
_REMEMBERED = 10_000
#: Of one batch, all tries included; what fails then is dropped.
_EXPORT_SECONDS = 5.0
_END_SECONDS = 2.0


@define
class _JobTrace:
    """The open spans of one attempt."""

    root: Span
    generate: Span | None = None
    #: Nanoseconds since the epoch.
    generate_started: int = 0
    engine_stage: Span | None = None
    engine_stage_name: str = ""
    attributes: dict[str, str | int] = field(factory=dict)


class Traces:
    """Hears events and makes spans of them. Thread-safe."""

    def __init__(self, provider: TracerProvider, worker: str) -> None:
        self._provider = provider
        self._tracer: Tracer = provider.get_tracer("ourvidz", ourvidz_core.__version__)
        self._worker = worker
        self._lock = threading.Lock()
        self._open: dict[str, _JobTrace] = {}
        self._parents: OrderedDict[str, str] = OrderedDict()

    def close(self) -> None:
        """Send what is left, as far as the collector takes it at once: nobody waits for traces."""
        ending = threading.Thread(target=self._provider.shutdown, name="traces-end", daemon=True)
        ending.start()
        ending.join(_END_SECONDS)

    def __call__(self, *, event: events.Event) -> None:
        """Hear of one event."""
        now = time.time_ns()
        with self._lock:
            match event:
                case events.JobStarted():
                    self._begin(event, now)
                case events.CallbackDelivered() | events.CallbackRefused():
                    self._add_callback(event, now)
                case _ if (job := self._open.get(event.job_id)) is not None:
                    self._move(job, event, now)

    def _begin(self, event: events.JobStarted, now: int) -> None:
        if (stale := self._open.pop(event.job_id, None)) is not None:
            _end(stale, now)  # this very worker has taken the job back from itself
        if event.traceparent is not None:
            self._parents[event.job_id] = event.traceparent
            if len(self._parents) > _REMEMBERED:
                self._parents.popitem(last=False)
        started = now - _nanoseconds(event.claim_seconds)
        attributes: dict[str, str | int] = {
            "ourvidz.job.id": event.job_id,
            "ourvidz.job.type": event.job_type,
            "ourvidz.job.attempt": event.attempt,
            "ourvidz.worker": self._worker,
        }
        if event.queue:
            attributes["messaging.destination.name"] = event.queue
        root = self._tracer.start_span(
            f"job {event.job_type}",
            context=self._parent_of(event.job_id),
            kind=trace.SpanKind.CONSUMER,
            attributes=attributes,
            start_time=started,
        )
        job = _JobTrace(root, attributes=attributes)
        self._open[event.job_id] = job
        self._span(job, "claim", started).end(now)

    def _move(self, job: _JobTrace, event: events.Event, now: int) -> None:
        match event:
            case events.ReferencesFetched(seconds=seconds):
                self._span(job, "references", now - _nanoseconds(seconds)).end(now)
            case events.GenerationStarted(waited_seconds=seconds):
                self._span(job, "waiting", now - _nanoseconds(seconds)).end(now)
                job.generate = self._span(job, "generate", now)
                job.generate_started = now
            case events.GenerationProgressed():
                self._progress(job, event, now)
            case events.GenerationFinished(artifacts=artifacts):
                if job.generate is not None:
                    job.generate.set_attribute("ourvidz.artifacts", artifacts)
                _end_generation(job, now)
            case events.AssetStored(seconds=seconds, bucket=bucket, size_bytes=size_bytes):
                span = self._span(job, "store", now - _nanoseconds(seconds))
                span.set_attributes({"ourvidz.bucket": bucket, "ourvidz.asset.bytes": size_bytes})
                span.end(now)
            case events.JobCompleted():
                self._finish(event.job_id, now)
            case events.JobReleased(reason=reason):
                job.root.set_attribute("ourvidz.job.released", reason)
                self._finish(event.job_id, now)
            case events.JobFailed(error_type=error_type, message=message):
                self._finish(event.job_id, now, error_type, message)
            case events.JobRetried(error_type=error_type, message=message):
                self._finish(event.job_id, now, error_type, message)

    def _progress(self, job: _JobTrace, event: events.GenerationProgressed, now: int) -> None:
        if event.stage != job.engine_stage_name and job.generate is not None:
            # A stage is heard of when its first step is done: it began where the one before it ended.
            started = now if job.engine_stage is not None else job.generate_started
            if job.engine_stage is not None:
                job.engine_stage.end(now)
            job.engine_stage = self._span(job, event.stage, started, parent=job.generate)
            job.engine_stage_name = event.stage
        if job.engine_stage is not None:
            job.engine_stage.set_attribute("ourvidz.steps", event.step)

    def _add_callback(self, event: events.CallbackDelivered | events.CallbackRefused, now: int) -> None:
        span = self._tracer.start_span(
            "callback",
            context=self._parent_of(event.job_id),
            kind=trace.SpanKind.CLIENT,
            attributes={
                "ourvidz.job.id": event.job_id,
                "ourvidz.job.type": event.job_type,
                "ourvidz.job.status": event.status,
                "ourvidz.worker": self._worker,
            },
            start_time=now - _nanoseconds(event.seconds),
        )
        if isinstance(event, events.CallbackRefused):
            span.set_status(Status(StatusCode.ERROR, redact(event.reason)))
        span.end(now)

    def _finish(self, job_id: str, now: int, error_type: str | None = None, message: str = "") -> None:
        job = self._open.pop(job_id)
        if error_type is not None:
            job.root.set_attribute("error.type", error_type)
            job.root.set_status(Status(StatusCode.ERROR, redact(message)))
        _end(job, now)

    def _span(self, job: _JobTrace, name: str, started: int, parent: Span | None = None) -> Span:
        return self._tracer.start_span(
            name,
            context=trace.set_span_in_context(parent or job.root),
            attributes={key: job.attributes[key] for key in ("ourvidz.job.id", "ourvidz.job.type")},
            start_time=started,
        )

    def _parent_of(self, job_id: str) -> Context:
        if (traceparent := self._parents.get(job_id)) is not None:
            _, trace_id, span_id, flags = traceparent.split("-")
            known = (int(trace_id, 16), int(span_id, 16), TraceFlags(int(flags, 16)))
        else:
            digest = hashlib.sha256(job_id.encode()).digest()
            known = (
                int.from_bytes(digest[:16], "big"),
                int.from_bytes(digest[16:24], "big"),
                TraceFlags(TraceFlags.SAMPLED),
            )
        context = SpanContext(known[0], known[1], is_remote=True, trace_flags=known[2])
        return trace.set_span_in_context(NonRecordingSpan(context))


def open_traces(endpoint: str, headers: Mapping[str, str], worker: str) -> Traces:
    """Traces that go to the collector at ``endpoint``, an OTLP receiver over HTTP."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import SERVICE_INSTANCE_ID, SERVICE_NAME, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    resource = Resource.create({SERVICE_NAME: "ourvidz-worker", SERVICE_INSTANCE_ID: worker})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    exporter = OTLPSpanExporter(
        endpoint=f"{endpoint.rstrip('/')}/v1/traces", headers=dict(headers), timeout=_EXPORT_SECONDS
    )
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return Traces(provider, worker)


def _end_generation(job: _JobTrace, now: int) -> None:
    for span in (job.engine_stage, job.generate):
        if span is not None:
            span.end(now)
    job.engine_stage = job.generate = None


def _end(job: _JobTrace, now: int) -> None:
    _end_generation(job, now)
    job.root.end(now)


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
