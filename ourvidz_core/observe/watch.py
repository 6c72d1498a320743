"""All that watches one worker, put together from its settings, begun and ended with it."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
from attrs import frozen

import ourvidz_core
from ourvidz_core.delivery.board import Board, WorkerStatus
from ourvidz_core.delivery.queue import Queue
from ourvidz_core.observe.activity import Activity
from ourvidz_core.observe.device import DeviceMonitor
from ourvidz_core.observe.joblog import log_event
from ourvidz_core.observe.previews import PreviewTeller
from ourvidz_core.observe.publisher import Publisher
from ourvidz_core.observe.server import Answer, HealthServer
from ourvidz_core.observe.vitals import Vitals
from ourvidz_core.plugins.registry import Registry
from ourvidz_core.settings import Settings, variable_of
from ourvidz_core.wire.states import EngineState, WorkerState

if TYPE_CHECKING:
    from ourvidz_core.observe.traces import Traces

logger = logging.getLogger(__name__)

_WHO = "ourvidz-core"


@frozen(kw_only=True)
class Subject:
    """The worker that is watched, as far as it can be asked. Every question may come from any thread."""

    queue: Queue
    #: Names of those that it takes jobs from.
    queues: tuple[str, ...]
    state: Callable[[], WorkerState]
    engine: Callable[[], EngineState]
    #: How long jobs have had the engine.
    busy_seconds: Callable[[], float]
    #: Records of usage that the endpoint did not take.
    dropped_records: Callable[[], int]
    vitals: Vitals
    #: The id and the work directory of the job that has the engine.
    working_on: Callable[[], tuple[str, Path] | None] = lambda: None
    #: What the engine is about while it warms up, in words.
    engine_doing: Callable[[], str | None] = lambda: None


@contextlib.contextmanager
def watched(
    settings: Settings,
    registry: Registry,
    board: Board,
    subject: Subject,
    *,
    environ: Mapping[str, str] = os.environ,
) -> Iterator[None]:
    """Watch ``subject`` by the events of ``registry`` for as long as the block runs."""
    with contextlib.ExitStack() as stack:
        stack.callback(board.close)
        device = stack.enter_context(contextlib.closing(DeviceMonitor(settings.device, environ)))
        activity = Activity(settings.worker_name)
        previews = PreviewTeller(board, subject.working_on if settings.previews else lambda: None)
        first = WorkerStatus(
            name=settings.worker_name,
            host=socket.gethostname(),
            pid=os.getpid(),
            version=ourvidz_core.__version__,
            queues=subject.queues,
            state=WorkerState.STARTING,
            started_at=time.time(),
        )
        address: list[str] = []

        def status() -> WorkerStatus:
            counts = activity.counts
            return attrs.evolve(
                first,
                state=subject.state(),
                published_at=time.time(),
                engine=subject.engine(),
                engine_doing=subject.engine_doing(),
                jobs=previews.mark(activity.running),
                device=device.memory(),
                completed=counts.completed,
                failed=counts.failed,
                retried=counts.retried,
                health_address=address[0] if address else None,
            )

        publisher = Publisher(board, status, tell_previews=previews.tell)
        activity.tell(publisher.note_change, publisher.add_finished)
        for observer in (log_event, subject.vitals, activity):
            registry.observe(_WHO, observer)
        if traces := _open_traces(settings):
            stack.callback(traces.close)
            registry.observe(_WHO, traces)
        if settings.health_address != "off":
            server = _open_server(settings, registry, subject, status, stack)
            address.extend([server.address] if server else [])
        publisher.start()
        stack.callback(publisher.close)
        yield


def _open_server(
    settings: Settings,
    registry: Registry,
    subject: Subject,
    status: Callable[[], WorkerStatus],
    stack: contextlib.ExitStack,
) -> HealthServer | None:
    from ourvidz_core.observe.collectors import QueueCollector, StateCollector
    from ourvidz_core.observe.metrics import Metrics

    def readiness() -> Answer:
        verdict = subject.vitals.readiness(subject.state(), subject.engine())
        return Answer.of(verdict.is_good, {"checks": verdict.checks})

    def health() -> Answer:
        verdict = subject.vitals.health()
        return Answer.of(verdict.is_good, {"checks": verdict.checks})

    def page(headers: Mapping[str, str]) -> Answer:
        body, media_type = metrics.page(headers.get("accept", ""))
        return Answer(body=body, media_type=media_type)

    metrics = Metrics(job_type.name for job_type in registry.job_types)
    metrics.add(QueueCollector(subject.queue, subject.queues))
    metrics.add(
        StateCollector(
            status,
            is_ready=lambda: subject.vitals.readiness(subject.state(), subject.engine()).is_good,
            busy_seconds=subject.busy_seconds,
            dropped_records=subject.dropped_records,
        )
    )
    pages = {"/healthz": lambda _: health(), "/readyz": lambda _: readiness(), "/metrics": page}
    try:
        server = HealthServer(settings.health_address, pages)
    except OSError as error:
        logger.warning(
            "health and metrics are not served: %s cannot be had (%s); set %s to another address, or to off",
            settings.health_address,
            error.strerror or error,
            variable_of("health_address"),
        )
        return None
    stack.callback(server.close)
    registry.observe(_WHO, metrics)
    logger.info("health and metrics are at http://%s", server.address)
    return server


def _open_traces(settings: Settings) -> Traces | None:
    if settings.otlp_endpoint is None:
        return None
    try:
        from ourvidz_core.observe.traces import open_traces
    except ImportError as error:
        logger.warning("no traces are sent: %s; pip install 'ourvidz-core[otel]'", error)
        return None
    pairs = (header.partition("=") for header in str(settings.otlp_headers).split(","))
    headers = {name.strip(): value.strip() for name, _, value in pairs if name.strip()}
    return open_traces(settings.otlp_endpoint, headers, settings.worker_name)
