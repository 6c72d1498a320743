"""A host of plugins in this process: the whole walk of a job, without a queue, a network or a child process."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

from ourvidz_core.delivery.references import ReferenceSource, StubReferences
from ourvidz_core.delivery.storage import DirectoryStorage, Storage
from ourvidz_core.engine.host import Engine
from ourvidz_core.engine.local import LocalEngine
from ourvidz_core.errors import JobError
from ourvidz_core.plugins.loading import FoundPlugin, load_registry
from ourvidz_core.settings import Settings
from ourvidz_core.testing.doubles import RecordingContext
from ourvidz_core.wire.commands import Command
from ourvidz_core.wire.jobs import Job
from ourvidz_core.worker.runner import JobRunner, Outcome, Watch
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

    >>> with PluginHost(tmp_path, plugin_module(acme_upscale)) as host:   # doctest: +SKIP
    ...     outcome = host.run({"id": "a", "type": "acme_upscale", "prompt": "", "user_id": "u"})
    """

    def __init__(
        self,
        root: Path,
        *plugins: FoundPlugin,
        settings: Settings | None = None,
        engine: Engine | None = None,
        references: ReferenceSource | Mapping[str, Path | bytes | JobError] | None = None,
        storage: Storage | None = None,
    ) -> None:
        self.root = root
        self.settings = settings or Settings(device="cpu")
        self.registry = load_registry(self.settings, plugins)
        self.engine = engine or LocalEngine(self.registry, self.settings)
        self.workspace = Workspace(root / "work")
        self.assets_dir = root / "assets"
        if references is None or isinstance(references, Mapping):
            references = StubReferences(references or {})
        self.runner = JobRunner(
            registry=self.registry,
            engine=self.engine,
            references=references,
            storage=storage or DirectoryStorage(self.assets_dir),
            workspace=self.workspace,
            bucket_limits_mb=self.settings.bucket_limits_mb,
            job_timeouts_seconds=self.settings.job_timeouts_seconds,
        )

    def run(self, payload: Mapping[str, Any] | bytes, *, watch: Watch | None = None) -> Outcome:
        """Take one payload, or the bytes of a message, to its outcome."""
        raw = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
        return self.runner.run(raw, watch=watch)

    def parse(self, payload: Mapping[str, Any]) -> Job:
        """The job of a payload; raises ``PayloadError`` where it is wrong."""
        return self.runner.parse(json.dumps(payload).encode())

    def plan(self, payload: Mapping[str, Any]) -> tuple[Job, Command | None]:
        """The prepared job and its command; nothing is fetched and nothing is generated."""
        job = self.parse(payload)
        owned = self.registry.get(job.job_type)
        with self.workspace.job_directory() as directory:
            context = RecordingContext(directory)
            prepared = owned.prepare_job(job, context)
            return prepared, owned.build_command(prepared, context)

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
