"""Who owns which job type, and how an owner's hooks are asked.

For each owner the hooks are bound once, with all other owners left out, so that one
owner's mistake cannot touch another's jobs. Every answer is checked here: what a
plugin gets wrong becomes a :class:`~ourvidz_core.errors.HookFailed` that names it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import attrs
import pluggy
from attrs import field, frozen

from ourvidz_core.errors import HookFailed, JobError, MetadataClash, OurVidzError, PolicyRefused, UnknownJobType
from ourvidz_core.plugins.context import JobContext
from ourvidz_core.plugins.hookspecs import ReadSettings
from ourvidz_core.wire.artifacts import Artifact, Generation
from ourvidz_core.wire.commands import Command
from ourvidz_core.wire.events import Event
from ourvidz_core.wire.findings import Check, Finding
from ourvidz_core.wire.job_types import NAME_PATTERN, JobType
from ourvidz_core.wire.jobs import Job
from ourvidz_core.wire.payloads import Payload, shown

if TYPE_CHECKING:
    from ourvidz_core.plugins.loading import PluginRecord

logger = logging.getLogger(__name__)

#: The hooks that are asked of the owner of a job's type, and that an extension may only wrap.
OWNER_HOOKS = ("parse_job", "prepare_job", "build_command", "generate", "choose_bucket")
#: The hooks that the owner and every extension are asked, each by itself, so that a failure has one name.
SHARED_HOOKS = ("review_job", "review_artifact", "enrich_metadata")

Answer = TypeVar("Answer")


class Observer(Protocol):
    """Whatever hears events: quick, and called from any thread."""

    def __call__(self, *, event: Event) -> object:
        """Hear of one event."""
        ...


@frozen(kw_only=True)
class Owner:
    """A plugin and the job types it declared; none of them makes it an extension."""

    distribution: str
    version: str
    job_types: tuple[JobType, ...] = ()


@frozen(kw_only=True)
class OwnedJobType:
    """A job type with its owner's hooks, ready to be asked."""

    job_type: JobType
    distribution: str
    _hooks: Mapping[str, pluggy.HookCaller] = field(repr=False)
    #: By name of the hook: whoever is asked, as (distribution, hook).
    _shared_hooks: Mapping[str, tuple[tuple[str, pluggy.HookCaller], ...]] = field(repr=False)

    def parse_job(self, payload: Payload) -> Job:
        """Ask for the job of ``payload``; see the hook's specification."""
        job = self._ask("parse_job", Job, job_type=self.job_type, payload=payload)
        if job.id != payload.id or job.user_id != payload.user_id or job.job_type != self.job_type.name:
            raise self._failed("parse_job", "it changed the job's id, user_id or job_type")
        self._check_job("parse_job", job)
        return job

    def review_job(self, job: Job) -> None:
        """Ask everybody whether ``job`` may be made.

        :raises PolicyRefused: somebody refuses it; its details name who.
        """
        self._review("review_job", job=job)

    def prepare_job(self, job: Job, context: JobContext) -> Job:
        """Ask for the job as it shall be generated."""
        prepared = self._ask("prepare_job", Job, job=job, context=context)
        if (prepared.id, prepared.user_id, prepared.job_type) != (job.id, job.user_id, job.job_type):
            raise self._failed("prepare_job", "it changed the job's id, user_id or job_type")
        self._check_job("prepare_job", prepared)
        return prepared

    def build_command(self, job: Job, context: JobContext) -> Command | None:
        """Ask for the job's command line, if it has one."""
        return self._ask_optional("build_command", Command, job=job, context=context)

    def generate(self, job: Job, command: Command | None, context: JobContext) -> Generation:
        """Ask for the artifacts, or for what will write them: see :meth:`finish`."""
        generation = self._ask("generate", Generation, job=job, command=command, context=context)
        if generation.finish is None:
            self._check_artifacts(generation.artifacts)
        elif generation.artifacts:
            raise self._failed("generate", "it answered artifacts and a finish; one of them makes the files")
        elif not callable(generation.finish):
            raise self._failed("generate", f"finish is {shown(generation.finish)}, not a function")
        _require_json(generation.facts, lambda reason: self._failed("generate", f"facts {reason}"))
        return generation

    def finish(self, generation: Generation) -> Generation:
        """``generation`` with its files written. Needs no device, and may run beside the next job's ``generate``."""
        if generation.finish is None:
            return generation
        artifacts = _guarded(generation.finish, _failure_of(self.distribution, "the finish of generate"))
        self._check_artifacts(artifacts)
        return attrs.evolve(generation, artifacts=tuple(artifacts), finish=None)

    @property
    def is_reviewed(self) -> bool:
        """Whether somebody looks at artifacts before they are stored, which may take the device."""
        return any(hook.get_hookimpls() for _, hook in self._shared_hooks["review_artifact"])

    def review_artifact(self, job: Job, artifact: Artifact, context: JobContext) -> None:
        """Ask everybody whether ``artifact`` may be stored.

        :raises PolicyRefused: somebody refuses it; its details name who.
        """
        self._review("review_artifact", job=job, artifact=artifact, context=context)

    def choose_bucket(self, job: Job, artifact: Artifact) -> str:
        """Ask for the bucket of one artifact; the registered one unless the owner says another."""
        bucket = self._ask_optional("choose_bucket", str, job=job, artifact=artifact)
        if bucket is None:
            return self.job_type.bucket
        if not NAME_PATTERN.fullmatch(bucket):
            raise self._failed("choose_bucket", f"{shown(bucket)} is no bucket name")
        return bucket

    def enrich_metadata(self, job: Job, generation: Generation, measured: Mapping[str, Any]) -> dict[str, Any]:
        """``measured`` with what the owner and the extensions add.

        :raises MetadataClash: somebody reports a key that is already there.
        """
        metadata = dict(measured)
        reported_by = dict.fromkeys(measured, "ourvidz-core")
        for distribution, hook in self._shared_hooks["enrich_metadata"]:
            failed = _failure_of(distribution, "enrich_metadata")
            for answer in _all_answers(hook, failed, job=job, generation=generation):
                if not isinstance(answer, Mapping):
                    raise failed(f"it answered {shown(answer)}, not a mapping")
                _require_json(answer, lambda reason, failed=failed: failed(f"its answer {reason}"))  # type: ignore[misc]
                for key, value in answer.items():
                    if key in metadata:
                        raise MetadataClash(
                            f"{distribution} reports metadata key {key!r}, which {reported_by[key]} reports too;"
                            " rename it in one of them"
                        )
                    metadata[key] = value
                    reported_by[key] = distribution
        return metadata

    def _review(self, name: str, **arguments: Any) -> None:
        for distribution, hook in self._shared_hooks[name]:
            failed = _failure_of(distribution, name)
            try:
                answers = _all_answers(hook, failed, **arguments)
            except PolicyRefused as refusal:
                raise PolicyRefused(
                    refusal.message, details={**refusal.details, "refused_by": distribution}
                ) from refusal
            # Whoever answers False meant to refuse; nothing may pass by such a mistake.
            for answer in answers:
                raise failed(
                    f"it answered {shown(answer)}; to refuse, raise PolicyRefused; to let pass, answer nothing"
                )

    def _check_artifacts(self, artifacts: object) -> None:
        if not isinstance(artifacts, tuple | list) or not artifacts:
            raise self._failed("generate", "it answered a generation without artifacts")
        for artifact in artifacts:
            if not isinstance(artifact, Artifact) or not isinstance(artifact.path, Path):
                raise self._failed("generate", f"artifacts hold {shown(artifact)}, not an Artifact with a pathlib.Path")
        if len({artifact.path for artifact in artifacts}) < len(artifacts):
            raise self._failed("generate", "it answered one file as two artifacts")

    def _check_job(self, hook: str, job: Job) -> None:
        preset = type(self.job_type.preset)
        if not isinstance(job.config, preset):
            raise self._failed(hook, f"config is {shown(job.config)}, not a {preset.__name__}")
        for name in ("facts", "ignored_config"):
            values = getattr(job, name)
            if not isinstance(values, Mapping):
                raise self._failed(hook, f"{name} is {shown(values)}, not a mapping")
            _require_json(values, lambda reason, name=name: self._failed(hook, f"{name} {reason}"))  # type: ignore[misc]

    def _ask(self, name: str, kind: type[Answer], **arguments: Any) -> Answer:
        answer = self._ask_optional(name, kind, **arguments)
        if answer is None:
            raise self._failed(name, "nobody answered")
        return answer

    def _ask_optional(self, name: str, kind: type[Answer], **arguments: Any) -> Answer | None:
        answer = _guarded(lambda: self._hooks[name](**arguments), _failure_of(self.distribution, name))
        if answer is not None and not isinstance(answer, kind):
            raise self._failed(name, f"it answered {shown(answer)}, not a {kind.__name__}")
        return answer

    def _failed(self, hook: str, reason: str) -> HookFailed:
        return _failure_of(self.distribution, hook)(reason)


