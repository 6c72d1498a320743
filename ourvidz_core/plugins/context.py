"""What a hook may use while it works on one job: files, models, settings, progress, time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from ourvidz_core.plugins.residency import Residence
from ourvidz_core.wire.artifacts import Artifact
from ourvidz_core.wire.commands import Command

if TYPE_CHECKING:
    from PIL.Image import Image

Model = TypeVar("Model")
Section = TypeVar("Section")


class Models(Protocol):
    """Warm models, kept from job to job within a memory budget.

    What is used stays on the device, what was used longest ago waits in main memory and comes back when it is
    asked for. A model is found in what ``load`` returns: a torch module, a pipeline, or an object that holds them.
    """

    def get(
        self,
        key: str,
        load: Callable[[], Model],
        *,
        vram_gb: float = 0.0,
        parts: Callable[[Model], Mapping[str, Any]] | None = None,
        on_leave: Callable[[Model, str], None] | None = None,
    ) -> Model:
        """The model kept under ``key``, loaded now with ``load`` if it is not there, and brought to the device.

        It stays until another model needs its place; ask for it again in each job. A ``load`` that raises
        leaves nothing behind.

        ``vram_gb`` is what the weights take before they were first measured; others leave until that fits.
        ``parts`` names torch modules that can work one after another, such as ``{"unet": ..., "vae": ...}``; such
        a model comes to the device part by part, when its :meth:`residence` is told that they are used.
        ``on_leave`` is called with the model and the part's name (``model`` for a whole one) before weights leave
        the device: their addresses end, and with them every CUDA graph that was captured on them.
        """
        ...

    def residence(self, key: str) -> Residence:
        """The place of the model under ``key``: says which part is used when, and what for."""
        ...

    def drop(self, key: str) -> None:
        """Forget a model that is broken or too large, and free its memory."""
        ...


class JobContext(Protocol):
    """Given to the hooks that run in the engine, one for each job."""

    #: The job's own directory, empty at first and removed at the end.
    work_dir: Path
    models: Models

    @property
    def device(self) -> str:
        """``cuda``, ``cuda:N`` or ``cpu``."""
        ...

    def settings(self, section: type[Section]) -> Section:
        """The plugin's own settings: see :func:`ourvidz_core.settings.load_section`."""
        ...

    def output_path(self, extension: str) -> Path:
        """A new path in the work directory for the next artifact, such as ``output_0.png``."""
        ...

    def progress(self, step: int, total: int, *, stage: str = "generate") -> None:
        """Say that ``step`` of ``total`` is done. Cheap enough for every sampling step.

        :raises JobCancelled: the job shall stop.
        :raises JobTimeout: its deadline has passed.
        """
        ...

    def preview(self, image: Image | Path | Callable[[], Image | Path]) -> None:
        """Show those who watch the dashboard how far the job has come. Optional, and may be called at every step.

        It does nothing unless ``OURVIDZ_PREVIEWS`` is on, and takes one picture a second, which it scales to at most
        256 pixels. Give a function where making the picture costs something: it is called only when one is due.
        A preview that cannot be made is left out; no job fails for it.
        """
        ...

    @property
    def seconds_left(self) -> float:
        """Seconds until the job's deadline; at most 0 once it has passed."""
        ...

    def run(self, command: Command) -> tuple[Artifact, ...]:
        """Run ``command`` in its own process group and collect its outputs.

        :raises CommandFailed: it ended with a non-zero status; carries the end of its output.
        :raises JobTimeout: it was still running at the deadline; its whole group was killed.
        :raises ArtifactError: an output is missing or empty.
        """
        ...
