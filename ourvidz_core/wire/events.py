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
    """The job was parsed and its work begins."""

    #: Counts from 1.
    attempt: int
    #: Empty where it came from no queue.
    queue: str = ""
    #: From the message's ``created_at`` to now; None where it has none.
    waited_seconds: float | None = None
    #: From the moment when the queue was asked for a job to now.
    claim_seconds: float = 0.0
    has_references: bool = False
    #: W3C trace context of the message, where it carries a valid one.
    traceparent: str | None = None


@frozen(kw_only=True)
class ReferencesFetched(Event):
    """All reference images are local files now."""

    roles: tuple[str, ...]
    seconds: float


@frozen(kw_only=True)
class GenerationStarted(Event):
    """The job has the engine, which it shares with the worker's other jobs, to itself."""

    waited_seconds: float


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
    #: What the message expected, else what the job type does; None where neither says.
    expected_seconds: float | None = None


@frozen(kw_only=True)
class AssetStored(Event):
    """Storage took one artifact, and it was verified to be there."""

    bucket: str
    path: str
    size_bytes: int
    media_type: str
    seconds: float


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
    attempt: int = 1
    #: Whether its message is kept with the dead letters.
    is_dead_letter: bool = False


@frozen(kw_only=True)
class JobRetried(Event):
    """An attempt failed in a way that another may not; the job runs again after ``delay_seconds``."""

    error_type: str
    message: str
    attempt: int
    delay_seconds: float


@frozen(kw_only=True)
class JobReleased(Event):
    """The job goes on elsewhere: handed back when this worker ended, taken over by another, or left to one."""

    reason: str


@frozen(kw_only=True)
class CallbackDelivered(Event):
    """The endpoint accepted the terminal callback. Any worker may deliver any callback."""

    status: str
    #: Refusals before it was accepted.
    refusals: int
    #: Of the request that was accepted.
    seconds: float


@frozen(kw_only=True)
class CallbackRefused(Event):
    """The endpoint did not accept the terminal callback."""

    status: str
    reason: str
    seconds: float
    #: It is put aside and not sent again by itself.
    is_given_up: bool
