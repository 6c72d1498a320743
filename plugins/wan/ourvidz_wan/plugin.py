"""The hooks of the WAN plugin. Light: what needs torch is imported when a job runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ourvidz_core.plugins.context import JobContext
from ourvidz_core.plugins.hookspecs import ReadSettings, hookimpl
from ourvidz_core.wire.artifacts import Generation
from ourvidz_core.wire.commands import Command
from ourvidz_core.wire.findings import Check
from ourvidz_core.wire.job_types import JobType
from ourvidz_core.wire.jobs import Job
from ourvidz_core.wire.payloads import Payload
from ourvidz_wan.doctor import wan_checks
from ourvidz_wan.execution import build_wan_command, generate_wan, prepare_wan_job, warm_up_wan
from ourvidz_wan.job_types import JOB_TYPES
from ourvidz_wan.jobs import parse_wan_job


@hookimpl
def register_job_types() -> Iterable[JobType]:
    """The four WAN job types."""
    return JOB_TYPES


@hookimpl
def parse_job(job_type: JobType, payload: Payload) -> Job:
    """By the contract's rows for WAN."""
    return parse_wan_job(job_type, payload)


@hookimpl
def prepare_job(job: Job, context: JobContext) -> Job:
    """Say which task will run."""
    return prepare_wan_job(job, context)


@hookimpl
def build_command(job: Job, context: JobContext) -> Command:
    """The ``wan_generate`` command line."""
    return build_wan_command(job, context)


@hookimpl
def generate(job: Job, command: Command, context: JobContext) -> Generation:
    """In the warm engine, or as a subprocess by setting."""
    return generate_wan(job, command, context)


@hookimpl
def warm_up(context: JobContext, job_types: Sequence[JobType]) -> None:
    """Load the weights and make an image of one step with them."""
    warm_up_wan(context, job_types)


@hookimpl
def doctor_checks(settings: ReadSettings) -> Iterable[Check]:
    """Whether the model files are there and whole."""
    return wan_checks(settings)
