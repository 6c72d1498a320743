"""The worker's decisions, in this process: a queue in memory, an engine that does as told, time that is short."""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import attrs
import pytest
from PIL import Image

from ourvidz_core.delivery.callbacks import RecordingCallbacks
from ourvidz_core.delivery.memory_queue import MemoryQueue
from ourvidz_core.delivery.queue import Claim, FinishAnswer, QueuedCallback
from ourvidz_core.delivery.spool import DirectorySpool, Ending
from ourvidz_core.errors import (
    CallbackUndelivered,
    EngineCrashed,
    EngineLost,
    JobCancelled,
    JobError,
    OutOfMemory,
    QueueUnavailable,
)
from ourvidz_core.settings import Settings
from ourvidz_core.testing.host import PluginHost, plugin_of
from ourvidz_core.wire.artifacts import Artifact, FinishedGeneration, Generation
from ourvidz_core.wire.events import Event
from ourvidz_core.wire.jobs import Job
from ourvidz_core.worker.parts import ActiveJob, ActiveJobs, WorkerParts
from ourvidz_core.worker.slot import EngineSlot
from ourvidz_core.worker.worker import Until, Worker

QUEUE = "acme_queue"
ACME = """
from ourvidz_core import JobType, hookimpl

@hookimpl
def register_job_types():
    yield JobType(name="acme", queue="acme_queue", content_type="image", timeout_seconds=5)
"""


@attrs.define
class ScriptedEngine:
    """Each call raises the next of ``errors``; where there is none, it waits until it is cancelled."""

    errors: list[JobError]
    calls: int = 0
    started: threading.Event = attrs.field(factory=threading.Event)

    def run(
        self, job: Job, *, cancelled: threading.Event, on_begun: Callable[[], None], **_: object
    ) -> FinishedGeneration:
        on_begun()
        self.calls += 1
        self.started.set()
        if self.errors:
            raise self.errors.pop(0)
        assert cancelled.wait(10), "nobody cancelled the job"
        raise JobCancelled("the job was cancelled while it was running")

    def close(self) -> None:
        """There is nothing to end."""


class AbsentQueue(MemoryQueue):
    """A queue that can be made unreachable, and that counts what it was told."""

    def __init__(self) -> None:
        super().__init__()
        self.is_away = False
        self.renewals = 0

    def wait(self, queues: Sequence[str], timeout: float) -> None:
        """Not for as long as a worker that has nothing to do may; its end would be waited for, too."""
        super().wait(queues, min(timeout, 0.1))

    def finish(self, *arguments: object, **options: object) -> FinishAnswer:
        if self.is_away:
            raise QueueUnavailable("Redis does not answer")
        return super().finish(*arguments, **options)

    def renew(self, claim: Claim, *, lease: float) -> bool:
        self.renewals += 1
        return super().renew(claim, lease=lease)


@attrs.define
class Bench:
    """A worker that runs in a thread, and what it works with."""

    queue: AbsentQueue
    callbacks: RecordingCallbacks
    engine: ScriptedEngine
    worker: Worker
    thread: threading.Thread
    events: list[Event]

    def push(self, job_id: str) -> None:
        self.queue.push(QUEUE, message(job_id))

    def heard(self) -> list[str]:
        return [type(event).__name__ for event in self.events]

    def reports(self, job_id: str) -> list[dict]:
        bodies = [json.loads(sent.body) for sent in self.callbacks.accepted]
        return [body for body in bodies if body["job_id"] == job_id]

    def wait_for(self, condition: Callable[[], object], seconds: float = 10.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.01)


def message(job_id: str, prompt: str = "") -> bytes:
    return json.dumps({"id": job_id, "type": "acme", "prompt": prompt, "user_id": "u"}).encode()


