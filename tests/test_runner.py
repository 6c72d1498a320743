"""One job from its message to its outcome: what is told, what is stored, and what is left behind."""

from __future__ import annotations

import errno
import io
import json
import threading
from collections.abc import Callable
from pathlib import Path

import attrs
import pytest
from PIL import Image

from ourvidz_core.errors import (
    DiskFull,
    EngineCrashed,
    ReferenceServerFailed,
    ReferenceUnavailable,
    StorageUnavailable,
)
from ourvidz_core.settings import Settings
from ourvidz_core.testing.doubles import FaultyStorage, StubEngine
from ourvidz_core.testing.host import PluginHost, plugin_of
from ourvidz_core.wire.artifacts import Artifact, FinishedGeneration, Generation
from ourvidz_core.wire.jobs import Job
from ourvidz_core.worker.runner import Outcome, Watch

ACME = """
import attrs, sys
from attrs import frozen
from ourvidz_core import *
from ourvidz_core import Artifact, Generation, JobCancelled, JobType, PayloadError, default_job, hookimpl

heard = []

@frozen(kw_only=True)
class Config:
    files: int = 1
    what: str = "draw"

@hookimpl
def register_job_types():
    yield JobType(name="acme", queue="acme_queue", content_type="image", bucket="acme_bucket", preset=Config())

@hookimpl
def generate(job, context):
    from PIL import Image
    if job.config.what == "raise": raise RuntimeError("the acme broke")
    if job.config.what == "cancel": raise JobCancelled("enough")
    if job.config.what == "odd details": raise PayloadError("odd", details={"a": {1}, "b": float("nan"), 3: "\\ud800"})
    artifacts = []
    for i in range(job.config.files):
        path = context.output_path("png")
        Image.linear_gradient("L").save(path)
        artifacts.append(Artifact(path=path, media_type="image/png", seed=job.seed + i))
    context.progress(1, 1)
    facts = {"seed": 3} if job.config.what == "clash" else {"model": "acme-1"}
    return Generation(artifacts=tuple(artifacts), facts=facts)

@hookimpl
def handle_event(event):
    heard.append(type(event).__name__)
"""
URL = "https://a.example/x.png?token=canary"


def picture() -> bytes:
    file = io.BytesIO()
    Image.linear_gradient("L").save(file, "PNG")
    return file.getvalue()


def heard(host: PluginHost) -> list[str]:
    return host.registry.manager.get_plugin("acme").heard


def is_clean(host: PluginHost) -> bool:
    """Whether no job's directory is left."""
    return not list(host.workspace.path.glob("job-*"))


def failure(outcome: Outcome) -> tuple[str, str]:
    assert outcome.callback is not None
    body = outcome.callback.to_json()
    assert (body["status"], body["assets"]) == ("failed", [])
    assert body["metadata"]["error_timestamp"]
    assert body["metadata"]["worker_version"]
    assert json.loads(outcome.callback.to_bytes())
    return body["metadata"]["error_type"], body["error_message"]


@pytest.fixture
def acme(host: Callable[..., PluginHost]) -> Callable[..., PluginHost]:
    return lambda *more, **parts: host(plugin_of(ACME), *more, **parts)


# -- the good way


def test_a_job_is_stored_and_told(acme: Callable, payload: Callable) -> None:
    host = acme(references={URL: picture()})
    progress: list[tuple] = []
    message = payload(config={"files": 2, "seed": 7, "image": URL, "size": "1x1", "expected_time": 10})

    outcome = host.run(message, watch=Watch(on_progress=lambda *step: progress.append(step)))

    body = outcome.callback.to_json()
    user = message["user_id"]
    assert (body["status"], body["assets"]) == ("completed", [f"{user}/job-1_0.png", f"{user}/job-1_1.png"])
    assert all((host.assets_dir / "acme_bucket" / asset).is_file() for asset in body["assets"])
    facts = body["metadata"]
    assert (facts["seed"], facts["seeds"], facts["num_images"]) == (7, [7, 8], 2)
    assert (facts["reference_mode"], facts["ignored_config"]) == ("single", {"size": "1x1"})
    assert (facts["expected_time"], facts["model"], facts["bucket"]) == (10.0, "acme-1", "acme_bucket")
    assert facts["performance_ratio"] == pytest.approx(facts["generation_time"] / 10, abs=0.001)
    assert "canary" not in str(body)
    assert progress == [("generate", 1, 1)]
    assert heard(host) == [
        "JobStarted", "ReferencesFetched", "GenerationStarted", "GenerationProgressed", "GenerationFinished",
        "AssetStored", "AssetStored", "JobCompleted",
    ]  # fmt: skip
    assert is_clean(host)


