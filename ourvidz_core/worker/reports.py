"""What a callback says: built from what was measured, never from what was asked."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import ourvidz_core
from ourvidz_core.errors import JobError, MetadataClash, PayloadError
from ourvidz_core.plugins.registry import OwnedJobType
from ourvidz_core.wire.artifacts import Asset, FinishedGeneration
from ourvidz_core.wire.callbacks import Callback, JobStatus
from ourvidz_core.wire.job_types import NAME_PATTERN
from ourvidz_core.wire.jobs import Job
from ourvidz_core.wire.payloads import decode_message, job_id_of, shown


def processing_report(job: Job, attempts: Mapping[str, Any]) -> Callback:
    """The callback that says that work on the job has begun."""
    return Callback(
        job_id=job.id,
        status=JobStatus.PROCESSING,
        metadata={"job_type": job.job_type, "worker_version": ourvidz_core.__version__, **attempts},
    )


def completed_metadata(
    owned: OwnedJobType, finished: FinishedGeneration, buckets: Sequence[str], attempts: Mapping[str, Any]
) -> dict[str, Any]:
    """What the ``completed`` callback will say, made before the uploads: a job whose report fails stores nothing.

    :raises MetadataClash: a plugin reports what core or another plugin reports too.
    """
    job, artifacts = finished.job, finished.generation.artifacts
    measured: dict[str, Any] = {
        "seed": job.seed,
        "seeds": [artifact.seed for artifact in artifacts],
        "generation_time": round(finished.seconds, 3),
        "num_images": len(artifacts),
        "job_type": job.job_type,
        "content_type": owned.job_type.content_type.value,
        "frame_num": artifacts[0].frames or 1,
        "reference_mode": job.reference_mode.value,
        "bucket": buckets[0],
        "assets_bytes": [artifact.path.stat().st_size for artifact in artifacts],
        "ignored_config": dict(job.ignored_config),
        "worker_version": ourvidz_core.__version__,
        "plugin": owned.distribution,
        **finished.device_facts,
        **attempts,
    }
    if job.expected_seconds is not None:
        measured["expected_time"] = job.expected_seconds
        ratio = finished.seconds / job.expected_seconds
        if math.isfinite(ratio):  # an expectation of 5e-324 s is above 0
            measured["performance_ratio"] = round(ratio, 3)
    return owned.enrich_metadata(job, finished.generation, _with_facts(owned, measured, finished))


def completed_report(job: Job, metadata: Mapping[str, Any], assets: Sequence[Asset]) -> Callback:
    """The callback of a job whose assets are all stored."""
    return Callback(
        job_id=job.id,
        status=JobStatus.COMPLETED,
        assets=tuple(asset.reported_as for asset in assets),
        enhanced_prompt=job.enhanced_prompt,
        metadata=metadata,
    )


def failed_report(
    job_id: str, error: JobError, *, job_type: str | None, job: Job | None, attempts: Mapping[str, Any]
) -> Callback:
    """The callback of a job that is over without a result."""
    known = dict(job.facts) if job else {}
    if job is not None:
        known |= {"seed": job.seed, "reference_mode": job.reference_mode.value}
    if job_type is not None:
        known["job_type"] = job_type
    return Callback(
        job_id=job_id,
        status=JobStatus.FAILED,
        error_message=error.message,
        enhanced_prompt=job.enhanced_prompt if job else None,
        metadata={
            **known,
            **_as_json(error.details),
            "error_type": error.error_type,
            "error_timestamp": datetime.now(UTC).isoformat(),
            "worker_version": ourvidz_core.__version__,
            **attempts,
        },
    )


def unrun_report(raw: bytes, error: JobError, *, attempts: Mapping[str, Any]) -> Callback | None:
    """The callback of a message that nobody parsed; None where it has no id that a callback could name."""
    try:
        message = decode_message(raw)
        job_id = job_id_of(message)
    except PayloadError:
        return None
    if job_id is None:
        return None
    job_type = message.get("type")
    # Other text is kept out of the metadata.
    known_type = job_type if isinstance(job_type, str) and NAME_PATTERN.fullmatch(job_type) else None
    return failed_report(job_id, error, job_type=known_type, job=None, attempts=attempts)


def prompts_of(raw: bytes) -> tuple[str, ...]:
    """What a person wrote into a message, wherever the producer put it; nothing where it cannot be decoded."""
    try:
        message = decode_message(raw)
    except PayloadError:
        return ()
    places = [message, message.get("config"), message.get("metadata")]
    return tuple(
        value
        for place in places
        if isinstance(place, Mapping)
        for key, value in place.items()
        if "prompt" in key and isinstance(value, str)
    )


def attempt_facts(attempt: int, reasons: Sequence[str], token: int | None = None) -> dict[str, Any]:
    """How often the job was tried, and why not only once.

    ``token`` is the claim's: a receiver that refuses a lower one than it has seen cannot be told of an older try.
    """
    facts: dict[str, Any] = {"attempts": attempt}
    if reasons:
        facts["attempt_reasons"] = list(reasons)
    if token is not None:
        facts["fencing_token"] = token
    return facts


def _as_json(details: Mapping[str, Any]) -> dict[str, Any]:
    """``details`` of an error as JSON holds them: a failure must be reported, whatever a plugin put into it."""
    try:
        safe: dict[str, Any] = json.loads(json.dumps(dict(details), default=str), parse_constant=str)
    except (TypeError, ValueError, RecursionError):
        return {"details": shown(details)}
    return safe


def _with_facts(owned: OwnedJobType, measured: Mapping[str, Any], finished: FinishedGeneration) -> Mapping[str, Any]:
    merged = dict(measured)
    for facts in (finished.job.facts, finished.generation.facts):
        for key, value in facts.items():
            if key in merged:
                raise MetadataClash(
                    f"{owned.distribution} reports metadata key {key!r}, which is reported already;"
                    " rename it in the plugin's facts"
                )
            merged[key] = value
    return merged
