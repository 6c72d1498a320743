"""``ourvidz status``: how the workers are, those of this machine's orchestrator and all others on the Redis."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

import attrs
import click

from ourvidz_core.cli.common import open_settings, print_json, table
from ourvidz_core.cli.up import REPORT_DIRECTORY
from ourvidz_core.errors import QueueError
from ourvidz_core.settings import Settings

if TYPE_CHECKING:
    from ourvidz_core.delivery.board import WorkerStatus
    from ourvidz_core.orchestrator.report import OrchestratorReport, WorkerReport

#: Lines of a log that are shown of a worker that does not stay up.
_SHOWN_LINES = 5


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(as_json: bool) -> int:
    """Show the workers that ourvidz up runs here, and what every worker on this Redis is doing.

    Ends with 1 where a worker ends again and again, or the orchestrator has died; with 3 where
    Redis does not answer.
    """
    from ourvidz_core.orchestrator.report import read_report

    settings = open_settings(at_least=logging.CRITICAL)
    report, is_alive = read_report(settings.state_dir / REPORT_DIRECTORY)
    board, trouble = _board(settings)
    died = report is not None and not is_alive and any(worker.pid is not None for worker in report.workers)
    if as_json:
        print_json(
            {
                "orchestrator": None if report is None else {"is_alive": is_alive, **attrs.asdict(report)},
                "workers": [attrs.asdict(worker) for worker in board],
                "trouble": trouble,
            }
        )
    else:
        _print_orchestrator(report, board, is_alive=is_alive)
        others = [worker for worker in board if report is None or not _is_of(worker, report)]
        _print_others(others)
        if trouble is not None:
            click.echo(f"what the workers are doing is not known: {trouble}")
    loops = report is not None and is_alive and any(worker.is_looping for worker in report.workers)
    return 1 if loops or died else 0 if trouble is None else 3


def describe_loop(worker: WorkerReport, now: float) -> str:
    """A crash loop in one sentence."""
    minutes = max((now - (worker.failing_since or now)) / 60, 0.1)
    return f"crash loop: {worker.failures} restarts in {minutes:.1f} minutes, last {worker.last_ending}"


def _board(settings: Settings) -> tuple[list[WorkerStatus], str | None]:
    from ourvidz_core.cli.wiring import make_board

    try:
        board = make_board(settings)
        try:
            return board.workers(), None
        finally:
            board.close()
    except QueueError as error:
        return [], str(error)


def _is_of(worker: WorkerStatus, report: OrchestratorReport) -> bool:
    return any(worker.name == known.worker_name for known in report.workers)


def _print_orchestrator(report: OrchestratorReport | None, board: list[WorkerStatus], *, is_alive: bool) -> None:
    if report is None:
        click.echo("no ourvidz up has run here")
        return
    now = time.time()
    if not is_alive:
        click.echo(f"ourvidz up does not run; it was process {report.pid} until {_ago(now - report.updated_at)} ago")
        return
    doing = "ending" if report.is_ending else f"replacing {report.rolling}" if report.rolling else "up"
    click.echo(f"ourvidz up, process {report.pid} on {report.host}, {doing} since {_ago(now - report.started_at)}")
    published = {worker.name: worker for worker in board}
    rows = []
    for worker in report.workers:
        state = "crash loop" if worker.is_looping else worker.state.value
        seen = published.get(worker.worker_name)
        rows.append(
            (
                worker.name,
                state,
                _ago(now - worker.since),
                worker.pid or "-",
                worker.restarts,
                " ".join(worker.queues),
                " ".join(worker.gpus) or "-",
                "-" if worker.memory_gb is None else f"{worker.memory_gb:g}",
                *_doing(seen),
            )
        )
    head = ("WORKER", "STATE", "SINCE", "PID", "RESTARTS", "QUEUES", "GPU", "GIB", "DOING", "DONE", "FAILED")
    click.echo(table(head, rows))
    for worker in report.workers:
        _print_troubles(worker, now)


def _print_troubles(worker: WorkerReport, now: float) -> None:
    if worker.is_looping:
        due = "" if worker.next_start_at is None else f", next start in {_ago(worker.next_start_at - now)}"
        click.echo(f"\n{worker.name}: {describe_loop(worker, now)}{due}; the end of its log:")
        for line in worker.last_lines[-_SHOWN_LINES:]:
            click.echo(f"  {line}")
    for what, reason in worker.left_out.items():
        click.echo(f"\n{worker.name} does not take {what}: {reason}")


def _print_others(workers: list[WorkerStatus]) -> None:
    if not workers:
        return
    now = time.time()
    click.echo("\nother workers on this Redis")
    rows = [
        (
            worker.name,
            worker.host,
            worker.state.value,
            _ago(now - worker.started_at),
            " ".join(worker.queues),
            *_doing(worker),
        )
        for worker in workers
    ]
    click.echo(table(("WORKER", "HOST", "STATE", "UP", "QUEUES", "DOING", "DONE", "FAILED"), rows))


def _doing(worker: WorkerStatus | None) -> tuple[Any, Any, Any]:
    if worker is None:
        return "-", "-", "-"
    jobs = ", ".join(f"{job.type} {job.stage}{f' {job.step}/{job.total}' if job.total else ''}" for job in worker.jobs)
    return jobs or worker.state.value, worker.completed, worker.failed


def _ago(seconds: float) -> str:
    """A duration for people: 45s, 12m, 3h, 2d."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= size:
            return f"{seconds / size:.0f}{unit}"
    return f"{max(seconds, 0):.0f}s"
