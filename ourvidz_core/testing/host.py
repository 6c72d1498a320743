"""A host of plugins in this process: the whole walk of a job, without a network or a child process."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

from ourvidz_core.delivery.callbacks import RecordingCallbacks
from ourvidz_core.delivery.memory_queue import MemoryQueue
from ourvidz_core.delivery.queue import Queue
from ourvidz_core.delivery.references import ReferenceSource, StubReferences
from ourvidz_core.delivery.storage import DirectoryStorage, Storage
from ourvidz_core.engine.host import Engine
from ourvidz_core.engine.local import LocalEngine
from ourvidz_core.errors import JobError
from ourvidz_core.plugins.loading import FoundPlugin, load_registry
from ourvidz_core.plugins.registry import Registry
from ourvidz_core.settings import Settings
from ourvidz_core.testing.doubles import RecordingContext
from ourvidz_core.wire.commands import Command
from ourvidz_core.wire.jobs import Job
from ourvidz_core.worker.parts import WorkerParts
from ourvidz_core.worker.runner import JobRunner, Outcome, Watch
from ourvidz_core.worker.slot import EngineSlot
from ourvidz_core.worker.worker import Until, Worker
from ourvidz_core.worker.workspace import Workspace


def plugin_of(source: str, *, distribution: str = "acme", version: str = "1.0") -> FoundPlugin:
    """A plugin made of ``source``, the text of its module; it is run when the plugin is loaded."""

    def load() -> ModuleType:
        module = ModuleType(distribution.replace("-", "_"))
        exec(compile(textwrap.dedent(source), f"<{distribution}>", "exec"), vars(module))  # noqa: S102
        return module

    return FoundPlugin(distribution=distribution, version=version, load=load)


def plugin_module(module: object, *, distribution: str = "acme", version: str = "1.0") -> FoundPlugin:
    """A plugin that is the module or object given, which the test has imported itself."""
    return FoundPlugin(distribution=distribution, version=version, load=lambda: module)


class PluginHost:
    """Takes payloads through the plugins given, to files below ``root``.

    :meth:`run` takes one payload to its outcome. :meth:`push` and :meth:`work` take the
    longer way, through a queue and a worker, to :meth:`callbacks_of`.

    >>> with PluginHost(tmp_path, plugin_module(acme_upscale)) as host:   # doctest: +SKIP
    ...     outcome = host.run({"id": "a", "type": "acme_upscale", "prompt": "", "user_id": "u"})
    """

    def __init__(
        self,
        root: Path,
        *plugins: FoundPlugin,
        settings: Settings | None = None,
        engine: Engine | None = None,
        make_engine: Callable[[Registry, Settings], Engine] = LocalEngine,
        references: ReferenceSource | Mapping[str, Path | bytes | JobError] | None = None,
        storage: Storage | None = None,
        queue: Queue | None = None,
    ) -> None:
        self.root = root
        self.settings = settings or host_settings(root)
        self.registry = load_registry(self.settings, plugins)
        self.engine = engine or make_engine(self.registry, self.settings)
        self.workspace = Workspace(root / "work")
        self.assets_dir = root / "assets"
        #: Every callback that the worker sent.
        self.callbacks = RecordingCallbacks()
        self.queue = queue or MemoryQueue()
        if references is None or isinstance(references, Mapping):
            references = StubReferences(references or {})
        self.references = references
        self._slot = EngineSlot(self.engine, report=self.registry.report)
        self.runner = JobRunner(
            registry=self.registry,
            engine=self._slot,
            references=references,
            storage=storage or DirectoryStorage(self.assets_dir),
            workspace=self.workspace,
            bucket_limits_mb=self.settings.bucket_limits_mb,
            job_timeouts_seconds=self.settings.job_timeouts_seconds,
        )

    def run(self, payload: Mapping[str, Any] | bytes, *, watch: Watch | None = None) -> Outcome:
        """Take one payload, or the bytes of a message, to its outcome."""
        outcome = self.runner.run(_message(payload), watch=watch)
        self.registry.report(outcome.as_event())
        return outcome

    def parse(self, payload: Mapping[str, Any]) -> Job:
        """The job of a payload; raises ``PayloadError`` where it is wrong."""
        return self.runner.parse(_message(payload))

    def plan(self, payload: Mapping[str, Any]) -> tuple[Job, Command | None]:
        """The prepared job and its command; nothing is fetched and nothing is generated."""
        job = self.parse(payload)
        owned = self.registry.get(job.job_type)
        with self.workspace.job_directory() as directory:
            context = RecordingContext(directory)
            prepared = owned.prepare_job(job, context)
            return prepared, owned.build_command(prepared, context)

    def push(self, payload: Mapping[str, Any]) -> None:
        """Put a payload onto the queue of its job type, as a producer does."""
        self.queue.push(self.registry.get(payload["type"]).job_type.queue, _message(payload))

    def work(self) -> None:
        """Let a worker take all jobs that wait, and return when the last callback is sent."""
        parts = WorkerParts(
            queue=self.queue,
            callbacks=self.callbacks,
            runner=self.runner,
            slot=self._slot,
            registry=self.registry,
            workspace=self.workspace,
            settings=self.settings,
        )
        Worker(parts, self.registry.queues).run(Until.DRAINED)

    def callbacks_of(self, job_id: str) -> list[dict[str, Any]]:
        """The bodies that the worker sent about one job, in order."""
        return [json.loads(sent.body) for sent in self.callbacks.accepted if sent.job_id == job_id]

    def close(self) -> None:
        """End the engine and remove the work directory; the assets stay."""
        self.engine.close()
        self.workspace.close()

    def __enter__(self) -> PluginHost:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def host_settings(root: Path) -> Settings:
    """Settings of a host below ``root``: no device, no waits between tries, nothing of this machine's."""
    return Settings(
        device="cpu",
        state_dir=root / "state",
        work_dir=root / "work",
        worker_name="test",
        retry_delay_seconds=0.0,
        callback_min_age_seconds=0.0,
        callback_retry_seconds=0.01,
        min_free_disk_mb=0.0,
    )


def _message(payload: Mapping[str, Any] | bytes) -> bytes:
    return payload if isinstance(payload, bytes) else json.dumps(payload).encode()
