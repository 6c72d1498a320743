"""An overview as the JSON of the page, in sections: each is sent when it has changed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import attrs

from ourvidz_core.dashboard.figures import stage_times, throughput
from ourvidz_core.dashboard.overview import Overview
from ourvidz_core.delivery.board import FinishedJob, RunningJob, StoredAsset, WorkerStatus
from ourvidz_core.observe.collectors import QueueFacts
from ourvidz_core.wire.callbacks import JobStatus

#: What a browser shows, and what can hold no script.
SHOWN_MEDIA = frozenset({"image/png", "image/jpeg", "image/webp", "video/mp4", "video/webm"})
_SHOWN_RESULTS = 30
_SHOWN_FAILURES = 50
_NEVER_CHANGED = {"published_at"}


def sections_of(overview: Overview) -> dict[str, bytes]:
    """Every section as JSON. The same facts give the same bytes."""
    results = [job for job in overview.recent if job.assets]
    failed = [job for job in overview.recent if job.status is JobStatus.FAILED]
    sections: Mapping[str, Any] = {
        "queues": [_queue(name, facts, overview.at) for name, facts in overview.queues.items()],
        "workers": [_worker(worker) for worker in overview.workers],
        "results": [_result(job) for job in results[:_SHOWN_RESULTS]],
        "failures": [_failure(job) for job in failed[:_SHOWN_FAILURES]],
        "dead": [attrs.asdict(letter) for letter in overview.dead],
        "figures": _figures(overview),
    }
    return {name: json.dumps(section, separators=(",", ":")).encode() for name, section in sections.items()}


def address_of(asset: StoredAsset) -> str | None:
    """Where the page finds an asset; None where it is nothing that is shown."""
    if asset.media_type not in SHOWN_MEDIA:
        return None
    return f"/assets/{quote(asset.bucket, safe='')}/{quote(asset.path)}"


def _queue(name: str, facts: QueueFacts, at: float) -> dict[str, Any]:
    return {
        "name": name,
        **attrs.asdict(facts.depth),
        # A moment, for an age would be another one each second.
        "oldest_at": _moment(at, facts.oldest_seconds),
        "lease_overdue": facts.lease_overdue_seconds > 0,
        "outbox_oldest_at": _moment(at, facts.outbox_oldest_seconds),
    }


def _worker(worker: WorkerStatus) -> dict[str, Any]:
    said = attrs.asdict(worker, filter=lambda attribute, _: attribute.name not in _NEVER_CHANGED)
    return {**said, "jobs": [{**attrs.asdict(job), "preview": _preview(job)} for job in worker.jobs]}


def _preview(job: RunningJob) -> str | None:
    """Where the page finds it: another address for each, so that it is asked for again."""
    if job.previewed_at is None:
        return None
    return f"/previews/{quote(job.id, safe='', errors='replace')}?at={job.previewed_at:.3f}"


def _moment(at: float, age_seconds: float | None) -> int | None:
    return round(at - age_seconds) if age_seconds else None


def _result(job: FinishedJob) -> dict[str, Any]:
    return {
        **_ended(job),
        "seconds": dict(job.seconds),
        "assets": [
            {
                "address": address_of(asset),
                "name": f"{asset.bucket}/{asset.path}",
                "media_type": asset.media_type,
                "size_bytes": asset.size_bytes,
            }
            for asset in job.assets
        ],
    }


def _failure(job: FinishedJob) -> dict[str, Any]:
    return {**_ended(job), "error_type": job.error_type, "reason": job.reason}


def _ended(job: FinishedJob) -> dict[str, Any]:
    return {
        "id": job.id,
        "type": job.type,
        "worker": job.worker,
        "attempt": job.attempt,
        "finished_at": round(job.finished_at, 3),
    }


def _figures(overview: Overview) -> dict[str, Any]:
    return {
        "throughput": attrs.asdict(throughput(overview.recent, overview.at)),
        "stages": [attrs.asdict(times) for times in stage_times(overview.recent)],
    }
