"""The plugin that is checked: loaded alone, with its sample messages and trials of them."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import attrs
from attrs import frozen

from ourvidz_core.engine.models import ModelCache
from ourvidz_core.errors import JobError, ModelUnavailable
from ourvidz_core.plugins.loading import FoundPlugin, PluginRecord
from ourvidz_core.plugins.registry import Registry
from ourvidz_core.settings import Settings
from ourvidz_core.testing.conformance.results import NotChecked
from ourvidz_core.testing.conformance.trials import TrialContext, TrialEngine
from ourvidz_core.testing.host import PluginHost, host_settings
from ourvidz_core.testing.stand_in import stand_in_plugin
from ourvidz_core.wire.commands import Command
from ourvidz_core.wire.job_types import JobType
from ourvidz_core.wire.jobs import Job, Reference
from ourvidz_core.worker.runner import Outcome

#: In the query of every reference's URL, as the access token is in production.
CANARY = "conformance-canary"
_SIDE = 64


@frozen(kw_only=True)
class Trial:
    """One sample's walk, and the engine it took."""

    outcome: Outcome
    engine: TrialEngine

    @property
    def is_met(self) -> bool:
        """Whether the plugin met what went wrong."""
        return self.engine.context is not None and self.engine.context.is_met

    def refuse_if_unavailable(self) -> None:
        """The model that a plugin needs may not be on the machine that checks it.

        :raises NotChecked: so it is.
        """
        if isinstance(self.outcome.error, ModelUnavailable):
            raise NotChecked(f"its model is not here: {self.outcome.error.message}")


class Subject:
    """A plugin under test.

    ``messages`` take the place of the samples of their job types. ``others`` are the other
    plugins of the machine. An extension is tried on the jobs of a stand-in.
    """

    def __init__(
        self,
        plugin: FoundPlugin,
        *,
        root: Path,
        settings: Settings | None = None,
        others: Sequence[FoundPlugin] = (),
        messages: Sequence[Mapping[str, Any]] = (),
        patience_seconds: float = 10.0,
    ) -> None:
        self.plugin = plugin
        self.others = tuple(others)
        self._root = root
        self._settings = attrs.evolve(
            settings or host_settings(root), allow_plugins=None, block_plugins=[], require_plugins=[]
        )
        self._messages = tuple(messages)
        self._patience_seconds = patience_seconds
        self._models = ModelCache()
        self._finished: dict[str, Trial] = {}
        self._hosts = 0
        #: What ``handle_event`` of the plugin raised, as (event, error).
        self.observer_errors: list[tuple[str, str]] = []

    @property
    def distribution(self) -> str:
        """The plugin's distribution."""
        return self.plugin.distribution

    @cached_property
    def record(self) -> PluginRecord:
        """What became of the plugin when it was loaded."""
        return next(record for record in self._registry.records if record.distribution == self.distribution)

    @property
    def samples(self) -> list[tuple[JobType, dict[str, Any]]]:
        """Every sample message with its job type."""
        samples = []
        for job_type in self._registry.job_types:
            given = [message for message in self._messages if message.get("type") == job_type.name]
            samples += [(job_type, _whole(job_type, message)) for message in given or [job_type.sample]]
        return samples

    @property
    def foreign_types(self) -> list[Any]:
        """The types of messages that were given and that the plugin does not own."""
        known = {job_type.name for job_type in self._registry.job_types}
        return sorted({message.get("type") for message in self._messages} - known, key=str)

    @property
    def first_samples(self) -> list[tuple[JobType, dict[str, Any]]]:
        """One sample message of each job type."""
        return list({job_type.name: (job_type, message) for job_type, message in reversed(self.samples)}.values())[::-1]

    @cached_property
    def is_sample_refused(self) -> bool:
        """Whether a sample is no job, so that nothing can be tried with it."""
        for _, message in self.samples:
            try:
                self.parse(message)
            except JobError:
                return True
        return False

    def parse(self, message: Mapping[str, Any]) -> Job:
        """The job of a message; raises ``PayloadError`` where the plugin refuses it."""
        return self._loaded.parse(message)

    def command_of(self, message: Mapping[str, Any]) -> Command | None:
        """The command line of a message, its references there and nothing generated."""
        with self._host() as (host, _), host.workspace.job_directory() as directory:
            job = host.parse(message)
            fetched = {role: host.references.fetch(each, directory, role) for role, each in job.references}
            job = attrs.evolve(job, references=job.references.replace(fetched))
            owned = host.registry.get(job.job_type)
            context = TrialContext(
                work_dir=directory, models=self._models, timeout_seconds=owned.job_type.timeout_seconds, device="cpu"
            )
            return owned.build_command(owned.prepare_job(job, context), context)

    def try_out(
        self,
        message: Mapping[str, Any],
        *,
        make_context: Callable[..., TrialContext] = TrialContext,
        timeout_seconds: float | None = None,
    ) -> Trial:
        """Take a message to its outcome, in a context that ``make_context`` makes."""
        timeouts = dict(self._settings.job_timeouts_seconds)
        if timeout_seconds is not None:
            timeouts[message["type"]] = timeout_seconds
        settings = attrs.evolve(self._settings, job_timeouts_seconds=timeouts)
        with self._host(settings, make_context) as (host, engine), self._observers_heard():
            return Trial(outcome=host.run(message), engine=engine)

    def finish(self, message: Mapping[str, Any]) -> Trial:
        """The message's walk with nothing in its way; taken once."""
        key = json.dumps(message, sort_keys=True)
        if key not in self._finished:
            self._finished[key] = self.try_out(message)
        return self._finished[key]

    def scratch(self) -> Path:
        """A new directory that nobody else uses."""
        self._hosts += 1
        return self._root / f"host-{self._hosts}"

    @property
    def _registry(self) -> Registry:
        return self._loaded.registry

    @cached_property
    def _loaded(self) -> PluginHost:
        with self._host() as (host, _):
            return host

    @contextlib.contextmanager
    def _host(
        self, settings: Settings | None = None, make_context: Callable[..., TrialContext] = TrialContext
    ) -> Iterator[tuple[PluginHost, TrialEngine]]:
        engines: list[TrialEngine] = []

        def make_engine(registry: Registry, settings: Settings) -> TrialEngine:
            engines.append(
                TrialEngine(
                    registry,
                    settings,
                    models=self._models,
                    make_context=make_context,
                    patience_seconds=self._patience_seconds,
                )
            )
            return engines[0]

        with PluginHost(
            self.scratch(),
            *self._plugins,
            settings=settings or self._settings,
            make_engine=make_engine,
            references=DrawnReferences(),
        ) as host:
            yield host, engines[0]

    @cached_property
    def _plugins(self) -> tuple[FoundPlugin, ...]:
        with PluginHost(self._root / "alone", self.plugin, settings=self._settings) as host:
            owns_types = bool(host.registry.job_types)
        return (self.plugin,) if owns_types else (self.plugin, stand_in_plugin())

    @contextlib.contextmanager
    def _observers_heard(self) -> Iterator[None]:
        """A plugin that fails in ``handle_event`` is only logged, so the log is where it is seen."""
        handler = _ObserverErrors(self.distribution, self.observer_errors)
        logger = logging.getLogger("ourvidz_core.plugins.registry")
        logger.addHandler(handler)
        try:
            yield
        finally:
            logger.removeHandler(handler)