class Registry:
    """The loaded plugins and the job types they own."""

    def __init__(
        self, manager: pluggy.PluginManager, plugins: Sequence[Owner], records: Sequence[PluginRecord]
    ) -> None:
        self.manager = manager
        #: Every plugin that was found, loaded or not.
        self.records = tuple(records)
        owners = [plugin for plugin in plugins if plugin.job_types]
        extensions = [plugin for plugin in plugins if not plugin.job_types]
        self._observers: list[tuple[str, Callable[..., object]]] = [
            (plugin.distribution, self._bind("handle_event", plugins, [plugin])) for plugin in plugins
        ]
        self._checkers = [(plugin.distribution, self._bind("doctor_checks", plugins, [plugin])) for plugin in plugins]
        self._warmers = {
            plugin.distribution: (plugin, hook)
            for plugin in plugins
            if (hook := self._bind("warm_up", plugins, [plugin])).get_hookimpls()
        }
        self._owned: dict[str, OwnedJobType] = {}
        for owner in owners:
            heard = [owner, *extensions]
            hooks = {name: self._bind(name, plugins, heard) for name in OWNER_HOOKS}
            shared_hooks = {
                name: tuple((plugin.distribution, self._bind(name, plugins, [plugin])) for plugin in heard)
                for name in SHARED_HOOKS
            }
            for job_type in owner.job_types:
                self._owned[job_type.name] = OwnedJobType(
                    job_type=job_type, distribution=owner.distribution, hooks=hooks, shared_hooks=shared_hooks
                )

    @property
    def job_types(self) -> tuple[JobType, ...]:
        """All job types, by name."""
        return tuple(self._owned[name].job_type for name in sorted(self._owned))

    @property
    def queues(self) -> tuple[str, ...]:
        """The queues that some job type comes from, by name."""
        return tuple(sorted({job_type.queue for job_type in self.job_types}))

    def get(self, name: str) -> OwnedJobType:
        """The job type ``name`` with its owner's hooks.

        :raises UnknownJobType: naming the types there are, and the plugins that did not load.
        """
        owned = self._owned.get(name)
        if owned is None:
            known = ", ".join(sorted(self._owned)) or "none"
            absent = [f"{r.distribution} {r.version} {r.reason}" for r in self.records if r.status != "loaded"]
            note = f"; not loaded: {'; '.join(absent)}" if absent else ""
            raise UnknownJobType(f"$.type: no plugin owns {shown(name)}; the job types here are {known}{note}")
        return owned

    def observe(self, name: str, observer: Observer) -> None:
        """Let ``observer`` hear every event too, before the plugins do; ``name`` is who is blamed where it fails."""
        self._observers.insert(0, (name, observer))

    def report(self, event: Event) -> None:
        """Tell every observer and every plugin of ``event``; one that fails is logged and the others still hear it."""
        for distribution, hook in tuple(self._observers):
            try:
                hook(event=event)
            except (Exception, SystemExit):
                logger.exception("%s failed in handle_event on %s", distribution, type(event).__name__)

    def checks(self, settings: ReadSettings) -> Iterator[Check]:
        """What the plugins have ``ourvidz doctor`` look at. One that fails to say so is a check that fails."""
        for distribution, hook in self._checkers:
            try:
                # Where a plugin has wrapped the hook, its answer may be a generator that raises only here.
                yield from [check for answer in hook(settings=settings) for check in answer]
            except (Exception, SystemExit) as error:
                yield Check(name=f"checks of {distribution}", run=_raises(error), is_at_start=True)

    def warmed_by(self, names: Collection[str]) -> Mapping[str, tuple[str, ...]]:
        """Who makes something ready for the job types ``names``, and for which: an extension for all of them."""
        asked = {
            distribution: tuple(
                name for name in names if not plugin.job_types or name in {own.name for own in plugin.job_types}
            )
            for distribution, (plugin, _) in self._warmers.items()
        }
        return {distribution: types for distribution, types in asked.items() if types}

    def warm_up(self, distribution: str, names: Sequence[str], context: JobContext) -> None:
        """Ask the plugin of ``distribution`` to make ready what the job types ``names`` need.

        :raises JobError: it could not.
        """
        _, hook = self._warmers[distribution]
        job_types = [self.get(name).job_type for name in names]
        _guarded(lambda: hook(context=context, job_types=job_types), _failure_of(distribution, "warm_up"))

    def _bind(self, name: str, plugins: Sequence[Owner], heard: Sequence[Owner]) -> pluggy.HookCaller:
        kept = {plugin.distribution for plugin in heard}
        left_out = [
            self.manager.get_plugin(plugin.distribution) for plugin in plugins if plugin.distribution not in kept
        ]
        return self.manager.subset_hook_caller(name, remove_plugins=left_out)