@pytest.fixture
def bench_of(tmp_path: Path) -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []
    with contextlib.ExitStack() as stack:

        def make(
            *errors: JobError, answers: tuple[object, ...] = (), until: Until = Until.STOPPED, **settings: object
        ) -> Bench:
            engine = ScriptedEngine(list(errors))
            host = stack.enter_context(
                PluginHost(
                    tmp_path / f"host-{len(made)}",
                    plugin_of(ACME),
                    settings=Settings(
                        device="cpu",
                        state_dir=tmp_path,
                        worker_name="w",
                        **{
                            "lease_seconds": 0.6,
                            "retry_delay_seconds": 0.0,
                            "callback_min_age_seconds": 0.0,
                            "callback_retry_seconds": 0.01,
                            "min_free_disk_mb": 0.0,
                            **settings,
                        },
                    ),
                    engine=(slot := EngineSlot(engine)),
                )
            )
            queue, callbacks = AbsentQueue(), RecordingCallbacks(answers)
            parts = WorkerParts(
                queue=queue,
                callbacks=callbacks,
                runner=host.runner,
                slot=slot,
                registry=host.registry,
                workspace=host.workspace,
                settings=host.settings,
                spool=stack.enter_context(contextlib.closing(DirectorySpool(tmp_path / "spool"))),
            )
            worker = Worker(parts, [QUEUE])
            thread = threading.Thread(target=worker.run, args=[until], daemon=True)
            events: list[Event] = []
            host.registry.observe("bench", lambda event: events.append(event))  # noqa: PLW0108 - the name counts
            made.append(Bench(queue, callbacks, engine, worker, thread, events))
            return made[-1]

        yield make
        for bench in made:
            bench.worker.stop()
            bench.worker.stop()
            if bench.thread.ident is not None:
                bench.thread.join(10)
                assert not bench.thread.is_alive()


def test_a_job_that_lacks_memory_gets_one_more_try(bench_of: Callable[..., Bench]) -> None:
    bench = bench_of(OutOfMemory("too little"), OutOfMemory("too little"), until=Until.DRAINED, max_attempts=5)
    bench.push("big")
    bench.thread.start()
    bench.thread.join(10)
    report = bench.reports("big")[-1]
    assert (report["status"], report["metadata"]["error_type"], report["metadata"]["attempts"]) == (
        "failed",
        "OutOfMemory",
        2,
    )
    assert bench.engine.calls == 2


@pytest.mark.parametrize(
    ("errors", "calls"),
    [
        ([EngineLost("it died of another job"), JobCancelled("by the plugin")], 2),
        ([EngineLost("it died of another job"), EngineLost("and again")], 2),
        ([EngineCrashed("it died of this one")], 1),
    ],
    ids=["once", "twice", "its own crash"],
)
def test_a_job_whose_engine_died_of_another_is_tried_again_at_no_cost_once(
    bench_of: Callable[..., Bench], errors: list[JobError], calls: int
) -> None:
    bench = bench_of(*errors, until=Until.DRAINED, max_attempts=1)
    bench.push("neighbour")
    bench.thread.start()
    bench.thread.join(10)
    report = bench.reports("neighbour")[-1]
    assert (report["status"], report["metadata"]["attempts"]) == ("failed", 1)
    assert bench.engine.calls == calls


@pytest.mark.parametrize("asked", [False, True], ids=["by default", "asked for"])
def test_a_prompt_is_logged_only_where_it_is_asked_for(
    bench_of: Callable[..., Bench], caplog: pytest.LogCaptureFixture, asked: bool
) -> None:
    caplog.set_level("DEBUG")
    bench = bench_of(JobCancelled("by the plugin"), until=Until.DRAINED, log_prompts=asked)
    bench.queue.push(QUEUE, message("a", prompt="a red fox"))
    bench.thread.start()
    bench.thread.join(10)
    assert ("job a (acme) asks for: a red fox" in caplog.text) == asked
    assert ("fox" in caplog.text) == asked


def test_attempts_reasons_and_the_token_are_reported(bench_of: Callable[..., Bench]) -> None:
    bench = bench_of(EngineCrashed("first"), EngineCrashed("second"), until=Until.DRAINED, max_attempts=2)
    bench.push("a")
    bench.thread.start()
    bench.thread.join(10)
    processing, failed = bench.reports("a")
    assert (processing["status"], processing["metadata"]["fencing_token"]) == ("processing", 1)
    assert failed["metadata"]["fencing_token"] == 2
    assert failed["metadata"]["attempt_reasons"] == ["EngineCrashed: first"]


