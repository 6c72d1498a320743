"""What a generation leaves: local files (artifacts), and what storage keeps of them (assets)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from attrs import field, frozen

from ourvidz_core.wire.jobs import Job


@frozen(kw_only=True)
class Artifact:
    """A file that a generation left in the job's work directory.

    ``width`` and ``height`` are pixels, ``frames`` counts a video's frames.
    """

    path: Path
    media_type: str
    seed: int | None = None
    width: int | None = None
    height: int | None = None
    frames: int | None = None


@frozen(kw_only=True)
class Generation:
    """What ``generate`` answers: the artifacts in order, and what is true of how they were made.

    Where the pixels are there and only the files are not, it answers ``finish`` in place of the
    artifacts: a function that writes the files and returns the artifacts. The device is then free
    for the next job, and ``finish`` runs beside it, in another thread: it must not use the device,
    nor ``context.models``. It holds what it writes as memory of the host, not of the device.
    """

    artifacts: tuple[Artifact, ...] = ()
    #: JSON-safe facts for the callback's metadata: the method, the model, the size, ...
    facts: Mapping[str, Any] = field(factory=dict)
    #: Writes the files; whoever wraps ``generate`` to change them wraps this.
    finish: Callable[[], tuple[Artifact, ...]] | None = field(default=None, repr=False)


@frozen(kw_only=True)
class FinishedGeneration:
    """What an engine gives back: the job as it was prepared, and its generation."""

    job: Job
    generation: Generation
    #: What the job itself took: prepare, command, generate and finish, without what it waited for in between.
    seconds: float
    #: Device figures of this generation, empty without a GPU: ``vram_used_gb`` and so on.
    device_facts: Mapping[str, Any] = field(factory=dict)


@frozen(kw_only=True)
class Asset:
    """An artifact that storage has taken, and that was verified to be there."""

    bucket: str
    #: Path inside the bucket: ``{user_id}/{job_id}_{index}.{extension}``.
    path: str
    media_type: str
    size_bytes: int
    sha256: str
    #: What goes into the callback's ``assets``: the path, a URL or an object, by setting.
    reported_as: Any = None
