"""Everything that can go wrong, as one tree.

A class exists for each thing a caller can do something about. The message of an
error says what happened, to which thing, and what to do now.

::

    OurVidzError
    ├── SettingsError              a setting is missing or wrong; nothing was started
    ├── PluginError                a plugin is wrong; names the distribution
    │   ├── DuplicateJobType       two plugins own one job type
    │   ├── InvalidJobType         a registered job type cannot be used
    │   └── RequiredPluginMissing  a plugin that was required did not load
    ├── JobError                   one job cannot go on; becomes its ``failed`` callback
    │   ├── PayloadError           the message is wrong; lists every fault with its path
    │   │   └── UnknownJobType     no loaded plugin owns the type
    │   ├── PolicyRefused          a policy does not let the job, or what it made, pass
    │   ├── ReferenceImageError    a reference image cannot be used
    │   │   ├── ReferenceRefused      its address is not one we fetch from
    │   │   ├── ReferenceUnavailable  it could not be fetched
    │   │   │   └── ReferenceServerFailed  it may be later
    │   │   └── ReferenceInvalid      what was fetched is no usable image
    │   ├── ModelUnavailable       a model file or directory is missing or unreadable
    │   ├── HookFailed             a plugin's hook raised or answered nonsense
    │   ├── MetadataClash          two plugins reported one metadata key
    │   ├── GenerationError        the generation itself failed
    │   │   ├── OutOfMemory           the device has too little memory
    │   │   ├── CommandFailed         a subprocess ended with a non-zero status
    │   │   ├── ArtifactError         an output is missing, empty or not what it should be
    │   │   ├── JobTimeout            the deadline passed
    │   │   ├── EngineStalled         steps were reported, and then none for too long
    │   │   ├── EngineCrashed         the engine process died
    │   │   │   └── EngineLost           it died of another job
    │   │   └── EngineUnusable        the device is broken until the process restarts
    │   ├── StorageError           an artifact could not be stored
    │   │   ├── AssetRejected         storage will never take it (too large, wrong type)
    │   │   ├── StorageUnavailable    storage may take it later
    │   │   └── DiskFull              this machine has no room
    │   ├── InternalError          a fault of ours, not of the job
    │   ├── RepeatedlyInterrupted  workers died with this job, again and again
    │   └── JobCancelled           someone asked for it to stop
    ├── CallbackError              a callback was not accepted
    │   ├── CallbackRejected          it never will be
    │   └── CallbackUndelivered       it may be later
    └── QueueError                 the queue cannot be used
        ├── QueueUnavailable          it does not answer
        └── QueueUnsupported          it lacks something that we need

``JobError.is_transient`` says whether another try may succeed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from attrs import frozen


class OurVidzError(Exception):
    """Base of every error that this framework raises on purpose."""


class SettingsError(OurVidzError):
    """A setting is missing or wrong."""


class PluginError(OurVidzError):
    """A plugin cannot be used as it is."""


class DuplicateJobType(PluginError):
    """Two plugins register the same job type, so neither can own it."""


class InvalidJobType(PluginError):
    """A plugin registered something that is not a usable job type."""


class RequiredPluginMissing(PluginError):
    """A plugin that the operator requires is absent, blocked or broken."""


class JobError(OurVidzError):
    """One job cannot go on. The worker turns it into the job's ``failed`` callback.

    A plugin may derive classes of its own: of the one that says best what the worker shall do,
    or with ``is_transient = True`` where another try may succeed.
    """

    is_transient: bool = False

    def __init__(self, message: str, *, details: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.message = message
        #: JSON-safe facts for the callback's metadata.
        self.details: Mapping[str, Any] = dict(details or {})
        #: The ``error_type`` of the callback.
        self.error_type = type(self).__name__


@frozen
class Fault:
    """One thing that is wrong with a payload.

    Where ``got`` is empty, ``expected`` is the whole sentence, as a validator wrote it.
    """

    path: str
    expected: str
    got: str

    def __str__(self) -> str:
        return f"{self.path}: expected {self.expected}, got {self.got}" if self.got else f"{self.path}: {self.expected}"


class PayloadError(JobError):
    """The message is not what a producer may send. Carries every fault at once."""

    def __init__(
        self,
        message: str,
        *,
        faults: Iterable[Fault] = (),
        details: Mapping[str, Any] | None = None,
    ) -> None:
        self.faults = tuple(faults)
        listed = [{"path": f.path, "expected": f.expected, "got": f.got} for f in self.faults]
        super().__init__(message, details={**(details or {}), **({"faults": listed} if listed else {})})

    @classmethod
    def from_faults(cls, faults: Iterable[Fault]) -> PayloadError:
        """Join ``faults`` into one message."""
        faults = tuple(faults)
        return cls("; ".join(str(fault) for fault in faults), faults=faults)


class UnknownJobType(PayloadError):
    """No loaded plugin owns the type that the message names."""


class PolicyRefused(JobError):
    """A plugin's policy does not let this job be made, or what it made be stored.

    Raise it in ``review_job`` or ``review_artifact``. The message is the reason that the
    callback shows; keep prompts and what a policy looks for out of it.
    """


class ReferenceImageError(JobError):
    """A reference image cannot be used, and generating without it would be a lie."""


class ReferenceRefused(ReferenceImageError):
    """The URL's scheme, host or address is not one that references are fetched from."""