class DrawnReferences:
    """A picture of its own behind every URL."""

    def fetch(self, reference: Reference, directory: Path, name: str) -> Reference:
        """See :meth:`~ourvidz_core.delivery.references.ReferenceSource.fetch`."""
        from PIL import Image

        path = directory / f"{name}.png"
        Image.radial_gradient("L").resize((_SIDE, _SIDE)).convert("RGB").save(path)
        return attrs.evolve(reference, path=path, width=_SIDE, height=_SIDE)


class _ObserverErrors(logging.Handler):
    def __init__(self, distribution: str, errors: list[tuple[str, str]]) -> None:
        super().__init__(logging.ERROR)
        self._distribution = distribution
        self._errors = errors

    def emit(self, record: logging.LogRecord) -> None:
        if isinstance(record.args, tuple) and record.args[:1] == (self._distribution,) and record.exc_info:
            error = record.exc_info[1]
            self._errors.append((str(record.args[-1]), f"{type(error).__name__}: {error}"))


def with_config(message: Mapping[str, Any], **values: Any) -> dict[str, Any]:
    """``message`` with these keys of its ``config``."""
    return {**message, "config": {**(message.get("config") or {}), **values}}


def _whole(job_type: JobType, message: Mapping[str, Any]) -> dict[str, Any]:
    whole = {"id": f"conformance-{job_type.name}", "user_id": "conformance", "prompt": "", **message}
    return {**_each_text(whole, _with_canary), "type": job_type.name}


def _with_canary(text: str) -> str:
    return f"{text.partition('?')[0]}?token={CANARY}" if text.startswith(("http://", "https://")) else text


def _each_text(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _each_text(inner, change) for key, inner in value.items()}
    return [_each_text(inner, change) for inner in value] if isinstance(value, list | tuple) else value