@pytest.mark.parametrize("expected", [None, 0, -1, "12", 5e-324, 10**400], ids=lambda v: repr(v)[:8])
def test_a_ratio_is_told_only_to_an_expectation_that_makes_one(
    acme: Callable, payload: Callable, expected: object
) -> None:
    outcome = acme().run(payload(config={"expected_time": expected}))

    assert "performance_ratio" not in outcome.callback.metadata
    assert outcome.error is None
    assert outcome.callback.to_bytes()


# -- the message


@pytest.mark.parametrize("raw", [b"", b"[]", b"\xff", b'{"id": 5}', b'{"id": "../x", "type": "acme"}'], ids=repr)
def test_a_message_without_an_id_has_nobody_to_tell(acme: Callable, raw: bytes) -> None:
    outcome = acme().run(raw)

    assert (outcome.callback, outcome.job_id, outcome.error.error_type) == (None, None, "PayloadError")


@pytest.mark.parametrize(
    ("changes", "error_type", "said"),
    [
        pytest.param({"prompt": 3}, "PayloadError", "$.prompt: expected a string, got 3", id="a wrong field"),
        pytest.param(
            {"type": "clip"}, "UnknownJobType", "no plugin owns 'clip'; the job types here are acme", id="type"
        ),
        pytest.param({"config": {"files": "2"}}, "PayloadError", "$.config.files: expected an integer", id="config"),
        pytest.param({"config": {"seed": -1}}, "PayloadError", "$.config.seed", id="seed"),
    ],
)
def test_a_wrong_message_is_told_to_its_id(
    acme: Callable, payload: Callable, changes: dict, error_type: str, said: str
) -> None:
    host = acme()

    outcome = host.run(payload(**changes))

    assert failure(outcome)[0] == error_type
    assert said in failure(outcome)[1]
    assert heard(host) == ["JobFailed"]
    assert outcome.callback.metadata["job_type"] == changes.get("type", "acme")


def test_a_type_that_is_a_novel_is_not_repeated(acme: Callable, payload: Callable) -> None:
    outcome = acme().run(payload(type="x\n" * 10**5))

    assert len(outcome.callback.to_bytes()) < 1000
    assert outcome.job_type is None


# -- references


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    ("answer", "error_type", "is_transient"),
    [
        pytest.param(ReferenceUnavailable("it is gone"), "ReferenceUnavailable", False, id="gone"),
        pytest.param(ReferenceServerFailed("it answered 500"), "ReferenceServerFailed", True, id="a failing server"),
        pytest.param(b"<html>", "ReferenceInvalid", False, id="no image"),
    ],
)
def test_without_its_reference_a_job_generates_nothing(
    acme: Callable, payload: Callable, answer: object, error_type: str, is_transient: bool
) -> None:
    engine = StubEngine(AssertionError("it generated"))
    host = acme(references={URL: answer}, engine=engine)

    outcome = host.run(payload(config={"image": URL}))

    assert failure(outcome)[0] == error_type
    assert outcome.error.is_transient is is_transient
    assert outcome.callback.metadata["reference_mode"] == "single"
    assert engine.jobs == []
    assert is_clean(host)


# -- the generation


