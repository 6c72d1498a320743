"""The hooks of the SDXL job types. Light: what needs torch is imported where a job is generated."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

from ourvidz_core.plugins.context import JobContext
from ourvidz_core.plugins.hookspecs import ReadSettings, hookimpl
from ourvidz_core.wire.artifacts import Generation
from ourvidz_core.wire.findings import Check
from ourvidz_core.wire.job_types import JobType
from ourvidz_core.wire.jobs import Job
from ourvidz_core.wire.payloads import Payload
from ourvidz_sdxl.config import sdxl_job
from ourvidz_sdxl.doctor import sdxl_checks
from ourvidz_sdxl.job_types import JOB_TYPES

logger = logging.getLogger(__name__)


@hookimpl
def register_job_types() -> Iterable[JobType]:
    """The two SDXL job types."""
    return JOB_TYPES


@hookimpl
def parse_job(job_type: JobType, payload: Payload) -> Job:
    """What the message means to SDXL, and what of it means nothing."""
    return sdxl_job(job_type, payload)


@hookimpl
def generate(job: Job, context: JobContext) -> Generation:
    """Make the job's images with the warm model."""
    from ourvidz_sdxl.generation import generate_images

    return generate_images(job, context)


@hookimpl
def warm_up(context: JobContext, job_types: Sequence[JobType]) -> None:
    """Load the model and draw an image of one step with it."""
    logger.info("importing torch")
    import torch  # noqa: F401 - apart from what follows, for the log's sake

    logger.info("importing diffusers and transformers")
    from ourvidz_sdxl.generation import warm_up_model

    warm_up_model(context, job_types)


@hookimpl
def doctor_checks(settings: ReadSettings) -> Iterable[Check]:
    """Whether the model files are there and whole."""
    return sdxl_checks(settings)
