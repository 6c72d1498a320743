"""Traces: one a job, a span a stage, whoever did it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

pytest.importorskip("opentelemetry.sdk")

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from ourvidz_core.observe.traces import Traces
from ourvidz_core.testing.host import PluginHost, plugin_of
from ourvidz_core.wire import events

STEPS = """
from ourvidz_core import Artifact, Generation, GenerationError, JobType, hookimpl

@hookimpl
def register_job_types():
    yield JobType(name="acme", queue="acme_queue", content_type="image")

@hookimpl
def parse_job(job_type, payload):
    import attrs
    from ourvidz_core import References, default_job
    references = References.choose(single=payload.first("config.image"))
    return attrs.evolve(default_job(job_type, payload), references=references)

@hookimpl
def generate(job, context):
    from PIL import Image
    for stage, steps in (("encode", 1), ("denoise", 3)):
        for step in range(steps):
            context.progress(step + 1, steps, stage=stage)
    if job.prompt == "fail":
        raise GenerationError("https://host/x?token=CANARY broke")
    path = context.output_path("png")
    Image.effect_noise((64, 64), 80).save(path)
    return Generation(artifacts=(Artifact(path=path, media_type="image/png"),))
"""
URL = "https://host/ref.png?token=CANARY"
PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


class Bench:
    """Traces of this process, kept in memory."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.traces = Traces(provider, "w")

    @property
    def spans(self) -> list[ReadableSpan]:
        return list(self.exporter.get_finished_spans())

    def named(self, name: str) -> ReadableSpan:
        (span,) = [span for span in self.spans if span.name == name]
        return span


@pytest.fixture
def bench() -> Bench:
    return Bench()


@pytest.fixture
def traced(bench: Bench, host: Callable[..., PluginHost], picture: bytes) -> Callable[..., None]:
    """Takes one message through a queue and a worker that is traced."""

    def run(**message: object) -> None:
        made = host(plugin_of(STEPS), references={URL: picture})
        made.registry.observe("traces", bench.traces)
        made.push({"id": "job-1", "type": "acme", "prompt": "a fox in the snow", "user_id": "u", **message})
        made.work()

    return run


@pytest.fixture
def picture() -> bytes:
    import io

    from PIL import Image

    raw = io.BytesIO()
    Image.new("RGB", (16, 16)).save(raw, "PNG")
    return raw.getvalue()


def test_a_job_is_one_trace_with_a_span_for_each_stage(bench: Bench, traced: Callable[..., None]) -> None:
    traced(config={"image": URL})
    root = bench.named("job acme")
    parents = {span.name: span.parent.span_id for span in bench.spans}
    root_id, generate_id = root.context.span_id, bench.named("generate").context.span_id
    assert parents == {
        "job acme": root.parent.span_id,
        "claim": root_id,
        "references": root_id,
        "waiting": root_id,
        "generate": root_id,
        "encode": generate_id,
        "denoise": generate_id,
        "store": root_id,
        "callback": root.parent.span_id,
    }
    assert len({span.context.trace_id for span in bench.spans}) == 1
    assert {span.attributes["ourvidz.job.id"] for span in bench.spans} == {"job-1"}
    assert {span.attributes["ourvidz.job.type"] for span in bench.spans} == {"acme"}
    assert bench.named("denoise").attributes["ourvidz.steps"] == 3
    assert root.attributes["messaging.destination.name"] == "acme_queue"
    assert all(span.status.status_code is not StatusCode.ERROR for span in bench.spans)
    text = "".join(span.to_json() for span in bench.spans)
    assert "CANARY" not in text
    assert "fox" not in text


def test_stages_follow_each_other_within_the_job(bench: Bench, traced: Callable[..., None]) -> None:
    traced(config={"image": URL})
    root = bench.named("job acme")
    ways = [bench.named(name) for name in ("claim", "references", "waiting", "generate", "store")]
    assert all(root.start_time <= span.start_time <= span.end_time <= root.end_time for span in ways)
    starts = [span.start_time for span in ways]
    assert starts == sorted(starts)
    encode, denoise = bench.named("encode"), bench.named("denoise")
    assert bench.named("generate").start_time <= encode.start_time <= encode.end_time == denoise.start_time


def test_a_job_that_failed_says_why_and_opens_no_door(bench: Bench, traced: Callable[..., None]) -> None:
    traced(prompt="fail")
    root = bench.named("job acme")
    assert root.status.status_code is StatusCode.ERROR
    assert root.attributes["error.type"] == "GenerationError"
    assert root.status.description == "https://host/x?... broke"
    assert bench.named("generate").end_time <= root.end_time


def test_a_job_joins_the_trace_of_its_producer(bench: Bench, traced: Callable[..., None]) -> None:
    traced(traceparent=PARENT)
    assert {f"{span.context.trace_id:032x}" for span in bench.spans} == {"4bf92f3577b34da6a3ce929d0e0e4736"}
    assert f"{bench.named('job acme').parent.span_id:016x}" == "00f067aa0ba902b7"


@pytest.mark.parametrize(
    "traceparent", ["CANARY", 3, None, f"{PARENT}-x", PARENT.replace("4bf", "4BF"), "00-" + "0" * 32]
)
def test_a_traceparent_that_is_none_is_no_fault_of_the_job(
    bench: Bench, traced: Callable[..., None], traceparent: object
) -> None:
    traced(traceparent=traceparent)
    assert bench.named("job acme").status.status_code is not StatusCode.ERROR
    assert "CANARY" not in "".join(span.to_json() for span in bench.spans)


def test_attempts_and_callbacks_of_several_workers_are_one_trace() -> None:
    first, second = Bench(), Bench()
    job = {"job_id": "job-1", "job_type": "acme"}
    first.traces(event=events.JobStarted(**job, attempt=1))
    first.traces(event=events.JobRetried(**job, error_type="E", message="", attempt=1, delay_seconds=1.0))
    second.traces(event=events.JobStarted(**job, attempt=2))
    second.traces(event=events.JobCompleted(**job, assets=1, seconds=1.0))
    first.traces(event=events.CallbackRefused(**job, status="completed", reason="500", seconds=0.1, is_given_up=False))
    second.traces(event=events.CallbackDelivered(**job, status="completed", refusals=1, seconds=0.1))
    spans = [*first.spans, *second.spans]
    assert [span.name for span in spans] == ["claim", "job acme", "callback", "claim", "job acme", "callback"]
    assert len({span.context.trace_id for span in spans}) == 1


def test_a_job_that_a_worker_takes_back_from_itself_leaves_no_span_open(bench: Bench) -> None:
    job = {"job_id": "job-1", "job_type": "acme"}
    for attempt in (1, 2):
        bench.traces(event=events.JobStarted(**job, attempt=attempt))
    bench.traces(event=events.JobReleased(**job, reason="lost to another worker"))
    roots = [span for span in bench.spans if span.name == "job acme"]
    assert [span.attributes["ourvidz.job.attempt"] for span in roots] == [1, 2]


def test_events_of_jobs_that_never_began_here_are_no_spans(bench: Bench) -> None:
    bench.traces(event=events.JobFailed(job_id="x", job_type="", error_type="PayloadError", message="not JSON"))
    assert bench.spans == []
