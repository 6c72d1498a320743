"""Figures of the jobs that ended lately: how many in each stretch of time, and where their time went."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from attrs import frozen

from ourvidz_core.delivery.board import RECENT_JOBS, FinishedJob
from ourvidz_core.wire.callbacks import JobStatus

#: In the order in which a job goes through them.
STAGES = ("references", "waiting", "generate", "store")
_BARS = 30
#: The board remembers so many jobs and no more: where they are of a shorter time, a shorter time is drawn.
_WINDOWS_SECONDS = (3600.0, 1800.0, 600.0, 300.0, 60.0)
_SHOWN_TYPES = 10


@frozen(kw_only=True)
class Throughput:
    """Jobs that ended in equal stretches of time, the oldest stretch first."""

    stretch_seconds: float
    completed: tuple[int, ...]
    failed: tuple[int, ...]

    @property
    def window_seconds(self) -> float:
        """The time that all stretches cover."""
        return self.stretch_seconds * len(self.completed)


@frozen(kw_only=True)
class StageTimes:
    """Medians over the completed jobs of one type, in seconds."""

    job_type: str
    jobs: int
    seconds: dict[str, float]
    total_seconds: float


def throughput(recent: Sequence[FinishedJob], now: float) -> Throughput:
    """How many of ``recent``, the newest first, ended when; the last stretch is the present one, still unfinished.

    Stretches begin at even moments, so the same jobs give the same figures for as long as one lasts.
    """
    window = _WINDOWS_SECONDS[0]
    if len(recent) >= RECENT_JOBS:
        covered = now - recent[-1].finished_at
        window = next((window for window in _WINDOWS_SECONDS if window <= covered), _WINDOWS_SECONDS[-1])
    stretch = window / _BARS
    end = (now // stretch + 1) * stretch
    counts = {JobStatus.COMPLETED: [0] * _BARS, JobStatus.FAILED: [0] * _BARS}
    for job in recent:
        # A worker's clock may be a little ahead of this one.
        back = int(max(end - job.finished_at, 0.0) // stretch)
        if back < _BARS and job.status in counts:
            counts[job.status][_BARS - 1 - back] += 1
    return Throughput(
        stretch_seconds=stretch,
        completed=tuple(counts[JobStatus.COMPLETED]),
        failed=tuple(counts[JobStatus.FAILED]),
    )


def stage_times(recent: Sequence[FinishedJob]) -> tuple[StageTimes, ...]:
    """The types with the most completed jobs, in the order of their names."""
    by_type: dict[str, list[FinishedJob]] = {}
    for job in recent:
        if job.status is JobStatus.COMPLETED and job.seconds:
            by_type.setdefault(job.type, []).append(job)
    chosen = sorted(by_type, key=lambda name: -len(by_type[name]))[:_SHOWN_TYPES]
    return tuple(_times(name, by_type[name]) for name in sorted(chosen))


def _times(job_type: str, jobs: Sequence[FinishedJob]) -> StageTimes:
    def median(stage: str) -> float:
        return round(statistics.median(job.seconds.get(stage, 0.0) for job in jobs), 3)

    return StageTimes(
        job_type=job_type,
        jobs=len(jobs),
        seconds={stage: seconds for stage in STAGES if (seconds := median(stage)) > 0},
        total_seconds=median("total"),
    )