def test_a_running_job_that_a_producer_cancels_is_reported_once_and_gone(bench_of: Callable[..., Bench]) -> None:
    bench = bench_of()
    bench.push("a")
    bench.thread.start()
    assert bench.engine.started.wait(5)
    bench.queue.request_cancel(QUEUE, "a")
    asked_at = time.monotonic()
    bench.wait_for(lambda: len(bench.reports("a")) == 2)
    assert time.monotonic() - asked_at < 2.0
    report = bench.reports("a")[-1]
    assert (report["status"], report["metadata"]["error_type"]) == ("failed", "JobCancelled")
    bench.push("a")
    time.sleep(0.5)
    assert bench.engine.calls == 1
    assert len(bench.reports("a")) == 2


def test_a_queued_job_that_a_producer_cancels_does_not_wait_for_its_turn(bench_of: Callable[..., Bench]) -> None:
    bench = bench_of()
    bench.push("long")
    bench.push("queued")
    bench.thread.start()
    assert bench.engine.started.wait(5)
    bench.queue.request_cancel(QUEUE, "queued")
    bench.wait_for(lambda: bench.reports("queued"), 2.0)
    (report,) = bench.reports("queued")
    assert (report["status"], report["metadata"]["error_type"]) == ("failed", "JobCancelled")
    assert [body["status"] for body in bench.reports("long")] == ["processing"]


def test_a_job_that_was_cancelled_before_it_is_claimed_is_reported_and_never_runs(
    bench_of: Callable[..., Bench],
) -> None:
    bench = bench_of()
    bench.queue.request_cancel(QUEUE, "a")
    bench.push("a")
    bench.thread.start()
    bench.wait_for(lambda: bench.reports("a"))
    assert [body["status"] for body in bench.reports("a")] == ["failed"]
    assert bench.engine.calls == 0


def test_processing_is_over_before_a_terminal_report_goes_out_however_slow_the_endpoint(
    bench_of: Callable[..., Bench],
) -> None:
    bench = bench_of(JobCancelled("by the plugin"), until=Until.DRAINED)
    order: list[str] = []
    send = RecordingCallbacks.send

    class Hanging(RecordingCallbacks):
        def send(self, callback_id: str, job_id: str, body: bytes, **_: object) -> None:
            status = json.loads(body)["status"]
            order.append(f"{status} begins")
            if status == "processing":
                time.sleep(0.5)
                order.append("processing fails")
                raise CallbackUndelivered("no answer")
            send(self, callback_id, job_id, body)

    bench.worker._processing._callbacks = bench.worker._dispatcher._client = Hanging()
    bench.push("a")
    bench.thread.start()
    bench.thread.join(10)
    assert order == ["processing begins", "processing fails", "failed begins"]


def test_a_worker_that_was_frozen_beyond_its_lease_does_not_send_processing(bench_of: Callable[..., Bench]) -> None:
    bench = bench_of(lease_seconds=1e-6)
    bench.push("a")
    bench.thread.start()
    # Its own reaper may take the job back before the engine gets it, again and again until it gives it up.
    bench.wait_for(lambda: bench.engine.started.is_set() or bench.reports("a"))
    assert not [sent for sent in bench.callbacks.attempts if b'"processing"' in sent.body]


def test_a_job_that_does_not_get_on_for_longer_than_any_may_loses_its_lease(bench_of: Callable[..., Bench]) -> None:
    bench = bench_of()
    bench.worker._keeper._longest_silence = 0.5
    bench.push("stuck")
    bench.thread.start()
    bench.wait_for(lambda: bench.queue.renewals >= 1)
    time.sleep(0.7)
    renewals = bench.queue.renewals
    time.sleep(0.5)
    assert bench.queue.renewals == renewals
    # Its own reaper puts it back; the next to take it fences the thread that is stuck.
    bench.wait_for(lambda: bench.queue.claim((QUEUE,), worker="other", lease=60))


