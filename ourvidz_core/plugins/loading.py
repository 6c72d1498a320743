"""Find installed plugins and load them one by one, so that a broken one harms no other.

Every plugin that was found ends as a :class:`PluginRecord`, whatever happened to it; a
failure is a value that can be listed, never a lost log line.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from enum import StrEnum
from importlib.metadata import Distribution, distributions
from typing import Any

import pluggy
from attrs import evolve, field, frozen
from packaging.utils import canonicalize_name

import ourvidz_core
from ourvidz_core.errors import DuplicateJobType, InvalidJobType, RequiredPluginMissing
from ourvidz_core.plugins import hookspecs
from ourvidz_core.plugins.defaults import CoreDefaults
from ourvidz_core.plugins.hookspecs import PROJECT
from ourvidz_core.plugins.registry import OWNER_HOOKS, Owner, Registry
from ourvidz_core.plugins.trust import refusal_of
from ourvidz_core.plugins.versions import CORE, HookDeprecated, incompatibility_of
from ourvidz_core.settings import Settings
from ourvidz_core.wire.job_types import JobType

logger = logging.getLogger(__name__)

ENTRY_POINT_GROUP = "ourvidz"


class PluginStatus(StrEnum):
    """What became of a plugin that was found."""

    LOADED = "loaded"
    BLOCKED = "blocked"
    INCOMPATIBLE = "incompatible"
    FAILED = "failed"


@frozen(kw_only=True)
class FoundPlugin:
    """A plugin that is installed: its distribution, and how to import it."""

    distribution: str
    version: str
    load: Callable[[], object] = field(repr=False)
    #: What its distribution requires, as pip reads it.
    requires: tuple[str, ...] = ()


@frozen(kw_only=True)
class PluginRecord:
    """A plugin and what became of it."""

    distribution: str
    version: str
    status: PluginStatus
    job_types: tuple[str, ...] = ()
    hooks: tuple[str, ...] = ()
    #: Why it is not loaded; for a failure with its stage: metadata, import, validation or job types.
    reason: str = ""
    #: What it should change, although it is loaded: deprecated hooks and arguments.
    warnings: tuple[str, ...] = ()


def installed_plugins(group: str = ENTRY_POINT_GROUP) -> list[FoundPlugin]:
    """The plugins whose distributions declare an entry point of ``group``, by name."""
    found: dict[str, FoundPlugin] = {}
    for distribution in distributions():
        try:
            plugin = _plugin_of(distribution, group)
        except Exception as error:  # the remains of some installation, which may be none of ours
            logger.warning("the metadata of a distribution cannot be read: %s: %s", type(error).__name__, error)
            continue
        # The first on the path is the one that an import finds, so it is the one that counts.
        if plugin is not None:
            found.setdefault(canonicalize_name(plugin.distribution), plugin)
    return [found[name] for name in sorted(found)]


def _plugin_of(distribution: Distribution, group: str) -> FoundPlugin | None:
    for entry_point in distribution.entry_points:
        if entry_point.group == group:
            # Not distribution.name: it is None where the metadata lacks it, whatever its type says.
            metadata = distribution.metadata
            said = {key: metadata[key] for key in ("Name", "Version") if key in metadata}
            return FoundPlugin(
                distribution=said.get("Name", entry_point.name),
                version=said.get("Version", "unknown"),
                load=entry_point.load,
                requires=tuple(distribution.requires or ()),
            )
    return None


def load_registry(settings: Settings, found: Iterable[FoundPlugin] | None = None) -> Registry:
    """Load the plugins that the settings allow and give each job type its owner.

    :raises DuplicateJobType: two plugins register one type.
    :raises RequiredPluginMissing: a plugin that the settings require is not loaded.
    """
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(hookspecs)
    with warnings.catch_warnings():
        # Core answers a deprecated hook for as long as there is one.
        warnings.simplefilter("ignore", HookDeprecated)
        manager.register(CoreDefaults(), name=CORE)
    records: list[PluginRecord] = []
    declared: list[tuple[FoundPlugin, tuple[JobType, ...]]] = []
    for plugin in installed_plugins() if found is None else found:
        record, job_types = _load(manager, plugin, settings)
        records.append(record)
        if record.status is PluginStatus.LOADED:
            declared.append((plugin, job_types))
            for warning in record.warnings:
                logger.warning("plugin %s %s: %s", plugin.distribution, plugin.version, warning)
        elif record.status is not PluginStatus.BLOCKED:
            logger.error("plugin %s %s is not loaded: %s", plugin.distribution, plugin.version, record.reason)
    _refuse_collisions(declared)
    _require(settings.require_plugins, records)
    owners = [
        Owner(distribution=plugin.distribution, version=plugin.version, job_types=job_types)
        for plugin, job_types in declared
    ]
    return Registry(manager, owners, records)


def _load(
    manager: pluggy.PluginManager, plugin: FoundPlugin, settings: Settings
) -> tuple[PluginRecord, tuple[JobType, ...]]:
    record = PluginRecord(distribution=plugin.distribution, version=plugin.version, status=PluginStatus.FAILED)
    if (reason := refusal_of(plugin.distribution, settings)) is not None:
        return evolve(record, status=PluginStatus.BLOCKED, reason=reason), ()
    stage = "metadata"
    try:
        reason = incompatibility_of(plugin.distribution, plugin.requires, ourvidz_core.__version__)
        if reason is not None:
            return evolve(record, status=PluginStatus.INCOMPATIBLE, reason=reason), ()
        stage = "import"
        # What a plugin prints must not end in the JSON that a command prints.
        with contextlib.redirect_stdout(sys.stderr):
            module = plugin.load()
            stage = "validation"
            manager.register(module, name=plugin.distribution)
            _refuse_unknown_hooks(manager, module)
            stage = "job types"
            job_types = _declared_job_types(module)
            if not job_types:
                _refuse_unowned_answers(manager, module)
    except (Exception, SystemExit) as error:
        manager.unregister(name=plugin.distribution) if manager.has_plugin(plugin.distribution) else None
        return evolve(record, reason=f"({stage}) {type(error).__name__}: {error}"), ()
    callers = manager.get_hookcallers(module) or []
    return (
        evolve(
            record,
            status=PluginStatus.LOADED,
            job_types=tuple(job_type.name for job_type in job_types),
            hooks=tuple(sorted(caller.name for caller in callers)),
            warnings=_deprecations(manager, module),
        ),
        job_types,
    )


def _deprecations(manager: pluggy.PluginManager, module: object) -> tuple[str, ...]:
    """What pluggy has warned of while ``module`` was registered, for those who never see a Python warning."""
    found: list[str] = []
    for caller in manager.get_hookcallers(module) or ():
        if caller.spec is None:
            continue
        if caller.spec.warn_on_impl is not None:
            found.append(str(caller.spec.warn_on_impl))
        arguments = caller.spec.warn_on_impl_args or {}
        for impl in caller.get_hookimpls():
            if impl.plugin is module:
                found += [str(arguments[name]) for name in impl.argnames if name in arguments]
    return tuple(found)


def _refuse_unknown_hooks(manager: pluggy.PluginManager, module: object) -> None:
    """A hook implementation with a mistyped name would otherwise never be called."""
    for caller in manager.get_hookcallers(module) or ():
        if caller.spec is None:
            known = ", ".join(
                sorted(name for name in vars(hookspecs) if hasattr(getattr(hookspecs, name), f"{PROJECT}_spec"))
            )
            raise pluggy.PluginValidationError(module, f"there is no hook {caller.name!r}; the hooks are {known}")


def _refuse_unowned_answers(manager: pluggy.PluginManager, module: object) -> None:
    """An extension's plain answer to an owner's hook would be the answer for every owner's jobs."""
    for caller in manager.get_hookcallers(module) or ():
        for impl in caller.get_hookimpls():
            if caller.name in OWNER_HOOKS and impl.plugin is module and not (impl.wrapper or impl.hookwrapper):
                raise pluggy.PluginValidationError(
                    module,
                    f"it answers {caller.name} and registers no job types; only a type's owner may answer,"
                    " an extension may wrap: @hookimpl(wrapper=True)",
                )


