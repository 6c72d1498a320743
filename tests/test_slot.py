"""The device as jobs share it: who has it, who waits beside it, and when it will be free."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import attrs
import pytest

from ourvidz_core.wire.artifacts import FinishedGeneration, Generation
from ourvidz_core.wire.jobs import Job
from ourvidz_core.worker.slot import EngineSlot


@attrs.define
class GatedEngine:
    """Generates one job after the other as they came, each step when the test says so."""

    entered: list[str] = attrs.field(factory=list)
    gates: dict[str, threading.Semaphore] = attrs.field(factory=dict)
    generated: int = 0
    changed: threading.Condition = attrs.field(factory=threading.Condition)

    def run(
        self,
        job: Job,
        *,
        on_begun: Callable[[], None],
        on_generated: Callable[[], None],
        on_progress: Callable[[str, int, int], None],
        **_: object,
    ) -> FinishedGeneration:
        gate = self.gates.setdefault(job.id, threading.Semaphore(0))
        with self.changed:
            self.entered.append(job.id)
            assert self.changed.wait_for(lambda: self.entered[self.generated] == job.id, timeout=10)
        on_begun()
        for step in range(3):
            assert gate.acquire(timeout=10)
            on_progress("denoise", step, 2)
        with self.changed:
            self.generated += 1
            self.changed.notify_all()
        on_generated()
        assert gate.acquire(timeout=10)
        return FinishedGeneration(job=job, generation=Generation(), seconds=1.0)

    def let(self, job_id: str, steps: int) -> None:
        self.gates.setdefault(job_id, threading.Semaphore(0)).release(steps)


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


def ask(threads: ThreadPoolExecutor, slot: EngineSlot, job_id: str, tmp_path: Path, **parts: object) -> Future:
    job = Job(id=job_id, job_type="acme", user_id="u", prompt="", seed=1, config=None)
    asked = threads.submit(slot.run, job, work_dir=tmp_path / job_id, timeout_seconds=5, **parts)
    wait_for(lambda: any(turn.job.id == job_id for turn in slot._turns) or asked.done())
    return asked


def wait_for(condition: Callable[[], object]) -> None:
    waiting = threading.Event()
    for _ in range(1000):
        if condition():
            return
        waiting.wait(0.01)
    raise AssertionError("it did not come to be")


def test_one_job_is_with_the_engine_ahead_of_its_turn_and_another_when_the_device_is_free(
    threads: ThreadPoolExecutor, tmp_path: Path
) -> None:
    engine = GatedEngine()
    slot = EngineSlot(engine, ahead=1)
    first = ask(threads, slot, "a", tmp_path)
    wait_for(lambda: slot.working_on)
    for name in ("b", "c"):
        ask(threads, slot, name, tmp_path)
    wait_for(lambda: len(engine.entered) == 2)
    assert (engine.entered, slot.working_on) == (["a", "b"], ("a", tmp_path / "a"))

    engine.let("a", 3)  # its files are still to be written
    wait_for(lambda: len(engine.entered) == 3)
    wait_for(lambda: slot.working_on == ("b", tmp_path / "b"))

    assert not first.done()
    for name in ("a", "b", "c"):
        engine.let(name, 4)


def test_the_time_until_the_device_is_free_counts_every_job_that_wants_it(
    threads: ThreadPoolExecutor, tmp_path: Path
) -> None:
    engine = GatedEngine()
    slot = EngineSlot(engine, ahead=1)
    assert slot.seconds_until_free(["acme"]) is None
    first = ask(threads, slot, "a", tmp_path)
    wait_for(lambda: slot.working_on)
    assert slot.seconds_until_free(["acme"]) is None, "the first of its type has told nothing"
    engine.let("a", 4)
    first.result(10)

    second = ask(threads, slot, "b", tmp_path)
    engine.let("b", 2)
    wait_for(lambda: slot.seconds_until_free(["acme"]) is not None)
    one, two = slot.seconds_until_free(["acme"]), slot.seconds_until_free(["acme", "acme"])

    assert one is not None
    assert two is not None
    assert one < two
    assert slot.seconds_until_free(["acme", "other"]) is None
    engine.let("b", 4)
    second.result(10)


def test_a_job_is_said_to_be_generated_once_however_its_engine_says_so(
    threads: ThreadPoolExecutor, tmp_path: Path
) -> None:
    engine, heard = GatedEngine(), []
    slot = EngineSlot(engine)
    engine.let("a", 4)
    ask(threads, slot, "a", tmp_path, on_generated=lambda: heard.append("generated")).result(10)

    assert heard == ["generated"]
    assert slot.busy_seconds > 0
