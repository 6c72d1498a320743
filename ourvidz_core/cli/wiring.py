"""Makes the parts that the settings ask for. Nothing else decides which client is used."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from attrs import frozen

from ourvidz_core.errors import PluginError, SettingsError
from ourvidz_core.settings import Settings, engine_environment, variable_of

if TYPE_CHECKING:
    from ourvidz_core.delivery.board import Board
    from ourvidz_core.delivery.callbacks import CallbackClient
    from ourvidz_core.delivery.queue import Queue
    from ourvidz_core.delivery.references import ReferenceSource
    from ourvidz_core.delivery.storage import Storage
    from ourvidz_core.observe.usage import UsageSink
    from ourvidz_core.plugins.registry import Registry
    from ourvidz_core.worker.runner import JobRunner
    from ourvidz_core.worker.slot import EngineSlot
    from ourvidz_core.worker.worker import Worker
    from ourvidz_core.worker.workspace import Workspace

#: Distributions provide storage under this entry-point group: a function that makes a Storage from the settings.
STORAGE_GROUP = "ourvidz.storage"


def make_queue(settings: Settings) -> Queue:
    """The Redis that the settings name, or an embedded one."""
    from ourvidz_core.delivery.redis_queue import RedisQueue

    address = settings.redis_address
    if address is not None:
        return RedisQueue.connect(
            address, pop_side=settings.pop_side, duplicate_window=settings.duplicate_window_seconds
        )
    from ourvidz_core.delivery.embedded import EmbeddedRedis

    server = EmbeddedRedis(settings.state_dir / "redis")
    return RedisQueue.connect(
        server.address,
        pop_side=settings.pop_side,
        duplicate_window=settings.duplicate_window_seconds,
        on_close=server.close,
    )


def make_board(settings: Settings) -> Board:
    """The board on the Redis that the settings name, or on the embedded one."""
    from ourvidz_core.delivery.board import RedisBoard

    address = settings.redis_address
    if address is not None:
        return RedisBoard.connect(address)
    from ourvidz_core.delivery.embedded import EmbeddedRedis

    server = EmbeddedRedis(settings.state_dir / "redis")
    return RedisBoard.connect(server.address, on_close=server.close)


def make_storage(settings: Settings) -> Storage:
    """The backend that is named, Supabase Storage where an address is set, else a directory."""
    from ourvidz_core.delivery.storage import DirectoryStorage, SupabaseStorage

    if settings.storage_backend is not None:
        return _provided_storage(settings.storage_backend, settings)
    if settings.supabase_url and settings.storage_dir is None:
        return SupabaseStorage(
            settings.supabase_url,
            str(settings.supabase_service_key),
            asset_format=settings.asset_format,
            signed_url_seconds=settings.signed_url_seconds,
            timeout_seconds=settings.upload_timeout_seconds,
        )
    return DirectoryStorage(settings.storage_dir or settings.state_dir / "assets", asset_format=settings.asset_format)


def _provided_storage(name: str, settings: Settings) -> Storage:
    """The storage that an installed distribution provides as ``name``.

    :raises SettingsError: there is none, more than one, or one that may not be imported.
    :raises PluginError: it cannot be imported, or makes something else.
    """
    from importlib.metadata import entry_points

    from ourvidz_core.plugins.trust import refusal_of

    setting = variable_of("storage_backend")
    known = entry_points(group=STORAGE_GROUP)
    providers = {entry.dist.name if entry.dist else entry.value: entry for entry in known if entry.name == name}
    if len(providers) != 1:
        provided = (
            f"{' and '.join(sorted(providers))} provide it; uninstall one" if providers else "nothing provides it"
        )
        names = ", ".join(sorted(known.names)) or "none"
        raise SettingsError(f"{setting} names {name!r}, and {provided}. Storage that is installed: {names}")
    ((distribution, entry_point),) = providers.items()
    if (reason := refusal_of(distribution, settings)) is not None:
        raise SettingsError(f"{setting} names {name!r} of {distribution}, which is not imported: {reason}")
    try:
        storage: Storage = entry_point.load()(settings)
    except SettingsError:
        raise
    except Exception as error:  # whatever its import or its client raises, the worker cannot start
        raise PluginError(f"the storage {name!r} of {distribution} failed: {type(error).__name__}: {error}") from error
    if not callable(getattr(storage, "store", None)) or not callable(getattr(storage, "close", None)):
        raise PluginError(f"the storage {name!r} of {distribution} made {storage!r}, which has no store and close")
    return storage


def make_callbacks(settings: Settings) -> CallbackClient:
    """The endpoint that is set, Supabase's where its address is, else a directory."""
    from ourvidz_core.delivery.callbacks import DirectoryCallbacks, HttpCallbacks

    url = callback_url(settings)
    if url is None:
        return DirectoryCallbacks(settings.callback_dir or settings.state_dir / "callbacks")
    key = settings.callback_key or settings.supabase_service_key
    return HttpCallbacks(
        url,
        key=str(key),
        secret=str(settings.callback_secret),
        previous_secret=str(settings.callback_secret_previous),
        timeout_seconds=settings.callback_timeout_seconds,
    )


