"""The engine as jobs share it: one at a time, in order, with a guess of when it is free."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from ourvidz_core.engine.host import Engine, OnProgress, ignore_progress
from ourvidz_core.errors import JobCancelled
from ourvidz_core.wire.artifacts import FinishedGeneration
from ourvidz_core.wire.events import Event, GenerationStarted
from ourvidz_core.wire.jobs import Job
from ourvidz_core.wire.states import EngineState

#: How often a job that waits for its turn looks whether it was cancelled.
_LOOK_SECONDS = 0.2


class EngineSlot:
    """Gives the engine to one job after another, in the order in which they asked."""

    def __init__(self, engine: Engine, *, report: Callable[[Event], None] = lambda event: None) -> None:
        self._engine = engine
        self._report = report
        self._turn = threading.Condition()
        self._waiting: deque[object] = deque()
        self._stage_started: float | None = None
        self._seconds_left: float | None = None
        self._turn_started: float | None = None
        self._working_on: tuple[str, Path] | None = None
        self._busy_before = 0.0

    @property
    def state(self) -> EngineState:
        """What the engine is doing."""
        return self._engine.state

    @property
    def working_on(self) -> tuple[str, Path] | None:
        """The id and the work directory of the job that has the engine."""
        return self._working_on

    @property
    def busy_seconds(self) -> float:
        """How long jobs have had the engine, all together, the present one included."""
        with self._turn:
            present = time.monotonic() - self._turn_started if self._turn_started is not None else 0.0
            return self._busy_before + present

    def run(
        self,
        job: Job,
        *,
        work_dir: Path,
        timeout_seconds: float,
        on_progress: OnProgress = ignore_progress,
        cancelled: threading.Event | None = None,
    ) -> FinishedGeneration:
        """Generate ``job`` when its turn comes; see :meth:`~ourvidz_core.engine.host.Engine.run`."""
        stage_of: list[str] = []

        def watched(stage: str, step: int, total: int) -> None:
            self._estimate(step, total, is_new=stage_of != [stage])
            stage_of[:] = [stage]
            on_progress(stage, step, total)

        ticket = object()
        asked_at = time.monotonic()
        with self._turn:
            self._waiting.append(ticket)
            while not self._turn.wait_for(lambda: self._waiting[0] is ticket, timeout=_LOOK_SECONDS):
                if cancelled is not None and cancelled.is_set():
                    self._waiting.remove(ticket)
                    raise JobCancelled("the job was cancelled before its turn at the engine")
            self._stage_started = self._seconds_left = None
            self._turn_started = time.monotonic()
            self._working_on = (job.id, work_dir)
        try:
            self._report(
                GenerationStarted(job_id=job.id, job_type=job.job_type, waited_seconds=time.monotonic() - asked_at)
            )
            return self._engine.run(
                job,
                work_dir=work_dir,
                timeout_seconds=timeout_seconds,
                on_progress=watched,
                cancelled=cancelled,
            )
        finally:
            with self._turn:
                self._waiting.popleft()
                self._busy_before += time.monotonic() - self._turn_started
                self._turn_started = self._working_on = None
                self._turn.notify_all()

    def warm_up(
        self,
        distribution: str,
        job_types: Sequence[str],
        *,
        timeout_seconds: float,
        cancelled: threading.Event | None = None,
    ) -> None:
        """Before any job asks: see :meth:`~ourvidz_core.engine.host.Engine.warm_up`."""
        self._engine.warm_up(distribution, job_types, timeout_seconds=timeout_seconds, cancelled=cancelled)

    def is_nearly_free(self, seconds: float) -> bool:
        """Whether one job has the engine, none waits for it, and it is likely to end within ``seconds``."""
        with self._turn:
            return len(self._waiting) == 1 and self._seconds_left is not None and self._seconds_left <= seconds

    def close(self) -> None:
        """End the engine."""
        self._engine.close()

    def _estimate(self, step: int, total: int, *, is_new: bool) -> None:
        now = time.monotonic()
        with self._turn:
            if is_new or self._stage_started is None:
                self._stage_started = now
                self._seconds_left = None
            elif step > 0:
                self._seconds_left = (now - self._stage_started) / step * (total - step)
