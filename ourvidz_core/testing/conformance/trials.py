"""The engine that checks run jobs on, and contexts in which something goes wrong.

What is wrong is real where it can be: the deadline has passed, the command ends with
exit status 3. Only the memory that runs out is acted.
"""

from __future__ import annotations

import contextlib
import queue
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import attrs

from ourvidz_core.engine.context import EngineContext
from ourvidz_core.engine.host import OnMoment, OnProgress, ignore_moment, ignore_progress
from ourvidz_core.engine.local import LocalEngine
from ourvidz_core.engine.models import ModelCache
from ourvidz_core.engine.perform import perform
from ourvidz_core.errors import EngineStalled, JobError, JobTimeout, OutOfMemory
from ourvidz_core.plugins.context import Models
from ourvidz_core.plugins.registry import Registry
from ourvidz_core.plugins.residency import Residence
from ourvidz_core.settings import Settings
from ourvidz_core.wire.artifacts import Artifact, FinishedGeneration
from ourvidz_core.wire.commands import Command
from ourvidz_core.wire.jobs import Job

Model = TypeVar("Model")

FAILING_STATUS = 3
_FAILING_PROGRAM = f"print('the program of the check fails'); raise SystemExit({FAILING_STATUS})"


class OutOfMemoryError(RuntimeError):
    """Named as torch names its own."""


class TrialContext(EngineContext):
    """The engine's context; remembers what a plugin used of it, and may be out of memory at one of these."""

    def __init__(self, *, models: ModelCache, without_memory_at: str | None = None, **parts: Any) -> None:
        super().__init__(models=_WatchedModels(models, self._use), **parts)
        self._without_memory_at = without_memory_at
        self._is_command_running = False
        #: ``models``, ``progress`` and ``run``, as far as they were used.
        self.used: set[str] = set()
        #: Whether the plugin met what goes wrong.
        self.is_met = False

    def progress(self, step: int, total: int, *, stage: str = "generate") -> None:
        """Report a step."""
        if not self._is_command_running:  # the command's steps are reported by the context itself
            self._use("progress")
        with self._noting_the_end():
            super().progress(step, total, stage=stage)

    def run(self, command: Command) -> tuple[Artifact, ...]:
        """Run the command; without memory it ends as torch does."""
        try:
            self._use("run")
        except OutOfMemoryError as error:
            raise OutOfMemory(f"{command.argv[0]} had too little device memory for this job: {error}") from error
        self._is_command_running = True
        try:
            with self._noting_the_end():
                return super().run(command)
        finally:
            self._is_command_running = False

    def _use(self, part: str) -> None:
        self.used.add(part)
        if part == self._without_memory_at:
            self.is_met = True
            raise OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    @contextlib.contextmanager
    def _noting_the_end(self) -> Iterator[None]:
        try:
            yield
        except JobTimeout:
            self.is_met = True
            raise


class FailingCommandContext(TrialContext):
    """Runs a program that ends with exit status 3, in place of the one that was asked for."""

    def run(self, command: Command) -> tuple[Artifact, ...]:
        """Really run it, in the command's own surroundings."""
        self.is_met = True
        return super().run(attrs.evolve(command, argv=(sys.executable, "-c", _FAILING_PROGRAM)))


class _WatchedModels(Models):
    def __init__(self, models: ModelCache, use: Callable[[str], None]) -> None:
        self._models = models
        self._use = use

    def get(
        self,
        key: str,
        load: Callable[[], Model],
        *,
        vram_gb: float = 0.0,
        parts: Callable[[Model], Mapping[str, Any]] | None = None,
        on_leave: Callable[[Model, str], None] | None = None,
    ) -> Model:
        self._use("models")
        return self._models.get(key, load, vram_gb=vram_gb, parts=parts, on_leave=on_leave)

    def residence(self, key: str) -> Residence:
        return self._models.residence(key)

    def drop(self, key: str) -> None:
        self._models.drop(key)


class TrialEngine(LocalEngine):
    """An engine in this process that is given up on when it does not stop.

    Remembers the last context, and what became of the last generation.
    """

    def __init__(
        self,
        registry: Registry,
        settings: Settings,
        *,
        models: ModelCache,
        make_context: Callable[..., TrialContext] = TrialContext,
        patience_seconds: float,
    ) -> None:
        super().__init__(registry, settings)
        self._warm_models = models
        self._make_context = make_context
        self._patience_seconds = patience_seconds
        self.context: TrialContext | None = None
        self.finished: FinishedGeneration | None = None
        self.is_hung = False

    def run(
        self,
        job: Job,
        *,
        work_dir: Path,
        timeout_seconds: float,
        on_progress: OnProgress = ignore_progress,
        on_begun: OnMoment = ignore_moment,
        on_generated: OnMoment = ignore_moment,  # noqa: ARG002 - one trial at a time
        cancelled: threading.Event | None = None,
    ) -> FinishedGeneration:
        """Generate ``job``; see :meth:`~ourvidz_core.engine.host.Engine.run`."""
        on_begun()
        self.context = context = self._make_context(
            work_dir=work_dir,
            models=self._warm_models,
            timeout_seconds=timeout_seconds,
            device=self._device,
            on_progress=on_progress,
            cancelled=cancelled,
        )
        answers: queue.SimpleQueue[FinishedGeneration | Exception] = queue.SimpleQueue()

        def work() -> None:
            try:
                answers.put(perform(self._registry, job, context))
            except Exception as error:  # it belongs to the thread that waits
                answers.put(error)

        threading.Thread(target=work, name="conformance", daemon=True).start()
        try:
            answer = answers.get(timeout=timeout_seconds + self._patience_seconds)
        except queue.Empty:
            self.is_hung = True
            raise EngineStalled(f"generate did not end within {self._patience_seconds:g} s of its deadline") from None
        if isinstance(answer, Exception):
            raise answer
        self.finished = answer
        return answer

    def close(self) -> None:
        """The models are the caller's."""


def error_of(error: JobError) -> str:
    """An error as a flaw quotes it."""
    return f"{error.error_type}: {error.message}"
