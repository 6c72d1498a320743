"""One engine, several jobs: while the files of one are written, the next has the device."""

from __future__ import annotations

import logging
import os
import queue
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from ourvidz_core.engine.host import EngineProcess
from ourvidz_core.errors import EngineCrashed, EngineLost, JobCancelled, JobTimeout, OutOfMemory, PolicyRefused
from ourvidz_core.plugins.loading import load_registry
from ourvidz_core.settings import Settings
from ourvidz_core.testing.distributions import make_distribution
from ourvidz_core.wire.artifacts import FinishedGeneration
from ourvidz_core.wire.payloads import Payload

SOURCE = """
import logging, os, threading, time
from pathlib import Path
from attrs import frozen
from ourvidz_core import Artifact, Generation, JobType, OutOfMemory, PolicyRefused, hookimpl

GATES = Path(os.environ.get("ACME_GATES", "/nonexistent"))
logger = logging.getLogger("acme")

@frozen(kw_only=True)
class Config:
    what: str = "draw"
    #: Wait for these gates while it generates, and while it writes.
    before: str | None = None
    after: str | None = None
    opens: str | None = None
    says: str | None = None

@hookimpl
def register_job_types():
    yield JobType(name="acme", queue="acme_queue", content_type="image", preset=Config(), timeout_seconds=20)

def pass_gate(name, context):
    while name and not (GATES / name).exists():
        context.progress(1, 2, stage=name)
        time.sleep(0.005)

@hookimpl
def generate(job, context):
    config = job.config
    if config.opens:
        with (GATES / config.opens).open("a") as gate:
            gate.write(f"{os.getpid()} ")
    pass_gate(config.before, context)
    if config.what == "die":
        os._exit(7)
    if config.what == "oom":
        raise OutOfMemory("too little of it")
    facts = {"pid": os.getpid(), "on_main_thread": threading.current_thread() is threading.main_thread()}
    return Generation(finish=lambda: finish(job, context), facts=facts)

def finish(job, context):
    from PIL import Image
    if job.config.says:
        logger.warning(job.config.says)
    pass_gate(job.config.after, context)
    if job.config.what == "die while writing":
        os._exit(8)
    if job.config.what == "crash while writing":
        __import__("ctypes").string_at(0)
    path = context.output_path("png")
    Image.linear_gradient("L").resize((16, 16)).save(path)
    return (Artifact(path=path, media_type="image/png"),)
"""
REVIEWER = """
import threading
from ourvidz_core import PolicyRefused, hookimpl

@hookimpl
def review_artifact(job, artifact):
    if job.config.what == "refused":
        raise PolicyRefused("not here")
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("the device is used by two threads")
"""


class Bench:
    """An engine, and jobs that run in it at once."""

    def __init__(self, engine: EngineProcess, registry: object, root: Path) -> None:
        self.engine = engine
        self._registry = registry
        self._root = root
        self._threads = ThreadPoolExecutor(8)
        self._count = 0

    def open(self, gate: str) -> None:
        (self._root / "gates" / gate).touch()

    def opened_by(self, gate: str) -> list[int]:
        return [int(pid) for pid in (self._root / "gates" / gate).read_text().split()]

    def start(self, what: str = "draw", *, seconds: float = 20.0, job_id: str = "", **config: str) -> Running:
        self._count += 1
        directory = self._root / f"job-{self._count}"
        directory.mkdir()
        payload = Payload(
            id=job_id or f"job-{self._count}",
            type="acme",
            prompt="a toy",
            user_id="u",
            config={"what": what, "seed": 7, **config},
        )
        job = self._registry.get("acme").parse_job(payload)
        running = Running()
        running.result = self._threads.submit(
            self.engine.run,
            job,
            work_dir=directory,
            timeout_seconds=seconds,
            on_begun=lambda: running.moments.put("begun"),
            on_generated=lambda: running.moments.put("generated"),
            cancelled=running.cancelled,
        )
        return running

    def close(self) -> None:
        self.engine.close()
        self._threads.shutdown()


class Running:
    """A job that is on its way."""

    result: Future[FinishedGeneration]

    def __init__(self) -> None:
        self.moments: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.cancelled = threading.Event()

    def reaches(self, moment: str) -> None:
        assert self.moments.get(timeout=10) == moment

    @property
    def pid(self) -> int:
        return self.result.result(10).generation.facts["pid"]


def bench_with(root: Path, *plugins: tuple[str, str]) -> Iterator[Bench]:
    (root / "gates").mkdir()
    names = ",".join(name for name, _ in plugins)
    for name, source in plugins:
        make_distribution(root / "site", name, source)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(root / "site"))
        registry = load_registry(Settings(allow_plugins=names.split(",")))
        environ = {"PYTHONPATH": str(root / "site"), "OURVIDZ_ALLOW_PLUGINS": names, "ACME_GATES": str(root / "gates")}
        bench = Bench(EngineProcess(registry, {**os.environ, **environ, "OURVIDZ_DEVICE": "cpu"}), registry, root)
        yield bench
        bench.close()
        for name, _ in plugins:
            sys.modules.pop(name.replace("-", "_"), None)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    yield from bench_with(tmp_path_factory.mktemp("overlap"), ("acme", SOURCE))


def test_the_next_job_has_the_device_while_the_files_of_the_one_before_are_written(bench: Bench) -> None:
    first = bench.start(after="second-has-begun")
    first.reaches("begun")
    second = bench.start(opens="second-has-begun")

    assert first.pid == second.pid
    assert second.result.result(10).generation.facts["on_main_thread"] is True