def _failure_of(distribution: str, hook: str) -> Callable[[str], HookFailed]:
    return lambda reason: HookFailed(f"{distribution} failed in {hook}: {reason}")


def _raises(error: BaseException) -> Callable[[], list[Finding]]:
    def run() -> list[Finding]:
        raise error

    return run


def _all_answers(hook: pluggy.HookCaller, failed: Callable[[str], HookFailed], **arguments: Any) -> list[Any]:
    answers = _guarded(lambda: hook(**arguments), failed)
    if not isinstance(answers, list):
        raise failed(f"its wrapper answered {shown(answers)}; a wrapper answers what it got of its yield")
    return answers


def _guarded(ask: Callable[[], Any], failed: Callable[[str], HookFailed]) -> Any:
    """Call a hook. An error of ours passes; anything else becomes a failure that names the plugin."""
    try:
        return ask()
    except JobError:
        raise
    except OurVidzError as error:
        raise HookFailed(str(error), error_type=type(error).__name__) from error
    except SystemExit as error:
        raise failed(f"it called sys.exit({error.code!r}); raise an error instead") from error
    except Exception as error:
        named = failed(f"{type(error).__name__}: {error}")
        raise HookFailed(named.message, error_type=type(error).__name__) from error


def _require_json(facts: Mapping[str, Any], failed: Callable[[str], HookFailed]) -> None:
    try:
        json.dumps(dict(facts), allow_nan=False, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise failed(f"hold something that JSON cannot: {error}") from error
    if not all(isinstance(key, str) for key in facts):
        raise failed("have a key that is no string")
