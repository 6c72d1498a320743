"""The part of a job's walk that happens beside the device: prepare, command, generate, finish, check, review.

:func:`generate` and :func:`review` have the device; :func:`finish` may happen beside the next job.
"""

from __future__ import annotations

import contextlib
import errno
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs
from attrs import frozen

from ourvidz_core.engine.checks import check_artifact
from ourvidz_core.engine.context import EngineContext
from ourvidz_core.engine.device_memory import forget_peak, peak_bytes, release_memory
from ourvidz_core.errors import ArtifactError, DiskFull, EngineUnusable, HookFailed, JobError, OutOfMemory
from ourvidz_core.plugins.registry import Registry
from ourvidz_core.redaction import redact
from ourvidz_core.wire.artifacts import Artifact, FinishedGeneration, Generation
from ourvidz_core.wire.jobs import Job

#: After one of these a CUDA context answers every call with the same error.
STICKY_DEVICE_ERRORS = ("CUDA error", "device-side assert", "CUBLAS_STATUS_EXECUTION_FAILED", "illegal memory access")


@frozen(kw_only=True)
class Generated:
    """A job that the device has done its part for; its files may still have to be written."""

    job: Job
    generation: Generation
    #: Wall time of prepare, command and generate.
    seconds: float
    device_facts: Mapping[str, Any]


def perform(registry: Registry, job: Job, context: EngineContext) -> FinishedGeneration:
    """Generate ``job`` in ``context.work_dir`` and check what came of it.

    :raises PolicyRefused: a plugin does not let it pass.
    :raises JobError: the hooks failed, or an artifact is not what it should be.
    """
    finished = finish(registry, generate(registry, job, context), context)
    review(registry, finished, context)
    return finished


def generate(registry: Registry, job: Job, context: EngineContext) -> Generated:
    """The part of :func:`perform` that has the device."""
    owned = registry.get(job.job_type)
    started = time.monotonic()
    forget_peak()
    with _in_our_words():
        prepared = owned.prepare_job(job, context)
        if prepared != job:
            owned.review_job(prepared)
        with redact.without_prompts(*prepared.texts):
            command = owned.build_command(prepared, context)
            generation = owned.generate(prepared, command, context)
    seconds = time.monotonic() - started
    return Generated(job=prepared, generation=generation, seconds=seconds, device_facts=_device_facts())


def finish(registry: Registry, generated: Generated, context: EngineContext) -> FinishedGeneration:
    """Write the files, where that is still to be done, and check them. Needs no device.

    May run in another thread, beside the next job's :func:`generate`.
    """
    job, owned = generated.job, registry.get(generated.job.job_type)
    started = time.monotonic()
    with _in_our_words(), redact.without_prompts(*job.texts):
        generation = owned.finish(generated.generation)
    seconds = generated.seconds + time.monotonic() - started
    artifacts = []
    for artifact in generation.artifacts:
        context.stop_if_cancelled()
        artifacts.append(_checked(artifact, context, owned.job_type.media_type))
    if job.asset_count is not None and len(artifacts) != job.asset_count:
        raise ArtifactError(f"{job.asset_count} files were asked for and {owned.distribution} made {len(artifacts)}")
    return FinishedGeneration(
        job=job,
        generation=attrs.evolve(generation, artifacts=tuple(artifacts)),
        seconds=seconds,
        device_facts=generated.device_facts,
    )


def review(registry: Registry, finished: FinishedGeneration, context: EngineContext) -> None:
    """Ask whether the artifacts may be stored. Whoever answers may use the device.

    :raises PolicyRefused: somebody refuses one.
    """
    owned = registry.get(finished.job.job_type)
    with _in_our_words(), redact.without_prompts(*finished.job.texts):
        for artifact in finished.generation.artifacts:
            owned.review_artifact(finished.job, artifact, context)


def warm_up(registry: Registry, distribution: str, job_types: Sequence[str], context: EngineContext) -> None:
    """Have the plugin of ``distribution`` make ready what ``job_types`` need.

    :raises JobError: it could not.
    """
    with _in_our_words():
        registry.warm_up(distribution, job_types, context)


def _checked(artifact: Artifact, context: EngineContext, media_type: str) -> Artifact:
    if not artifact.path.resolve().is_relative_to(context.work_dir.resolve()):
        raise ArtifactError(
            f"{artifact.path.name} does not lie in the job's work directory; write to context.output_path(...)"
        )
    return check_artifact(artifact, media_type=media_type)


@contextlib.contextmanager
def _in_our_words() -> Iterator[None]:
    try:
        yield
    except JobError as error:
        raise _machine_error(error) from error


def _machine_error(error: JobError) -> JobError:
    """What torch or the disk raised, in our words. Told by names, so that core needs no torch."""
    if not isinstance(error, HookFailed):
        return error
    cause = error.__cause__
    text = str(cause)
    if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFull(f"no room is left on the worker's disk: {text}; free some, or set OURVIDZ_WORK_DIR")
    if type(cause).__name__ == "OutOfMemoryError" or "out of memory" in text.lower():
        release_memory()
        return OutOfMemory(f"the device has too little memory for this job: {text}")
    if any(sign in text for sign in STICKY_DEVICE_ERRORS):
        return EngineUnusable(f"the device is broken until the engine restarts: {text}")
    return error


def _device_facts() -> Mapping[str, Any]:
    """The most device memory that was in use at once, in GiB; nothing without a GPU."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return {}
    used = peak_bytes() / 2**30
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / 2**30
    return {
        "vram_used_gb": round(used, 3),
        "vram_total_gb": round(total, 3),
        "vram_utilization": round(used / total, 4),
    }
