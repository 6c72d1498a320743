"""Enlarge the image that a job refers to. One job type, made in the engine process."""

from __future__ import annotations

from attrs import frozen

from ourvidz_core import Artifact, ContentType, Generation, Job, JobContext, JobType, PayloadError, hookimpl


@frozen(kw_only=True)
class UpscaleConfig:
    """What a message's ``config`` may say."""

    factor: int = 2


@hookimpl
def register_job_types():
    """Own one job type; its jobs come from a queue of its own."""
    yield JobType(
        name="acme_upscale",
        queue="acme_queue",
        content_type=ContentType.IMAGE,
        preset=UpscaleConfig(),
        sample={"config": {"image": "https://storage.example.test/small.png", "factor": 3}},
    )


@hookimpl
def prepare_job(job: Job) -> None:
    """Refuse what cannot be made. The reference is a local PNG by now, fetched and checked by the framework."""
    if job.references.single is None:
        raise PayloadError("an acme_upscale job needs config.image, the URL of the image to enlarge")
    if not 2 <= job.config.factor <= 8:
        raise PayloadError(f"$.config.factor: expected 2 to 8, got {job.config.factor}")


@hookimpl
def generate(job: Job, context: JobContext) -> Generation:
    """Enlarge the image and leave it in the job's own directory."""
    from PIL import Image  # imported where it is used, so that listing plugins stays fast

    factor = job.config.factor
    with Image.open(job.references.single.path) as image:
        context.progress(0, 1, stage="upscale")
        enlarged = image.resize((image.width * factor, image.height * factor), Image.Resampling.LANCZOS)
    path = context.output_path("png")
    enlarged.save(path)
    context.progress(1, 1, stage="upscale")
    return Generation(artifacts=(Artifact(path=path, media_type="image/png"),), facts={"factor": factor})
