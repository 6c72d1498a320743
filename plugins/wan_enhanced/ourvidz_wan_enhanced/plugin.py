"""The hooks of the enhanced WAN job types. Light: what needs torch is imported when a job runs."""

from __future__ import annotations

from collections.abc import Iterable

from ourvidz_wan.execution import build_wan_command, generate_wan, prepare_wan_job

from ourvidz_core.plugins.context import JobContext
from ourvidz_core.plugins.hookspecs import ReadSettings, hookimpl
from ourvidz_core.wire.artifacts import Generation
from ourvidz_core.wire.commands import Command
from ourvidz_core.wire.findings import Check
from ourvidz_core.wire.job_types import JobType
from ourvidz_core.wire.jobs import Job
from ourvidz_core.wire.payloads import Payload
from ourvidz_wan_enhanced.doctor import enhanced_checks
from ourvidz_wan_enhanced.enhancement import enhance_job, warm_up_writer
from ourvidz_wan_enhanced.job_types import JOB_TYPES
from ourvidz_wan_enhanced.jobs import parse_enhanced_job

#: What a file says of its prompt beside the facts that WAN writes.
FACTS_OF_FILE = ("enhancement", "enhancement_model")


@hookimpl
def register_job_types() -> Iterable[JobType]:
    """The four enhanced WAN job types."""
    return JOB_TYPES


@hookimpl
def parse_job(job_type: JobType, payload: Payload) -> Job:
    """By the contract's rows for WAN, and the switch of the enhancement."""
    return parse_enhanced_job(job_type, payload)


@hookimpl
def prepare_job(job: Job, context: JobContext) -> Job:
    """Say which task will run, and rewrite the prompt."""
    return enhance_job(prepare_wan_job(job, context), context)


@hookimpl
def build_command(job: Job, context: JobContext) -> Command:
    """WAN's own command line; it carries the enhanced prompt where there is one, and what that was made of."""
    metadata = {name: job.facts[name] for name in FACTS_OF_FILE if job.facts.get(name) is not None}
    if job.enhanced_prompt is not None:
        metadata["original_prompt"] = job.prompt
    return build_wan_command(job, context, metadata=metadata)


@hookimpl
def generate(job: Job, command: Command, context: JobContext) -> Generation:
    """WAN's own generation."""
    return generate_wan(job, command, context)


@hookimpl
def warm_up(context: JobContext) -> None:
    """Load the language model. The generator's weights are warmed by WAN's own plugin, which is asked too."""
    warm_up_writer(context)


@hookimpl
def doctor_checks(settings: ReadSettings) -> Iterable[Check]:
    """Whether the model files are there and whole."""
    return enhanced_checks(settings)
