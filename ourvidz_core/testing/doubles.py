"""Doubles for the tests of plugins and of the framework: a context, an engine and a storage that do as told."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ourvidz_core.delivery.storage import DirectoryStorage
from ourvidz_core.engine.context import EngineContext
from ourvidz_core.engine.host import OnMoment, OnProgress, OnText, ignore_moment, ignore_progress, ignore_text
from ourvidz_core.engine.models import ModelCache
from ourvidz_core.errors import JobError
from ourvidz_core.wire.artifacts import Asset, FinishedGeneration
from ourvidz_core.wire.jobs import Job
from ourvidz_core.wire.states import EngineState


class RecordingContext(EngineContext):
    """The context that a plugin's hooks get, on a directory of the test's; remembers the progress.

    ``environ`` is all that ``settings`` reads, so a test does not depend on its machine. With one ``models`` for
    several contexts, what one job has loaded is warm for the next.
    """

    def __init__(
        self,
        work_dir: Path,
        *,
        environ: Mapping[str, str] | None = None,
        timeout_seconds: float = 60.0,
        device: str = "cpu",
        cancelled: threading.Event | None = None,
        models: ModelCache | None = None,
        previews: bool = False,
        preview_seconds: float = 0.0,
    ) -> None:
        #: What was reported, as (stage, step, total).
        self.steps: list[tuple[str, int, int]] = []
        super().__init__(
            work_dir=work_dir,
            models=models if models is not None else ModelCache(),
            timeout_seconds=timeout_seconds,
            device=device,
            on_progress=lambda stage, step, total: self.steps.append((stage, step, total)),
            cancelled=cancelled,
            environ=environ or {},
            previews=previews,
            preview_seconds=preview_seconds,
        )


class StubEngine:
    """Generates with a function, or fails with an error; remembers the jobs and their directories."""

    def __init__(self, answer: Callable[[Job, Path], FinishedGeneration] | Exception) -> None:
        self._answer = answer
        self.jobs: list[Job] = []
        self.work_dirs: list[Path] = []

    @property
    def state(self) -> EngineState:
        """It is always there."""
        return EngineState.READY

    def run(
        self,
        job: Job,
        *,
        work_dir: Path,
        timeout_seconds: float,  # noqa: ARG002
        on_progress: OnProgress = ignore_progress,
        on_begun: OnMoment = ignore_moment,
        on_generated: OnMoment = ignore_moment,  # noqa: ARG002
        cancelled: threading.Event | None = None,  # noqa: ARG002
    ) -> FinishedGeneration:
        """See :meth:`~ourvidz_core.engine.host.Engine.run`."""
        on_begun()
        self.jobs.append(job)
        self.work_dirs.append(work_dir)
        if isinstance(self._answer, Exception):
            raise self._answer
        on_progress("generate", 1, 1)
        return self._answer(job, work_dir)

    def warm_up(
        self,
        distribution: str,
        job_types: Sequence[str],
        *,
        timeout_seconds: float,
        on_doing: OnText = ignore_text,
        cancelled: threading.Event | None = None,
    ) -> None:
        """It is always warm."""

    def close(self) -> None:
        """There is nothing to end."""


class FaultyStorage:
    """A directory that fails first: call n raises ``faults[n]``, and a None there lets it pass."""

    def __init__(self, root: Path, *faults: JobError | OSError | None) -> None:
        self._directory = DirectoryStorage(root)
        self._faults = list(faults)
        #: The paths that were to be stored, in order.
        self.asked: list[str] = []

    def store(self, file: Path, *, bucket: str, path: str, media_type: str) -> Asset:
        """See :meth:`~ourvidz_core.delivery.storage.Storage.store`."""
        self.asked.append(path)
        fault = self._faults.pop(0) if self._faults else None
        if fault is not None:
            raise fault
        return self._directory.store(file, bucket=bucket, path=path, media_type=media_type)

    def close(self) -> None:
        """There is nothing to close."""
