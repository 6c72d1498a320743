"""What happens to a job, as typed events for observers. Nothing here carries a prompt or a URL."""

from __future__ import annotations

from attrs import frozen


@frozen(kw_only=True)
class Event:
    """Something that happened to one job."""

    job_id: str
    job_type: str


@frozen(kw_only=True)
class JobStarted(Event):
    """The job was parsed and its work begins. ``attempt`` counts from 1."""

    attempt: int


@frozen(kw_only=True)
class ReferencesFetched(Event):
    """All reference images are local files now."""

    roles: tuple[str, ...]
    seconds: float


@frozen(kw_only=True)
class GenerationProgressed(Event):
    """The engine finished step ``step`` of ``total`` of a stage."""

    stage: str
    step: int
    total: int


@frozen(kw_only=True)
class GenerationFinished(Event):
    """The engine left all artifacts of the job."""

    artifacts: int
    seconds: float


@frozen(kw_only=True)
class AssetStored(Event):
    """Storage took one artifact, and it was verified to be there."""

    bucket: str
    path: str
    size_bytes: int


@frozen(kw_only=True)
class JobCompleted(Event):
    """Every asset is stored; the ``completed`` callback is on its way."""

    assets: int
    seconds: float


@frozen(kw_only=True)
class JobFailed(Event):
    """The job is over without a result; the ``failed`` callback is on its way."""

    error_type: str
    message: str


@frozen(kw_only=True)
class JobRetried(Event):
    """An attempt failed in a way that another may not; the job runs again after ``delay_seconds``."""

    error_type: str
    message: str
    attempt: int
    delay_seconds: float
