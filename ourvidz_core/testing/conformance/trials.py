"""The engine that checks run jobs on, and contexts in which something goes wrong.

What is wrong is real where it can be: the deadline has passed, the command ends with
exit status 3. Only the memory that runs out is acted.
"""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import attrs

from ourvidz_core.engine.context import EngineContext
from ourvidz_core.engine.host import OnProgress, ignore_progress
from ourvidz_core.engine.local import LocalEngine
from ourvidz_core.engine.models import ModelCache
from ourvidz_core.engine.perform import perform
from ourvidz_core.errors import EngineStalled, JobError, JobTimeout, OutOfMemory
from ourvidz_core.plugins.context import Models
from ourvidz_core.plugins.registry import Registry
from ourvidz_core.settings import Settings
from ourvidz_core.wire.artifacts import Artifact, FinishedGeneration
from ourvidz_core.wire.commands import Command
from ourvidz_core.wire.jobs import Job

Model = TypeVar("Model")

_FAILING_PROGRAM = "print('the program of the check fails'); raise SystemExit(3)"


class OutOfMemoryError(RuntimeError):
    """Named as torch names its own."""


class TrialContext(EngineContext):
    """The engine's context; remembers whether the plugin met the trouble."""

    is_met = False

    def progress(self, step: int, total: int, *, stage: str = "generate") -> None:
        """Report a step, and remember that the plugin was told to stop."""
        try:
            super().progress(step, total, stage=stage)
        except JobTimeout:
            self.is_met = True
            raise

    def run(self, command: Command) -> tuple[Artifact, ...]:
        """Run the command, and remember that the plugin was told to stop."""
        try:
            return super().run(command)
        except JobTimeout:
            self.is_met = True
            raise


class NoMemoryContext(TrialContext):
    """Whatever touches the device is out of memory, again and again."""

    def __init__(self, **parts: Any) -> None:
        super().__init__(**{**parts, "models": _NoRoom(self._refuse)})

    def progress(self, step: int, total: int, *, stage: str = "generate") -> None:  # noqa: ARG002 - the protocol's
        """A step of a sampler that has no memory left."""
        self._refuse()

    def run(self, command: Command) -> tuple[Artifact, ...]:
        """A command that ends as torch does without memory."""
        self.is_met = True
        raise OutOfMemory(f"{command.argv[0]} had too little device memory for this job")

    def _refuse(self) -> None:
        self.is_met = True
        raise OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


class FailingCommandContext(TrialContext):
    """Runs a program that ends with exit status 3, in place of the one that was asked for."""

    def run(self, command: Command) -> tuple[Artifact, ...]:
        """Really run it, in the command's own surroundings."""
        self.is_met = True
        return super().run(attrs.evolve(command, argv=(sys.executable, "-c", _FAILING_PROGRAM)))


class _NoRoom(Models):
    def __init__(self, refuse: Callable[[], None]) -> None:
        self._refuse = refuse

    def get(self, key: str, load: Callable[[], Model], *, vram_gb: float = 0.0) -> Model:  # noqa: ARG002
        self._refuse()
        raise AssertionError("refusing raises")

    def drop(self, key: str) -> None:
        """There is nothing."""


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
        context_class: type[TrialContext] = TrialContext,
        patience_seconds: float,
    ) -> None:
        super().__init__(registry, settings)
        self._models = models
        self._context_class = context_class
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
        cancelled: threading.Event | None = None,
    ) -> FinishedGeneration:
        """Generate ``job``; see :meth:`~ourvidz_core.engine.host.Engine.run`."""
        self.context = context = self._context_class(
            work_dir=work_dir,
            models=self._models,
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