def test_files_are_not_waited_for_in_the_time_that_a_job_took(bench: Bench) -> None:
    assert bench.start().result.result(10), "what it imports is there"
    first = bench.start(before="go")
    first.reaches("begun")
    waiting = bench.start()
    threading.Timer(0.3, bench.open, ["go"]).start()

    assert waiting.result.result(10).seconds < first.result.result(10).seconds / 2


def test_a_line_is_logged_as_of_the_job_that_said_it_and_not_of_the_one_with_the_device(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "ourvidz_core.engine.child")
    first = bench.start(job_id="job-of-ink", after="ink-1", says="ink is low")
    first.reaches("begun")
    second = bench.start(opens="ink-1")
    assert first.pid == second.pid

    said = [record.job_id for record in caplog.records if "ink is low" in record.getMessage()]

    assert said == ["job-of-ink"]


def test_the_job_with_the_device_is_blamed_for_a_crash_and_the_one_that_was_written_is_not(bench: Bench) -> None:
    writing = bench.start(after="never")
    writing.reaches("begun")
    writing.reaches("generated")
    dying = bench.start("die")

    assert type(dying.result.exception(10)) is EngineCrashed
    assert type(writing.result.exception(10)) is EngineLost


def test_a_job_that_dies_while_it_is_written_alone_is_blamed(bench: Bench) -> None:
    dying = bench.start("die while writing")

    assert type(dying.result.exception(10)) is EngineCrashed


def test_a_job_whose_writing_crashes_is_blamed_and_the_one_with_the_device_is_not(bench: Bench) -> None:
    writing = bench.start("crash while writing", after="other-has-begun")
    writing.reaches("begun")
    generating = bench.start(before="never", opens="other-has-begun")

    assert type(generating.result.exception(10)) is EngineLost
    assert type(writing.result.exception(10)) is EngineCrashed


def test_a_job_that_waited_for_the_device_begins_in_the_next_engine_and_hears_nothing_of_the_crash(
    bench: Bench,
) -> None:
    before = bench.start().pid
    dying = bench.start("die", before="both-are-there")
    dying.reaches("begun")
    waiting = bench.start()
    bench.open("both-are-there")

    assert isinstance(dying.result.exception(10), EngineCrashed)
    assert waiting.pid != before


def test_a_job_that_was_written_completes_though_its_engine_ran_out_of_memory(bench: Bench) -> None:
    before = bench.start().pid
    writing = bench.start(after="memory-is-out")
    writing.reaches("begun")
    writing.reaches("generated")
    greedy = bench.start("oom")
    greedy.reaches("begun")
    waiting = bench.start()
    bench.open("memory-is-out")

    assert isinstance(greedy.result.exception(10), OutOfMemory)
    assert writing.pid == before
    assert waiting.pid != before


def test_a_job_that_is_cancelled_while_it_is_written_ends_and_harms_no_other(bench: Bench) -> None:
    writing = bench.start(after="never")
    writing.reaches("begun")
    writing.reaches("generated")
    other = bench.start(before="cancelled")
    other.reaches("begun")

    writing.cancelled.set()

    assert isinstance(writing.result.exception(10), JobCancelled)
    bench.open("cancelled")
    assert other.pid == bench.start().pid


def test_a_job_that_is_cancelled_while_it_waits_leaves_at_once(bench: Bench) -> None:
    first = bench.start(before="the-other-has-left")
    first.reaches("begun")
    waiting = bench.start("die")

    waiting.cancelled.set()

    assert isinstance(waiting.result.exception(5), JobCancelled)
    bench.open("the-other-has-left")
    assert first.pid == bench.start().pid


def test_a_job_may_report_its_files_when_its_time_for_the_device_is_over(bench: Bench) -> None:
    late = bench.start(after="late", seconds=0.1)
    late.reaches("begun")
    late.reaches("generated")
    threading.Timer(0.2, bench.open, ["late"]).start()

    assert late.pid


def test_an_engine_whose_writing_hangs_is_replaced_when_its_jobs_are_over(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ourvidz_core.engine.host.FINISH_SECONDS", 0.1)
    monkeypatch.setattr("ourvidz_core.engine.host.GRACE_SECONDS", -0.4)
    before = bench.start().pid
    hanging = bench.start(after="never", seconds=0.5)

    assert isinstance(hanging.result.exception(10), JobTimeout)
    assert bench.start().pid != before


def test_an_engine_that_ends_its_last_jobs_begins_with_none_that_went_elsewhere(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ourvidz_core.engine.host.FINISH_SECONDS", 0.1)
    monkeypatch.setattr("ourvidz_core.engine.host.GRACE_SECONDS", -0.4)
    hanging = bench.start(after="never", seconds=0.5)
    hanging.reaches("begun")
    last = bench.start(before="the-last-may-end")
    last.reaches("begun")
    waiting = bench.start(opens="elsewhere")
    assert isinstance(hanging.result.exception(10), JobTimeout)

    bench.open("the-last-may-end")

    assert last.pid != waiting.pid
    assert bench.opened_by("elsewhere") == [waiting.pid]


def test_reviews_have_the_device_to_themselves(tmp_path: Path) -> None:
    for bench in bench_with(tmp_path, ("acme", SOURCE), ("acme-review", REVIEWER)):
        first = bench.start(after="reviewed-1")
        first.reaches("begun")
        second = bench.start(opens="reviewed-1")
        refused = bench.start("refused")

        assert first.pid == second.pid
        assert isinstance(refused.result.exception(10), PolicyRefused)
