"""The context of one job inside the engine: see the protocol in ``plugins.context``."""

from __future__ import annotations

import importlib.util
import logging
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ourvidz_core.engine.commands import run_command
from ourvidz_core.engine.previews import write_preview
from ourvidz_core.errors import ArtifactError, JobCancelled, JobTimeout
from ourvidz_core.plugins.context import Models
from ourvidz_core.settings import load_section
from ourvidz_core.wire.artifacts import Artifact
from ourvidz_core.wire.commands import Command

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)

Section = TypeVar("Section")

#: A preview is for people who watch: they see no more of them than this.
PREVIEW_SECONDS = 1.0

MEDIA_TYPES: Mapping[str, str] = {
    "png": "image/png",
    "jpg": "image/jpeg",
    "jpeg": "image/jpeg",
    "webp": "image/webp",
    "mp4": "video/mp4",
    "webm": "video/webm",
}


class EngineContext:
    """What the hooks of one job may use."""

    def __init__(
        self,
        *,
        work_dir: Path,
        models: Models,
        timeout_seconds: float,
        device: str = "auto",
        on_progress: Callable[[str, int, int], None] = lambda stage, step, total: None,
        cancelled: threading.Event | None = None,
        environ: Mapping[str, str] | None = None,
        previews: bool = False,
        preview_seconds: float = PREVIEW_SECONDS,
    ) -> None:
        self.work_dir = work_dir
        self.models = models
        self._device = device
        self._timeout_seconds = timeout_seconds
        self._deadline = time.monotonic() + timeout_seconds
        self._on_progress = on_progress
        self._cancelled = cancelled or threading.Event()
        self._environ = environ
        self._outputs: list[Path] = []
        self._previews = previews
        self._preview_seconds = preview_seconds
        self._next_preview = float("-inf")

    @property
    def device(self) -> str:
        """``cuda``, ``cuda:N`` or ``cpu``. Found on first use: a job without a model needs no torch."""
        if self._device == "auto":
            self._device = find_device()
        return self._device

    @property
    def seconds_left(self) -> float:
        """Seconds until the deadline."""
        return self._deadline - time.monotonic()

    def grant(self, seconds: float) -> None:
        """Give the job at least so long from now."""
        self._deadline = max(self._deadline, time.monotonic() + seconds)

    def settings(self, section: type[Section]) -> Section:
        """The plugin's own settings."""
        return load_section(section) if self._environ is None else load_section(section, self._environ)

    def output_path(self, extension: str) -> Path:
        """A new path for the next artifact."""
        path = self.work_dir / f"output_{len(self._outputs)}.{extension.lstrip('.')}"
        self._outputs.append(path)
        return path

    def progress(self, step: int, total: int, *, stage: str = "generate") -> None:
        """Report a step; raises where the job shall stop."""
        self._stop_if_asked()
        self._on_progress(str(stage), int(step), int(total))  # a numpy or torch integer is welcome

    def preview(self, image: Image | Path | Callable[[], Image | Path]) -> None:
        """Show how far the job has come, where that is wanted and due."""
        if not self._previews or time.monotonic() < self._next_preview:
            return
        try:
            write_preview(image() if callable(image) else image, self.work_dir)
        except Exception as error:  # whatever ails a preview, the job goes on
            logger.debug("no preview could be made", exc_info=error)
        self._next_preview = time.monotonic() + self._preview_seconds

    def run(self, command: Command) -> tuple[Artifact, ...]:
        """Run the command and collect its outputs."""
        self._stop_if_asked()
        run_command(
            command,
            cwd=self.work_dir,
            timeout_seconds=max(self.seconds_left, 0.0),
            on_progress=lambda step, total: self.progress(step, total, stage="command"),
            check=self._stop_if_asked,
        )
        outputs = command.outputs or tuple(self._outputs)
        if not outputs:
            raise ArtifactError(
                f"{command.argv[0]} ended well and no output was declared;"
                " give the command outputs=..., or take its paths from context.output_path"
            )
        base = command.cwd or self.work_dir
        return tuple(_artifact(base / path, command) for path in outputs)

    def stop_if_cancelled(self) -> None:
        """Raise ``JobCancelled`` where somebody wants the job to stop."""
        if self._cancelled.is_set():
            raise JobCancelled("the job was cancelled while it was running")

    def _stop_if_asked(self) -> None:
        self.stop_if_cancelled()
        if self.seconds_left <= 0:
            raise JobTimeout(f"the job was still running after {self._timeout_seconds:g} s and was stopped")


def find_device() -> str:
    """``cuda`` where torch is installed and sees a GPU, else ``cpu``."""
    if importlib.util.find_spec("torch") is None:
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _artifact(path: Path, command: Command) -> Artifact:
    if not path.is_file() or path.stat().st_size == 0:
        state = "is empty" if path.is_file() else "is missing"
        raise ArtifactError(f"{command.argv[0]} ended well but its output {path.name} {state}")
    media_type = MEDIA_TYPES.get(path.suffix.lstrip(".").lower())
    if media_type is None:
        raise ArtifactError(f"{path.name} has an extension that no media type is known for: {sorted(MEDIA_TYPES)}")
    return Artifact(path=path, media_type=media_type)
