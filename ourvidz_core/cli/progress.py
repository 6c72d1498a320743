"""A progress bar for one job on a terminal: stage, step, time left."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ourvidz_core.wire.jobs import Job


class Show:
    """The bar, as a context manager. Off a terminal it prints nothing."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("starting the engine", total=None)
        self._job_type = ""

    def __enter__(self) -> Show:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def job(self, job: Job) -> None:
        """Name the job whose progress this is."""
        self._job_type = job.job_type
        self._progress.update(self._task, description=f"{job.job_type}: starting")

    def step(self, stage: str, step: int, total: int) -> None:
        """Show that ``step`` of ``total`` is done."""
        self._progress.update(self._task, description=f"{self._job_type}: {stage}", completed=step, total=max(total, 1))