def test_an_outcome_waits_in_the_spool_while_the_queue_is_away_and_the_worker_can_end(
    bench_of: Callable[..., Bench], tmp_path: Path
) -> None:
    bench = bench_of(EngineCrashed("it died"), max_attempts=1)
    bench.queue.is_away = True
    bench.push("a")
    bench.thread.start()
    bench.wait_for(lambda: bench.engine.calls and any((tmp_path / "spool").glob("*.jsonl")))
    bench.wait_for(lambda: [path for path in (tmp_path / "spool").glob("*.jsonl") if path.stat().st_size])
    bench.worker.stop()
    bench.worker.stop()
    bench.thread.join(10)
    assert not bench.thread.is_alive()
    assert bench.heard() == ["JobStarted", "GenerationStarted", "JobReleased"]
    bench.worker._parts.spool.close()

    bench.queue.is_away = False
    later = DirectorySpool(tmp_path / "spool")
    later.replay(bench.queue)
    later.close()
    ((callback,), _) = bench.queue.take_callbacks((QUEUE,), limit=5, hold=10)
    assert json.loads(callback.body)["metadata"]["error_type"] == "EngineCrashed"
    assert bench.queue.depth(QUEUE).in_flight == 0
    assert not list((tmp_path / "spool").glob("*.jsonl"))


def test_a_job_that_another_worker_has_finished_is_not_told_as_over_here(
    bench_of: Callable[..., Bench], tmp_path: Path
) -> None:
    bench = bench_of()
    picture = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(picture)
    fences: list[FinishAnswer] = []

    def finish_late(job: Job, *, work_dir: Path, **_: object) -> FinishedGeneration:
        """The lease runs out meanwhile: somebody else takes the job and ends it."""
        (claim,) = bench.worker._jobs.all()
        bench.worker._queue.hand_back(claim.claim, delay=0.0)
        other = bench.queue.claim((QUEUE,), worker="other", lease=60)
        fences.append(bench.queue.finish(other, is_final=True))
        path = shutil.copy(picture, work_dir)
        generation = Generation(artifacts=(Artifact(path=Path(path), media_type="image/png"),))
        return FinishedGeneration(job=job, generation=generation, seconds=1.0)

    bench.worker._parts.slot._engine = SimpleNamespace(run=finish_late, close=lambda: None)
    bench.push("a")
    bench.thread.start()
    bench.wait_for(lambda: "JobReleased" in bench.heard())
    assert fences == [FinishAnswer.DONE]
    assert "AssetStored" in bench.heard()
    assert "JobCompleted" not in bench.heard()


def test_jobs_of_two_queues_whose_tokens_are_equal_are_two_jobs() -> None:
    queue, jobs = MemoryQueue(), ActiveJobs()
    for name in ("sdxl_queue", "wan_queue"):
        queue.push(name, message(name))
    first, second = (
        ActiveJob(claim=queue.claim((name,), worker="w", lease=60), held_until=0.0)
        for name in ("sdxl_queue", "wan_queue")
    )
    assert first.claim.token == second.claim.token
    jobs.add(first)
    jobs.add(second)
    assert jobs.all() == [first, second]
    jobs.remove(second)
    assert (first in jobs, second in jobs) == (True, False)


def test_a_callback_that_nobody_can_read_keeps_no_other_from_going_out(bench_of: Callable[..., Bench]) -> None:
    bench = bench_of(JobCancelled("by the plugin"))
    bench.push("poison")
    claim = bench.queue.claim((QUEUE,), worker="other", lease=60)
    row = QueuedCallback(queue=QUEUE, callback_id="poison-1", job_id="poison", body=b"[]")
    bench.queue.finish(claim, is_final=True, callback=row)
    bench.thread.start()
    bench.push("good")
    bench.wait_for(lambda: len(bench.reports("good")) == 2)
    assert bench.reports("good")[-1]["status"] == "failed"


def test_a_fault_that_nobody_thought_of_does_not_end_the_keeping_of_leases(
    bench_of: Callable[..., Bench], caplog: pytest.LogCaptureFixture
) -> None:
    bench = bench_of()
    recover, faults = bench.queue.recover, [TypeError("a row of another version")]
    bench.queue.recover = lambda *a, **k: (_ for _ in ()).throw(faults.pop()) if faults else recover(*a, **k)
    bench.push("a")
    bench.thread.start()
    bench.wait_for(lambda: not faults)
    renewals = bench.queue.renewals
    bench.wait_for(lambda: bench.queue.renewals > renewals)
    assert "a row of another version" in caplog.text


