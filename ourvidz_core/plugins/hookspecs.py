"""The hooks, in the order a job meets them.

A plugin that registers job types is their *owner*: where the first answer counts, the
owner of the job's type is asked and nobody else, so no plugin needs to look at
``job.job_type`` first. A plugin that registers none is an *extension*: its hook wrappers,
its reviews, ``enrich_metadata`` and ``handle_event`` apply to every job.

The major version of ``ourvidz-core`` is the version of these hooks. A new hook and a new
argument come with a minor version; one that shall go is deprecated for two minor versions
first, and ``ourvidz plugins list`` tells each plugin that still implements it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import pluggy

from ourvidz_core.plugins.context import JobContext
from ourvidz_core.wire.artifacts import Artifact, Generation
from ourvidz_core.wire.commands import Command
from ourvidz_core.wire.events import Event
from ourvidz_core.wire.findings import Check
from ourvidz_core.wire.job_types import JobType
from ourvidz_core.wire.jobs import Job
from ourvidz_core.wire.payloads import Payload

PROJECT = "ourvidz"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)
Section = TypeVar("Section")


class ReadSettings(Protocol):
    """Reads a plugin's own settings: see :func:`ourvidz_core.settings.load_section`."""

    def __call__(self, section: type[Section]) -> Section:
        """The settings of ``section``."""
        ...


@hookspec
def register_job_types() -> Iterable[JobType]:  # type: ignore[empty-body]
    """Declare the job types that this plugin owns.

    Called once in every process, after all plugins are loaded; every plugin is asked.
    Must be fast and import nothing heavy. An extension does not implement it.

    Example: ``yield JobType(name="acme_upscale", queue="acme_queue", content_type="image")``
    """


@hookspec(firstresult=True)
def parse_job(job_type: JobType, payload: Payload) -> Job | None:
    """Turn a payload into a job: choose its seed, its configuration and its references.

    Called in the worker, once per attempt; only the owner is asked. Must be pure: no
    file, no network, no clock. Return None for the default, which structures
    ``payload.config`` over the type's preset. Raise ``PayloadError`` for a wrong message:
    here, so that ``ourvidz validate`` finds it. Whoever reads other keys than the preset's
    fields declares them, as ``config_keys`` and ``metadata_keys`` of the job type.

    Example: ``return attrs.evolve(default_job(job_type, payload), prompt=payload.prompt.strip())``
    """


@hookspec
def review_job(job: Job) -> None:
    """Let the job pass, or refuse it, before anything is fetched or generated.

    Called in the worker after ``parse_job``, and again in the engine where ``prepare_job``
    has changed the job, for example its prompt; the owner and every extension are asked.
    Must be fast. Raise ``PolicyRefused`` with the reason to refuse: the job is not tried
    again. Any other error fails it as well, so nothing passes a policy that is broken.

    Example: ``if "forbidden" in job.prompt: raise PolicyRefused("the prompt is not allowed here")``
    """


@hookspec(firstresult=True)
def prepare_job(job: Job, context: JobContext) -> Job | None:
    """Change the job before anything is generated, for example its prompt.

    Called in the engine after the references were fetched; only the owner is asked.
    May be slow and may use the device. Return None to leave the job as it is.

    Example: ``return attrs.evolve(job, enhanced_prompt=enhance(job.prompt))``
    """


@hookspec(firstresult=True)
def build_command(job: Job, context: JobContext) -> Command | None:
    """Describe the subprocess that generates this job.

    Called once per attempt after ``prepare_job``, and by ``ourvidz run --plan``; only
    the owner is asked. Must not touch the device. Return None to generate in this process.

    Example: ``return Command(argv=("upscale", f"--prompt={job.prompt}", context.output_path("png")))``
    """


@hookspec(firstresult=True)
def generate(job: Job, command: Command | None, context: JobContext) -> Generation | None:
    """Make the job's artifacts, in the order of its assets.

    Called in the engine, one job at a time; only the owner is asked. Call
    ``context.progress`` at every step. Return None for the default, which runs
    ``command`` and collects its outputs. Raise an error of ``ourvidz_core.errors`` to say
    what went wrong; any other exception fails the job under its own name.

    Encoding and writing need no device: return ``Generation(finish=...)`` with a function that
    does so and returns the artifacts, and the next job gets the device meanwhile. The function
    runs in another thread, so it holds its pixels in the host's memory and uses neither the
    device nor ``context.models``; ``context.progress`` and ``context.output_path`` it may use.

    Example: ``return Generation(artifacts=context.run(command), facts={"model": "upscale-2"})``
    """


@hookspec
def review_artifact(job: Job, artifact: Artifact, context: JobContext) -> None:
    """Let an artifact pass, or refuse the whole job because of it, before anything is uploaded.

    Called in the engine for each artifact after all are made and were found to be whole;
    the owner and every extension are asked. May be slow and may use the device, which it
    has to itself, between two jobs; a model that it needs is best kept in
    ``context.models``. Must not change the file. Raise
    ``PolicyRefused`` with the reason to refuse; any other error fails the job as well.

    Example: ``if is_unsafe(artifact.path): raise PolicyRefused("an image is not allowed here")``
    """


@hookspec(firstresult=True)
def choose_bucket(job: Job, artifact: Artifact) -> str | None:
    """Name the storage bucket of one artifact.

    Called in the worker for each artifact; only the owner is asked. Return None for the
    bucket that the job type registered.

    Example: ``return "previews" if artifact.width < 512 else None``
    """


@hookspec
def enrich_metadata(job: Job, generation: Generation) -> Mapping[str, Any] | None:
    """Add facts to the metadata of the ``completed`` callback.

    Called in the worker after the generation; the owner and every extension are asked.
    Values must be JSON. A key that somebody else has already reported fails the job with
    ``MetadataClash``, so nothing is silently overwritten.

    Example: ``return {"acme_model": generation.facts["model"]}``
    """


@hookspec
def handle_event(event: Event) -> None:
    """Observe what happens to jobs.

    Called in the worker for each event; every plugin is asked, each guarded: one that
    raises is logged and the others still hear the event. Must be fast.

    Example: ``if isinstance(event, JobFailed): failures.labels(event.error_type).inc()``
    """


@hookspec
def warm_up(context: JobContext, job_types: Sequence[JobType]) -> None:
    """Make ready what jobs of ``job_types`` will need, above all models in ``context.models``.

    Called in the engine before the first job where a worker starts with ``--preload``; every
    plugin is asked, each guarded: an owner about its own types among those that the worker
    serves, an extension about all of them. May be slow and may use the device. An error is
    reported, and the worker serves all the same.

    Example: ``context.models.get("acme", lambda: load_acme(context.device), vram_gb=6)``
    """


@hookspec
def doctor_checks(settings: ReadSettings) -> Iterable[Check]:  # type: ignore[empty-body]
    """Say what ``ourvidz doctor`` shall look at for this plugin, above all its models.

    Called by ``ourvidz doctor`` and before a worker takes jobs; every plugin is asked, each
    guarded. ``settings(MySettings)`` reads the plugin's own settings. Must be fast: the
    work is in each check's ``run``, which may take until its ``timeout_seconds``, imports
    nothing heavy and never touches the device. A red finding with ``job_types`` keeps those
    types from the worker that found it; only ``is_at_start`` checks are asked then.

    Example: ``yield Check(name="models of acme", run=lambda: look_at(settings(AcmeSettings)), is_at_start=True)``
    """
