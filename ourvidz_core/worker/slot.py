"""The engine as jobs share it: one has the device, the next waits beside it, with a guess of when it is free."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import attrs

from ourvidz_core.engine.host import Engine, OnMoment, OnProgress, OnText, ignore_moment, ignore_progress, ignore_text
from ourvidz_core.errors import JobCancelled
from ourvidz_core.wire.artifacts import FinishedGeneration
from ourvidz_core.wire.events import Event, GenerationStarted
from ourvidz_core.wire.jobs import Job
from ourvidz_core.wire.states import EngineState

#: How often a job that waits for its turn looks whether it was cancelled.
_LOOK_SECONDS = 0.2


@attrs.define(kw_only=True, eq=False)
class _Turn:
    """A job that wants the device, or has it."""

    job: Job
    work_dir: Path
    begun_at: float | None = None
    stage: str | None = None
    stage_began_at: float = 0.0
    #: By its steps; None where it has reported too few.
    seconds_left: float | None = None


class EngineSlot:
    """Gives the engine to jobs in the order in which they asked.

    ``ahead`` jobs are with the engine already while another has the device: the engine passes it on by itself.
    """

    def __init__(self, engine: Engine, *, report: Callable[[Event], None] = lambda event: None, ahead: int = 0) -> None:
        self._engine = engine
        self._report = report
        self._ahead = ahead
        self._changed = threading.Condition()
        self._turns: list[_Turn] = []
        self._busy_before = 0.0
        self._doing: str | None = None
        #: What a job of each type had the device for, the last time.
        self._usual_seconds: dict[str, float] = {}

    @property
    def state(self) -> EngineState:
        """What the engine is doing."""
        return self._engine.state

    @property
    def doing(self) -> str | None:
        """What the engine says it is about while it warms up; None when it does not, or has said nothing yet."""
        return self._doing

    @property
    def working_on(self) -> tuple[str, Path] | None:
        """The id and the work directory of the job that has the device."""
        with self._changed:
            turn = next((turn for turn in self._turns if turn.begun_at is not None), None)
            return (turn.job.id, turn.work_dir) if turn is not None else None

    @property
    def busy_seconds(self) -> float:
        """How long jobs have had the device, all together, the present one included."""
        with self._changed:
            now = time.monotonic()
            return self._busy_before + sum(now - turn.begun_at for turn in self._turns if turn.begun_at is not None)

    def run(
        self,
        job: Job,
        *,
        work_dir: Path,
        timeout_seconds: float,
        on_progress: OnProgress = ignore_progress,
        on_begun: OnMoment = ignore_moment,
        on_generated: OnMoment = ignore_moment,
        cancelled: threading.Event | None = None,
    ) -> FinishedGeneration:
        """Generate ``job`` when its turn comes; see :meth:`~ourvidz_core.engine.host.Engine.run`.

        ``on_generated`` is called however early or late the engine says so.
        """
        turn = _Turn(job=job, work_dir=work_dir)
        asked_at = time.monotonic()

        def begin() -> None:
            with self._changed:
                turn.begun_at = time.monotonic()
            self._report(
                GenerationStarted(job_id=job.id, job_type=job.job_type, waited_seconds=time.monotonic() - asked_at)
            )
            on_begun()

        def watched(stage: str, step: int, total: int) -> None:
            self._estimate(turn, stage, step, total)
            on_progress(stage, step, total)

        def leave() -> None:
            if self._leave(turn):
                on_generated()

        self._wait_for(turn, cancelled)
        try:
            finished = self._engine.run(
                job,
                work_dir=work_dir,
                timeout_seconds=timeout_seconds,
                on_progress=watched,
                on_begun=begin,
                on_generated=leave,
                cancelled=cancelled,
            )
            leave()
            return finished
        finally:
            self._leave(turn)

    def warm_up(
        self,
        distribution: str,
        job_types: Sequence[str],
        *,
        timeout_seconds: float,
        on_doing: OnText = ignore_text,
        cancelled: threading.Event | None = None,
    ) -> None:
        """Before any job asks: see :meth:`~ourvidz_core.engine.host.Engine.warm_up`."""

        def note(text: str) -> None:
            self._doing = text
            on_doing(text)

        try:
            self._engine.warm_up(
                distribution, job_types, timeout_seconds=timeout_seconds, on_doing=note, cancelled=cancelled
            )
        finally:
            self._doing = None

    def seconds_until_free(self, wanted: Sequence[str]) -> float | None:
        """When the device will have done all the jobs of the types ``wanted``, those that asked for it among them.

        None where nobody knows: no job has it, or one is the first of its type and has told too little of itself.
        """
        with self._changed:
            if all(turn.begun_at is None for turn in self._turns):
                return None
            coming = Counter(wanted) - Counter(turn.job.job_type for turn in self._turns)
            left = [*map(self._left_of, self._turns), *map(self._usual_seconds.get, coming.elements())]
            return None if None in left else sum(seconds for seconds in left if seconds is not None)

    def close(self) -> None:
        """End the engine."""
        self._engine.close()

    def _wait_for(self, turn: _Turn, cancelled: threading.Event | None) -> None:
        with self._changed:
            self._turns.append(turn)
            while not self._changed.wait_for(lambda: turn in self._turns[: 1 + self._ahead], timeout=_LOOK_SECONDS):
                if cancelled is not None and cancelled.is_set():
                    self._turns.remove(turn)
                    self._changed.notify_all()
                    raise JobCancelled("the job was cancelled before its turn at the engine")

    def _leave(self, turn: _Turn) -> bool:
        """Whether it had not left before."""
        with self._changed:
            if turn not in self._turns:
                return False
            self._turns.remove(turn)
            if turn.begun_at is not None:
                seconds = time.monotonic() - turn.begun_at
                self._busy_before += seconds
                self._usual_seconds[turn.job.job_type] = seconds
            self._changed.notify_all()
            return True

    def _left_of(self, turn: _Turn) -> float | None:
        usual = self._usual_seconds.get(turn.job.job_type)
        if turn.seconds_left is not None or usual is None:
            return turn.seconds_left
        return usual if turn.begun_at is None else max(usual - (time.monotonic() - turn.begun_at), 0.0)

    def _estimate(self, turn: _Turn, stage: str, step: int, total: int) -> None:
        now = time.monotonic()
        with self._changed:
            if turn.stage != stage:
                turn.stage, turn.stage_began_at, turn.seconds_left = stage, now, None
            elif step > 0:
                turn.seconds_left = (now - turn.stage_began_at) / step * (total - step)