class ReferenceUnavailable(ReferenceImageError):
    """The server did not give the image: gone, expired, or not to be found."""


class ReferenceServerFailed(ReferenceUnavailable):
    """The server, or the way to it, failed: the image may well be there later."""

    is_transient = True


class ReferenceInvalid(ReferenceImageError):
    """What was fetched is too large, not an image, or not one of the accepted formats."""


class ModelUnavailable(JobError):
    """A model file or directory is missing or cannot be read."""


class HookFailed(JobError):
    """A plugin's hook raised, or answered something that the hook does not allow."""

    def __init__(
        self,
        message: str,
        *,
        error_type: str = "HookFailed",
        details: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message, details=details)
        #: The name of the exception that the hook raised, if it raised one.
        self.error_type = error_type


class MetadataClash(JobError):
    """Two plugins reported the same key of the callback's metadata."""


class GenerationError(JobError):
    """The generation failed."""


class OutOfMemory(GenerationError):
    """The device has too little memory for this job."""

    is_transient = True
    #: Whether it is this process's own device: what another rank lacks says nothing of what fits here.
    is_here = True


class CommandFailed(GenerationError):
    """A subprocess ended with a non-zero exit status. Carries the end of its output."""


class ArtifactError(GenerationError):
    """An output file is missing, empty, truncated or not of the declared kind."""


class JobTimeout(GenerationError):
    """The job was still running at its deadline, and was stopped."""


class EngineStalled(GenerationError):
    """The job had reported steps, and then none for too long; its engine was stopped."""

    is_transient = True


class EngineCrashed(GenerationError):
    """The engine process died while it worked on this job."""

    is_transient = True


class EngineLost(EngineCrashed):
    """The engine died, or was stopped, because of another job, while it worked on this one, too.

    The next try of this one uses no attempt, once.
    """


class EngineUnusable(GenerationError):
    """The device stays broken until the engine process is replaced (a sticky CUDA error)."""

    is_transient = True


class StorageError(JobError):
    """An artifact could not be stored."""


class AssetRejected(StorageError):
    """Storage will not take this asset, however often it is asked."""


class StorageUnavailable(StorageError):
    """Storage does not answer or answers with a server error."""

    is_transient = True


class DiskFull(StorageError):
    """There is no room left on this machine's disk."""

    is_transient = True


class RepeatedlyInterrupted(JobError):
    """Workers died while they worked on this job, as often as is allowed."""


class InternalError(JobError):
    """A fault of the framework itself, or of the machine; not of the job and not of a plugin."""

    is_transient = True


class JobCancelled(JobError):
    """Someone asked for this job to stop."""


class CallbackError(OurVidzError):
    """A callback was not accepted."""


class CallbackRejected(CallbackError):
    """The endpoint will never accept this callback."""


class CallbackUndelivered(CallbackError):
    """The endpoint did not accept the callback this time."""

    def __init__(self, message: str, *, retry_after_seconds: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class QueueError(OurVidzError):
    """The queue cannot be used."""


class QueueUnavailable(QueueError):
    """The queue's server does not answer."""


class QueueUnsupported(QueueError):
    """The queue's server lacks something that we need."""
