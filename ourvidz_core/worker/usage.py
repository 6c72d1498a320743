"""The worker and completion records of the specification, made of an outcome."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from ourvidz_core.worker.runner import Outcome


def worker_record(worker: str, outcome: Outcome) -> dict[str, Any] | None:
    """What one job cost this worker; None where the message could not even be read.

    ``generation_time`` is in seconds and ``vram_used`` in GiB; each is null where nothing was generated, or
    where there is no GPU.
    """
    if outcome.job is None:
        return None
    metadata = outcome.callback.metadata if outcome.callback is not None else {}
    return {
        "worker_id": worker,
        "job_type": outcome.job.job_type,
        "generation_time": metadata.get("generation_time"),
        "vram_used": metadata.get("vram_used_gb"),
        "reference_mode": outcome.job.reference_mode.value,
        "success": outcome.error is None,
        "timestamp": datetime.now(UTC).isoformat(),
    }


def completion_record(outcome: Outcome) -> dict[str, Any] | None:
    """What a completed job left; None for any other. Megabytes are 10**6 bytes."""
    if outcome.job is None or outcome.error is not None:
        return None
    return {
        "job_id": outcome.job.id,
        "user_id": outcome.job.user_id,
        "job_type": outcome.job.job_type,
        "reference_mode": outcome.job.reference_mode.value,
        "assets_generated": len(outcome.assets),
        "total_size_mb": round(sum(asset.size_bytes for asset in outcome.assets) / 1e6, 6),
        "completion_timestamp": datetime.now(UTC).isoformat(),
    }