def test_a_worker_that_may_have_no_more_threads_ends_and_waits_for_none(
    bench_of: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = bench_of()
    start = threading.Thread.start

    def refuse_jobs(thread: threading.Thread) -> None:
        if thread.name.startswith("job-"):
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse_jobs)
    bench.push("a")
    with pytest.raises(RuntimeError, match="can't start new thread"):
        bench.worker.run()
    assert bench.queue.depth(QUEUE).in_flight == 1  # until its lease ends


# -- the spool


def ending(queue: MemoryQueue, job_id: str) -> Ending:
    queue.push(QUEUE, message(job_id))
    claim = queue.claim((QUEUE,), worker="w", lease=60)
    callback = QueuedCallback(queue=QUEUE, callback_id=f"{job_id}-1", job_id=job_id, body=b'{"job_id":"\xc3\xa4"}')
    return Ending(claim=claim, is_final=True, callback=callback)


def test_an_ending_that_the_queue_has_leaves_nothing(tmp_path: Path) -> None:
    queue, spool = MemoryQueue(), DirectorySpool(tmp_path)
    one = ending(queue, "a")
    spool.keep(one)
    (file,) = tmp_path.glob("*.jsonl")
    assert file.stat().st_size > 0
    assert file.stat().st_mode & 0o077 == 0
    spool.forget(one)
    assert file.stat().st_size == 0
    spool.close()
    assert not file.exists()


def test_a_living_workers_spool_is_left_alone(tmp_path: Path) -> None:
    queue, living = MemoryQueue(), DirectorySpool(tmp_path)
    living.keep(ending(queue, "a"))
    other = DirectorySpool(tmp_path)
    other.replay(queue)
    assert queue.depth(QUEUE).in_flight == 1
    living.close()
    other.replay(queue)
    assert queue.depth(QUEUE).in_flight == 0
    other.close()


def test_an_ending_is_told_twice_without_harm_and_never_over_another_workers(tmp_path: Path) -> None:
    queue, spool = MemoryQueue(), DirectorySpool(tmp_path)
    told, fenced = ending(queue, "told"), ending(queue, "fenced")
    spool.keep(told)
    spool.keep(fenced)
    told.tell(queue)
    queue.hand_back(fenced.claim, delay=0)
    queue.claim((QUEUE,), worker="other", lease=60)
    spool.close()
    later = DirectorySpool(tmp_path)
    later.replay(queue)
    later.close()
    assert [callback.job_id for callback in queue.waiting_callbacks(QUEUE)] == ["told"]
    assert queue.depth(QUEUE).in_flight == 1


def test_a_line_that_a_crash_cut_is_dropped_and_the_others_count(tmp_path: Path) -> None:
    queue, spool = MemoryQueue(), DirectorySpool(tmp_path)
    spool.keep(ending(queue, "whole"))
    spool.close()
    (file,) = tmp_path.glob("*.jsonl")
    whole = file.read_bytes()
    file.write_bytes(whole + whole[: len(whole) // 2])
    later = DirectorySpool(tmp_path)
    later.replay(queue)
    later.close()
    assert queue.depth(QUEUE).in_flight == 0


def test_a_spool_stays_as_it_is_while_the_queue_is_away(tmp_path: Path) -> None:
    queue, spool = AbsentQueue(), DirectorySpool(tmp_path)
    spool.keep(ending(queue, "a"))
    spool.close()
    queue.is_away = True
    later = DirectorySpool(tmp_path)
    with pytest.raises(QueueUnavailable):
        later.replay(queue)
    queue.is_away = False
    later.replay(queue)
    later.close()
    assert queue.depth(QUEUE).in_flight == 0


def test_a_disk_that_takes_nothing_does_not_keep_the_outcome_from_the_queue(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    queue, spool = MemoryQueue(), DirectorySpool(tmp_path)
    one = ending(queue, "a")
    spool._file.close()
    spool._file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115
    spool.keep(one)
    assert "not in the spool" in caplog.text
    assert one.tell(queue) is FinishAnswer.DONE
    spool.close()