@pytest.mark.parametrize(
    ("what", "error_type", "said"),
    [
        pytest.param("raise", "RuntimeError", "acme failed in generate: RuntimeError: the acme broke", id="raises"),
        pytest.param("cancel", "JobCancelled", "enough", id="cancelled"),
        pytest.param("odd details", "PayloadError", "odd", id="details that are no JSON"),
    ],
)
def test_a_failed_generation_is_told(acme: Callable, payload: Callable, what: str, error_type: str, said: str) -> None:
    host = acme()

    outcome = host.run(payload(config={"what": what, "seed": 4}))

    assert failure(outcome) == (error_type, said)
    assert outcome.callback.metadata["seed"] == 4
    assert not host.assets_dir.exists()
    assert heard(host) == ["JobStarted", "GenerationStarted", "JobFailed"]
    assert is_clean(host)


@pytest.mark.parametrize(
    ("fault", "error_type", "is_transient"),
    [
        pytest.param(EngineCrashed("it died"), "EngineCrashed", True, id="a dead engine"),
        pytest.param(OSError(errno.ENOSPC, "No space left"), "DiskFull", True, id="a full disk"),
        pytest.param(OSError(errno.EDQUOT, "Quota"), "DiskFull", True, id="a used quota"),
        pytest.param(PermissionError(errno.EACCES, "No"), "InternalError", True, id="a machine's fault"),
        pytest.param(ZeroDivisionError("ours"), "InternalError", True, id="our fault"),
    ],
)
def test_a_fault_that_is_not_the_jobs_is_told_as_such(
    acme: Callable, payload: Callable, fault: Exception, error_type: str, is_transient: bool
) -> None:
    host = acme(engine=StubEngine(fault))

    outcome = host.run(payload())

    assert failure(outcome)[0] == error_type
    assert outcome.error.is_transient is is_transient
    assert is_clean(host)


def test_a_job_that_is_cancelled_before_it_generates_does_not(acme: Callable, payload: Callable) -> None:
    engine, cancelled = StubEngine(AssertionError("it generated")), threading.Event()
    cancelled.set()

    outcome = acme(engine=engine).run(payload(), watch=Watch(cancelled=cancelled))

    assert failure(outcome)[0] == "JobCancelled"
    assert engine.jobs == []


def test_a_job_that_is_cancelled_after_it_generated_stores_nothing(acme: Callable, payload: Callable) -> None:
    cancelled = threading.Event()
    host = acme()

    outcome = host.run(payload(), watch=Watch(cancelled=cancelled, on_generated=cancelled.set))

    assert failure(outcome)[0] == "JobCancelled"
    assert not host.assets_dir.exists()
    assert is_clean(host)


# -- storage


def of_sizes(*sizes: int) -> Callable[[Job, Path], FinishedGeneration]:
    def generate(job: Job, work_dir: Path) -> FinishedGeneration:
        artifacts = []
        for index, size in enumerate(sizes):
            path = work_dir / f"output_{index}.png"
            path.write_bytes(b"x" * size)
            artifacts.append(Artifact(path=path, media_type="image/png"))
        return FinishedGeneration(job=job, generation=Generation(artifacts=tuple(artifacts)), seconds=1.0)

    return generate


def test_a_file_above_its_buckets_limit_is_refused_before_anything_is_stored(
    acme: Callable, payload: Callable, tmp_path: Path
) -> None:
    storage = FaultyStorage(tmp_path / "assets")
    settings = Settings(bucket_limits_mb={"acme_bucket": 0.001})
    host = acme(engine=StubEngine(of_sizes(10, 1001)), storage=storage, settings=settings)

    outcome = host.run(payload())

    assert failure(outcome)[0] == "AssetRejected"
    assert "bucket acme_bucket takes 0.001 MB" in failure(outcome)[1]
    assert outcome.callback.metadata["bucket_limit_mb"] == 0.001
    assert storage.asked == []


def test_a_file_of_just_the_limit_is_stored(acme: Callable, payload: Callable) -> None:
    settings = Settings(bucket_limits_mb={"acme_bucket": 0.001})

    assert acme(engine=StubEngine(of_sizes(1000)), settings=settings).run(payload()).error is None


