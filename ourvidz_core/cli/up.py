"""``ourvidz up``: run workers, and keep them running."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ourvidz_core.cli.common import open_registry, open_settings
from ourvidz_core.errors import SettingsError
from ourvidz_core.settings import SETTINGS_FILE, Settings, load, load_worker_tables, variable_of

if TYPE_CHECKING:
    from ourvidz_core.delivery.embedded import EmbeddedRedis
    from ourvidz_core.doctor.gpus import GpuReport
    from ourvidz_core.orchestrator.plan import PlannedWorker, WorkerTable
    from ourvidz_core.plugins.registry import Registry

logger = logging.getLogger(__name__)

#: Where the orchestrator reports, below the state directory.
REPORT_DIRECTORY = "up"


@click.command()
@click.option("--config", type=click.Path(path_type=Path), help="A settings file; its [[ourvidz.workers]] are run.")
@click.option("--workers", type=click.IntRange(min=1), help="How many workers; one for each GPU unless said.")
@click.option("--gpus", help="Numbers of the GPUs to use, comma-separated, or all: a worker for each.")
@click.option(
    "--gpus-per-worker",
    type=click.IntRange(min=1),
    default=1,
    help="How many GPUs each worker gets, for job types that use several.",
)
@click.option("--per-queue", is_flag=True, help="A worker for each queue in place of one for all.")
@click.option("--queues", help="Queues to serve, comma-separated; all that a plugin owns unless said.")
@click.option("--no-checks", is_flag=True, help="Start workers without looking at anything first, memory included.")
def up(  # noqa: PLR0917 - click names them all
    config: Path | None,
    workers: int | None,
    gpus: str | None,
    gpus_per_worker: int,
    per_queue: bool,
    queues: str | None,
    no_checks: bool,
) -> None:
    """Start workers and keep them running: one for all queues, unless flags or the settings file say otherwise.

    A worker that ends is started again, for ever, after a wait that doubles up to
    OURVIDZ_RESTART_LONGEST_SECONDS. SIGHUP reads the settings again and replaces the workers
    one by one, without losing or interrupting a job. SIGTERM or Ctrl-C lets running jobs
    finish, a second one hands them back. ourvidz status shows how all of them are. Flags win
    over the settings file's tables.
    """
    from ourvidz_core.orchestrator.plan import plan_workers, share_memory
    from ourvidz_core.orchestrator.report import ReportFile
    from ourvidz_core.orchestrator.slots import Patience
    from ourvidz_core.orchestrator.supervisor import Supervisor
    from ourvidz_core.worker.privacy import keep_to_itself

    keep_to_itself()
    if config is not None:
        os.environ[SETTINGS_FILE] = str(config)  # the workers read it, too
    settings = open_settings()
    registry = open_registry(settings)
    if not registry.queues:
        raise SettingsError("no plugin with job types is loaded; ourvidz plugins list says why")
    report = _measured(settings)

    def plan(settings: Settings) -> list[PlannedWorker]:
        tables = _tables(
            registry,
            report,
            workers=workers,
            gpus=gpus,
            gpus_per_worker=gpus_per_worker,
            per_queue=per_queue,
            queues=queues,
        )
        planned = plan_workers(
            tables,
            registry.queues,
            environ=os.environ,
            health_address=settings.health_address,
            arguments=["--no-checks"] if no_checks else [],
        )
        return share_memory(planned, report, registry.job_types, device=settings.device, is_checked=not no_checks)

    planned = plan(settings)
    file = ReportFile(settings.state_dir / REPORT_DIRECTORY)
    server = _embedded_redis(settings)
    try:
        _announce(planned)
        Supervisor(
            planned,
            # What was free at the start is what our workers share, so it is not measured anew while they have it.
            replan=lambda: plan(load()),
            patience=Patience(
                first_seconds=settings.restart_first_seconds,
                longest_seconds=max(settings.restart_longest_seconds, settings.restart_first_seconds),
                reset_seconds=settings.restart_reset_seconds,
            ),
            drain_seconds=settings.drain_seconds,
            silence_seconds=settings.silence_seconds,
            environ={**os.environ, variable_of("log_level"): settings.log_level.value},
            report=file.write,
        ).run()
    finally:
        file.close()
        if server is not None:
            server.close()


def _measured(settings: Settings) -> GpuReport:
    from ourvidz_core.doctor.gpus import GpuReport, measure_gpus

    return GpuReport() if settings.device == "cpu" else measure_gpus()


def _tables(
    registry: Registry,
    report: GpuReport,
    *,
    workers: int | None,
    gpus: str | None,
    gpus_per_worker: int,
    per_queue: bool,
    queues: str | None,
) -> list[WorkerTable]:
    from ourvidz_core.orchestrator.plan import tables_from_flags, tables_of

    if not (workers or gpus or per_queue or queues) and (written := load_worker_tables()):
        return tables_of(written)
    chosen = [name.strip() for name in queues.split(",") if name.strip()] if queues else list(registry.queues)
    return tables_from_flags(
        chosen,
        workers=workers,
        gpus=_numbers(gpus, report),
        per_queue=per_queue,
        gpus_per_worker=gpus_per_worker,
    )


def _numbers(gpus: str | None, report: GpuReport) -> list[int]:
    if gpus is None:
        return []
    if gpus.strip() == "all":
        if not report.gpus:
            raise SettingsError(f"--gpus all: there is no GPU ({report.trouble or 'OURVIDZ_DEVICE is cpu'})")
        return [gpu.index for gpu in report.gpus]
    try:
        return [int(number) for number in gpus.split(",")]
    except ValueError:
        raise click.UsageError(f"--gpus takes numbers such as 0,1, or all, not {gpus}") from None


def _embedded_redis(settings: Settings) -> EmbeddedRedis | None:
    """The embedded server, where one is used: it shall not come and go with the workers."""
    from ourvidz_core.delivery.embedded import EmbeddedRedis

    return EmbeddedRedis(settings.state_dir / "redis") if settings.redis_address is None else None


def _announce(plan: list[PlannedWorker]) -> None:
    for worker in plan:
        logger.info(
            "%s: queues %s%s%s",
            worker.name,
            ", ".join(worker.queues),
            f", GPU {', '.join(worker.gpus)}" if worker.gpus else "",
            f", {worker.memory_gb:.1f} GiB of device memory" if worker.memory_gb is not None else "",
        )