def callback_url(settings: Settings) -> str | None:
    """Where callbacks are POSTed, or None where they go to a directory."""
    if settings.callback_url is None and settings.supabase_url and settings.callback_dir is None:
        return f"{settings.supabase_url.rstrip('/')}/functions/v1/job-callback"
    return settings.callback_url


def make_references(settings: Settings) -> ReferenceSource:
    """Fetches references over HTTP, within the settings' limits."""
    from ourvidz_core.delivery.references import HttpReferences

    return HttpReferences(
        allowed_hosts=settings.reference_allowed_hosts,
        max_bytes=int(settings.reference_max_mb * 1e6),
        max_pixels=int(settings.reference_max_megapixels * 1e6),
        timeout_seconds=settings.reference_timeout_seconds,
    )


@contextlib.contextmanager
def make_usage(settings: Settings) -> Iterator[UsageSink]:
    """The endpoint of usage records that is set, or nowhere."""
    from ourvidz_core.observe.usage import HttpUsage, NoUsage

    if settings.metrics_url is None:
        yield NoUsage()
        return
    with contextlib.closing(HttpUsage(settings.metrics_url, key=str(settings.metrics_key))) as usage:
        yield usage


@frozen(kw_only=True)
class Machine:
    """What takes a job from its message to its outcome on this machine."""

    runner: JobRunner
    slot: EngineSlot
    workspace: Workspace


@contextlib.contextmanager
def make_machine(settings: Settings, registry: Registry) -> Iterator[Machine]:
    """A runner with an engine process of its own; all of it ends with the block."""
    import stamina

    from ourvidz_core.engine.host import EngineProcess
    from ourvidz_core.worker.privacy import keep_to_itself
    from ourvidz_core.worker.runner import JobRunner
    from ourvidz_core.worker.slot import EngineSlot
    from ourvidz_core.worker.workspace import Workspace

    keep_to_itself()
    # Where structlog is installed, stamina would print each retry to standard output, past our logging.
    stamina.instrumentation.set_on_retry_hooks([])
    workspace = Workspace(settings.work_dir)
    storage = make_storage(settings)
    environ = {**engine_environment(settings), variable_of("log_level"): settings.log_level.value}
    engine = EngineProcess(
        registry, environ, start_seconds=settings.engine_start_seconds, stall_seconds=settings.stall_seconds
    )
    slot = EngineSlot(engine, report=registry.report, ahead=1)
    runner = JobRunner(
        registry=registry,
        engine=slot,
        references=make_references(settings),
        storage=storage,
        workspace=workspace,
        bucket_limits_mb=settings.bucket_limits_mb,
        job_timeouts_seconds=settings.job_timeouts_seconds,
    )
    try:
        yield Machine(runner=runner, slot=slot, workspace=workspace)
    finally:
        slot.close()
        storage.close()
        workspace.close()


@contextlib.contextmanager
def make_worker(
    settings: Settings,
    registry: Registry,
    queue: Queue,
    queues: Sequence[str],
    *,
    impossible: Mapping[str, str] | None = None,
) -> Iterator[Worker]:
    """A worker for ``queues``; all but ``queue`` ends with the block.

    ``impossible`` are job types that cannot be done here, and why.
    """
    from ourvidz_core.delivery.spool import DirectorySpool
    from ourvidz_core.observe.watch import Subject, watched
    from ourvidz_core.worker.parts import WorkerParts
    from ourvidz_core.worker.worker import Worker

    # What waits for one Redis means nothing to another.
    digest = hashlib.sha256((settings.redis_address or "embedded").encode()).hexdigest()[:16]
    with (
        make_machine(settings, registry) as machine,
        contextlib.closing(DirectorySpool(settings.state_dir / "spool" / digest)) as spool,
        make_usage(settings) as usage,
    ):
        parts = WorkerParts(
            queue=queue,
            callbacks=make_callbacks(settings),
            runner=machine.runner,
            slot=machine.slot,
            registry=registry,
            workspace=machine.workspace,
            settings=settings,
            spool=spool,
            usage=usage,
            impossible=impossible or {},
        )
        made = Worker(parts, queues)
        subject = Subject(
            queue=queue,
            queues=tuple(queues),
            state=lambda: made.state,
            engine=lambda: machine.slot.state,
            engine_doing=lambda: machine.slot.doing,
            busy_seconds=lambda: machine.slot.busy_seconds,
            dropped_records=lambda: usage.dropped,
            vitals=parts.vitals,
            working_on=lambda: machine.slot.working_on,
        )
        with watched(settings, registry, make_board(settings), subject):
            yield made