def test_a_job_type_has_the_time_that_the_operator_gives_it(acme: Callable, payload: Callable) -> None:
    outcome = acme(settings=Settings(job_timeouts_seconds={"acme": 0.000001})).run(payload())

    assert failure(outcome) == ("JobTimeout", "the job was still running after 1e-06 s and was stopped")


@pytest.mark.usefixtures("impatient")
def test_a_storage_that_fails_for_a_moment_is_asked_again(acme: Callable, payload: Callable, tmp_path: Path) -> None:
    storage = FaultyStorage(tmp_path / "assets", None, StorageUnavailable("busy"), StorageUnavailable("busy"))
    message = payload(config={"files": 2})

    outcome = acme(storage=storage).run(message)

    assert outcome.error is None
    assert [path[-5] for path in storage.asked] == ["0", "1", "1", "1"]
    assert len(outcome.assets) == 2


@pytest.mark.usefixtures("impatient")
def test_a_storage_that_stays_down_fails_the_job_for_another_try(
    acme: Callable, payload: Callable, tmp_path: Path
) -> None:
    storage = FaultyStorage(tmp_path / "assets", *[StorageUnavailable("down")] * 4)
    host = acme(storage=storage)

    outcome = host.run(payload(config={"files": 2}))

    assert failure(outcome) == ("StorageUnavailable", "down")
    assert outcome.error.is_transient
    assert len(storage.asked) == 4
    assert is_clean(host)


@pytest.mark.parametrize("fault", [DiskFull("no room"), OSError(errno.ENOSPC, "No space left")], ids=["told", "raw"])
def test_a_full_disk_is_told_at_once(acme: Callable, payload: Callable, tmp_path: Path, fault: Exception) -> None:
    storage = FaultyStorage(tmp_path / "assets", fault)

    assert failure(acme(storage=storage).run(payload()))[0] == "DiskFull"
    assert len(storage.asked) == 1


# -- the report


def test_a_fact_that_core_reports_too_fails_the_job(acme: Callable, payload: Callable) -> None:
    outcome = acme().run(payload(config={"what": "clash"}))

    assert failure(outcome)[0] == "MetadataClash"
    assert "acme reports metadata key 'seed'" in failure(outcome)[1]


def test_two_plugins_that_report_one_key_are_both_named(acme: Callable, payload: Callable) -> None:
    source = "from ourvidz_core import hookimpl\n@hookimpl\ndef enrich_metadata(): return {'model': 'x'}"

    outcome = acme(plugin_of(source, distribution="acme-metrics")).run(payload())

    assert failure(outcome)[0] == "MetadataClash"
    assert "acme-metrics reports metadata key 'model'" in failure(outcome)[1]


def test_earlier_tries_are_in_either_report(acme: Callable, payload: Callable) -> None:
    host = acme()
    attempts = {"attempts": 2, "attempt_reasons": ["EngineCrashed: it died"]}

    good = host.runner.run(json.dumps(payload()).encode(), attempt=2, attempts=attempts)
    bad = host.runner.run(json.dumps(payload(type="clip")).encode(), attempt=2, attempts=attempts)

    for outcome in (good, bad):
        assert attempts.items() <= outcome.callback.metadata.items()


def test_an_error_message_that_is_no_text_is_told_all_the_same(acme: Callable, payload: Callable) -> None:
    outcome = acme(engine=StubEngine(EngineCrashed("file \udcff"))).run(payload())

    assert json.loads(outcome.callback.to_bytes())["error_message"] == "file ?"


def test_a_plan_runs_nothing(acme: Callable, payload: Callable) -> None:
    host = acme()

    job, command = host.plan(payload(config={"seed": 3}))

    assert (job.seed, command) == (3, None)
    assert attrs.evolve(job) == host.parse(payload(config={"seed": 3}))
    assert not host.assets_dir.exists()