def _declared_job_types(module: object) -> tuple[JobType, ...]:
    declare = getattr(module, "register_job_types", None)
    if declare is None:
        return ()
    answer: Any = declare()
    if isinstance(answer, JobType) or not isinstance(answer, Iterable) or isinstance(answer, str | bytes):
        raise InvalidJobType(f"register_job_types must answer an iterable of JobType, not {answer!r}")
    job_types: list[JobType] = []
    for job_type in answer:
        if not isinstance(job_type, JobType):
            raise InvalidJobType(f"register_job_types must yield JobType, not {job_type!r}")
        if any(job_type.name == other.name for other in job_types):
            raise InvalidJobType(f"register_job_types yields {job_type.name!r} twice")
        job_types.append(job_type)
    return tuple(job_types)


def _refuse_collisions(declared: Sequence[tuple[FoundPlugin, tuple[JobType, ...]]]) -> None:
    owners: dict[str, FoundPlugin] = {}
    for plugin, job_types in declared:
        for job_type in job_types:
            other = owners.setdefault(job_type.name, plugin)
            if other is not plugin:
                raise DuplicateJobType(
                    f"{job_type.name!r} is registered by {other.distribution} {other.version} and"
                    f" {plugin.distribution} {plugin.version}. Block one of them:"
                    f" OURVIDZ_BLOCK_PLUGINS={plugin.distribution}"
                )


def _require(required: Iterable[str], records: Iterable[PluginRecord]) -> None:
    by_name = {canonicalize_name(record.distribution): record for record in records}
    for name in required:
        record = by_name.get(canonicalize_name(name))
        if record is None:
            raise RequiredPluginMissing(f"{name} is required and not installed; pip install {name}")
        if record.status is not PluginStatus.LOADED:
            raise RequiredPluginMissing(f"{name} {record.version} is required and {record.status}: {record.reason}")
