"""``ourvidz doctor``: look at everything that a worker depends on, and say what is wrong and what to do."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import click

from ourvidz_core.cli.common import open_registry, open_settings, print_json
from ourvidz_core.errors import OurVidzError, PluginError
from ourvidz_core.settings import Settings, load_section
from ourvidz_core.wire.findings import Check, Finding, Level

if TYPE_CHECKING:
    from ourvidz_core.doctor.examine import Examined
    from ourvidz_core.plugins.registry import Registry
    from ourvidz_core.wire.job_types import JobType

_COLOURS = {Level.GREEN: "green", Level.YELLOW: "yellow", Level.RED: "red"}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--only", multiple=True, metavar="NAME", help="Only this check: redis, storage, models ... Repeatable.")
@click.option("--thorough", is_flag=True, help="Also what takes minutes: checksums of the model files.")
def doctor(as_json: bool, only: Sequence[str], thorough: bool) -> int:
    """Look at Redis, storage, the callback endpoint, models, GPUs, disks, the clock, settings and plugins.

    Green is well, yellow works, red does not; yellow and red come with their cure. A probe
    object is written to each bucket and removed again; the callback endpoint is asked for
    its OPTIONS and gets no message. Ends with 1 where anything is red.
    """
    from ourvidz_core.doctor.examine import examine, select

    settings = open_settings(at_least=logging.CRITICAL)
    checks = [check for check in all_checks(settings) if thorough or not check.is_thorough]
    if only:
        checks, known = select(checks, only), checks
        if not checks:
            raise click.UsageError(
                f"no check is called {', '.join(only)}; there are {', '.join(c.name for c in known)}"
            )
    examined = examine(checks)
    worst = max((one.level for one in examined), key=lambda level: level.rank)
    if as_json:
        print_json({"level": worst.value, "checks": [_as_json(one) for one in examined]})
    else:
        _print(examined)
    return 1 if worst is Level.RED else 0


def all_checks(settings: Settings) -> list[Check]:
    """Every check of this set-up."""
    from ourvidz_core.cli.wiring import callback_url
    from ourvidz_core.doctor.endpoint import endpoint_checks
    from ourvidz_core.doctor.machine import disk_check, gpu_check
    from ourvidz_core.doctor.plugins import plugin_check
    from ourvidz_core.doctor.redis_server import redis_checks
    from ourvidz_core.doctor.variables import variables_check

    try:
        registry = open_registry(settings)
    except PluginError as error:
        plugins, models = [Check(name="plugins", run=_red(str(error)))], list[Check]()
        job_types: tuple[JobType, ...] = ()
    else:
        plugins, job_types = [plugin_check(registry.records)], registry.job_types
        models = list(registry.checks(load_section))
    return [
        *redis_checks(settings),
        *_storage_checks(settings, job_types),
        *endpoint_checks(
            callback_url(settings),
            settings.callback_dir or settings.state_dir / "callbacks",
            is_signed=bool(settings.callback_secret),
            timeout_seconds=settings.callback_timeout_seconds,
        ),
        *models,
        gpu_check(settings, job_types),
        disk_check(settings),
        variables_check(os.environ),
        *plugins,
    ]


def _storage_checks(settings: Settings, job_types: Sequence[JobType]) -> list[Check]:
    from ourvidz_core.cli.wiring import make_storage
    from ourvidz_core.doctor.buckets import storage_checks

    try:
        storage = make_storage(settings)
    except OurVidzError as error:
        return [Check(name="storage", run=_red(str(error)))]
    return storage_checks(storage, job_types, limits_mb=settings.bucket_limits_mb, is_probed=True)


def start_checks(settings: Settings, registry: Registry, queues: Sequence[str]) -> list[Check]:
    """What a worker for ``queues`` looks at before it takes a job: nothing slow, nothing that changes anything."""
    from ourvidz_core.cli.wiring import make_storage
    from ourvidz_core.doctor.buckets import storage_checks
    from ourvidz_core.doctor.redis_server import redis_checks

    job_types = [job_type for job_type in registry.job_types if job_type.queue in queues]
    checks = [
        *redis_checks(settings),
        *storage_checks(make_storage(settings), job_types, limits_mb=settings.bucket_limits_mb, is_probed=False),
        *registry.checks(load_section),
    ]
    return [check for check in checks if check.is_at_start]


def _red(message: str) -> Callable[[], list[Finding]]:
    return lambda: [Finding.red(message, cure="do what the message says; until then no worker starts")]


def _as_json(examined: Examined) -> dict[str, object]:
    return {
        "check": examined.name,
        "level": examined.level.value,
        "seconds": examined.seconds,
        "findings": [
            {
                "level": finding.level.value,
                "message": finding.message,
                "cure": finding.cure or None,
                "job_types": list(finding.job_types),
            }
            for finding in examined.findings
        ],
    }


def _print(examined: Sequence[Examined]) -> None:
    width = max(len(one.name) for one in examined)
    for one in examined:
        name = one.name
        for finding in one.findings or (Finding.green("nothing to look at"),):
            level = click.style(f"{finding.level.value:<6}", fg=_COLOURS[finding.level])
            click.echo(f"{level}  {name:<{width}}  {finding.message}")
            if finding.cure:
                click.echo(f"{'':<6}  {'':<{width}}  cure: {finding.cure}")
            name = ""
    counts = {level: sum(finding.level is level for one in examined for finding in one.findings) for level in Level}
    click.echo(", ".join(f"{count} {level.value}" for level, count in counts.items() if count))
