"""An engine in this very process: for tests and for debugging a plugin, where a crash may be a crash."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

from ourvidz_core.engine.context import EngineContext
from ourvidz_core.engine.host import OnMoment, OnProgress, OnText, ignore_moment, ignore_progress, ignore_text
from ourvidz_core.engine.models import ModelCache
from ourvidz_core.engine.perform import perform, warm_up
from ourvidz_core.plugins.registry import Registry
from ourvidz_core.settings import Settings
from ourvidz_core.wire.artifacts import FinishedGeneration
from ourvidz_core.wire.jobs import Job
from ourvidz_core.wire.states import EngineState


class LocalEngine:
    """Takes the same walk as the engine process, without its protection."""

    def __init__(self, registry: Registry, settings: Settings) -> None:
        self._registry = registry
        self._device = settings.device
        self._models = ModelCache.of(settings)

    @property
    def state(self) -> EngineState:
        """It is always there."""
        return EngineState.READY

    def run(
        self,
        job: Job,
        *,
        work_dir: Path,
        timeout_seconds: float,
        on_progress: OnProgress = ignore_progress,
        on_begun: OnMoment = ignore_moment,
        on_generated: OnMoment = ignore_moment,  # noqa: ARG002 - it has no next job to give the device to
        cancelled: threading.Event | None = None,
    ) -> FinishedGeneration:
        """Generate ``job`` here and now; see :meth:`~ourvidz_core.engine.host.Engine.run`."""
        on_begun()
        context = EngineContext(
            work_dir=work_dir,
            models=self._models,
            timeout_seconds=timeout_seconds,
            device=self._device,
            on_progress=on_progress,
            cancelled=cancelled,
        )
        return perform(self._registry, job, context)

    def warm_up(
        self,
        distribution: str,
        job_types: Sequence[str],
        *,
        timeout_seconds: float,
        on_doing: OnText = ignore_text,  # noqa: ARG002 - its log is this process's own
        cancelled: threading.Event | None = None,
    ) -> None:
        """See :meth:`~ourvidz_core.engine.host.Engine.warm_up`."""
        with tempfile.TemporaryDirectory() as directory:
            context = EngineContext(
                work_dir=Path(directory),
                models=self._models,
                timeout_seconds=timeout_seconds,
                device=self._device,
                cancelled=cancelled,
            )
            warm_up(self._registry, distribution, job_types, context)

    def close(self) -> None:
        """Forget the warm models."""
        self._models.clear()
