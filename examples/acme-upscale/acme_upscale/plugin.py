"""The job type ``acme_upscale``: an image, made in the engine process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import field, frozen, validators

from ourvidz_core import Artifact, ContentType, Generation, Job, JobContext, JobType, PayloadError, hookimpl

if TYPE_CHECKING:
    from PIL.Image import Image


@frozen(kw_only=True)
class Config:
    """What a message's ``config`` may say. Anything else is refused with its path, or reported as ignored."""

    factor: int = field(default=2, validator=[validators.ge(2), validators.le(8)])


@hookimpl
def register_job_types() -> Iterator[JobType]:
    """Own one job type; its jobs come from a queue of its own."""
    yield JobType(
        name="acme_upscale",
        queue="acme_upscale_queue",
        content_type=ContentType.IMAGE,
        preset=Config(),
        sample={"config": {"image": "https://storage.example.test/small.png", "factor": 3}},
    )


@hookimpl
def generate(job: Job, context: JobContext) -> Generation:
    """Make the image and leave it in the job's own directory."""
    model = context.models.get("acme_upscale", load_model, vram_gb=0.0)  # kept warm from job to job
    context.progress(0, 1)  # at every step: it raises where the job shall stop
    if job.references.single is None:
        raise PayloadError("$.config.image: expected the URL of the image to enlarge, got nothing")
    image = model(job.references.single.path, job.config.factor)
    context.progress(1, 1)
    path = context.output_path("png")
    image.save(path)
    artifact = Artifact(path=path, media_type="image/png", seed=job.seed)
    return Generation(artifacts=(artifact,), facts={"model": "lanczos"})


def load_model() -> Callable[[Path, int], Image]:
    """Load what is expensive. Heavy imports belong in here, so that listing plugins stays fast."""
    from PIL import Image

    def enlarge(path: Path, factor: int) -> Image.Image:
        with Image.open(path) as image:
            return image.resize((image.width * factor, image.height * factor), Image.Resampling.LANCZOS)

    return enlarge
