"""Turn a message on a queue into stored media and one truthful callback.

This is the one import root for plugin authors; its submodules are for those who embed
or extend the framework itself.
"""

from __future__ import annotations

from ourvidz_core.engine.pictures import write_png
from ourvidz_core.errors import (
    ArtifactError,
    CommandFailed,
    Fault,
    GenerationError,
    JobCancelled,
    JobError,
    JobTimeout,
    ModelUnavailable,
    OutOfMemory,
    PayloadError,
    PolicyRefused,
)
from ourvidz_core.plugins.context import JobContext, Models
from ourvidz_core.plugins.defaults import default_config, default_job, expected_seconds_of
from ourvidz_core.plugins.hookspecs import hookimpl
from ourvidz_core.plugins.residency import Residence, Work
from ourvidz_core.settings import load_section
from ourvidz_core.wire.artifacts import Artifact, Generation
from ourvidz_core.wire.commands import Command
from ourvidz_core.wire.events import (
    AssetStored,
    CallbackDelivered,
    CallbackRefused,
    Event,
    GenerationFinished,
    GenerationProgressed,
    GenerationStarted,
    JobCompleted,
    JobFailed,
    JobReleased,
    JobRetried,
    JobStarted,
    ReferencesFetched,
)
from ourvidz_core.wire.findings import Check, Finding
from ourvidz_core.wire.job_types import ContentType, JobType, Quality
from ourvidz_core.wire.jobs import Job, Reference, ReferenceMode, References, seed_of
from ourvidz_core.wire.keys import ConfigKeys, MetadataKeys
from ourvidz_core.wire.payloads import Payload, without_token

__version__ = "0.1.0"

__all__ = [
    "Artifact",
    "ArtifactError",
    "AssetStored",
    "CallbackDelivered",
    "CallbackRefused",
    "Check",
    "Command",
    "CommandFailed",
    "ConfigKeys",
    "ContentType",
    "Event",
    "Fault",
    "Finding",
    "Generation",
    "GenerationError",
    "GenerationFinished",
    "GenerationProgressed",
    "GenerationStarted",
    "Job",
    "JobCancelled",
    "JobCompleted",
    "JobContext",
    "JobError",
    "JobFailed",
    "JobReleased",
    "JobRetried",
    "JobStarted",
    "JobTimeout",
    "JobType",
    "MetadataKeys",
    "ModelUnavailable",
    "Models",
    "OutOfMemory",
    "Payload",
    "PayloadError",
    "PolicyRefused",
    "Quality",
    "Reference",
    "ReferenceMode",
    "References",
    "ReferencesFetched",
    "Residence",
    "Work",
    "default_config",
    "default_job",
    "expected_seconds_of",
    "hookimpl",
    "load_section",
    "seed_of",
    "without_token",
    "write_png",
]
