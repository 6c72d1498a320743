"""``ourvidz worker``: take jobs from queues until told to stop."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import attrs
import click

from ourvidz_core.cli.common import open_registry, open_settings
from ourvidz_core.errors import SettingsError
from ourvidz_core.settings import Settings
from ourvidz_core.wire.findings import Level

if TYPE_CHECKING:
    from ourvidz_core.doctor.fitness import Fitness
    from ourvidz_core.plugins.registry import Registry

logger = logging.getLogger(__name__)

#: A worker without its orchestrator has this long to hand back what it has; then its lease ends.
ALONE_SECONDS = 20.0


@click.command()
@click.option("--queues", help="Queues to take jobs from, comma-separated; all that a plugin owns unless said.")
@click.option(
    "--require",
    multiple=True,
    metavar="NAME",
    help="Start only with this distribution loaded; may be given repeatedly.",
)
@click.option("--once", is_flag=True, help="Work on one job, then end.")
@click.option("--drain", is_flag=True, help="Work until the queues are empty, then end.")
@click.option("--preload", is_flag=True, help="Load and warm the models of the queues before the first job is taken.")
@click.option("--no-checks", is_flag=True, help="Start without looking at Redis, storage and models first.")
@click.option("--supervisor", type=int, hidden=True, help="Descriptor of the line to ourvidz up.")
def worker(  # noqa: PLR0917 - click names them all
    queues: str | None,
    require: tuple[str, ...],
    once: bool,
    drain: bool,
    preload: bool,
    no_checks: bool,
    supervisor: int | None,
) -> None:
    """Take jobs from the queues, store what they make, and report.

    SIGTERM or Ctrl-C: no more jobs are taken, those at hand may finish for
    OURVIDZ_DRAIN_SECONDS and are then handed back. A second one hands them back at once.

    What cannot be done here is not taken: a queue whose models are missing is not served, and
    jobs of such a type in a mixed queue are left to other workers. ourvidz doctor says more.
    With --once and --drain they fail instead, and say why.
    """
    from ourvidz_core.cli.wiring import make_queue, make_worker
    from ourvidz_core.doctor.fitness import Fitness
    from ourvidz_core.orchestrator.link import WorkerEnd
    from ourvidz_core.worker.worker import Until

    stops: list[Callable[[], None]] = []
    asked = threading.Event()

    def on_signal(*_: object) -> None:
        asked.set()
        for stop in stops:
            # A thread of its own: a handler that takes a lock its own thread holds would wait for ever.
            threading.Thread(target=stop, name="stop").start()

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    settings = open_settings()
    line = None
    if supervisor is not None:
        sign_seconds = settings.silence_seconds / 8
        line = WorkerEnd(supervisor, lambda: _end_alone(stops), sign_seconds=sign_seconds)
    settings = attrs.evolve(
        settings,
        require_plugins=[*settings.require_plugins, *require],
        preload=settings.preload or preload,
    )
    registry = open_registry(settings)
    chosen = tuple(name.strip() for name in queues.split(",") if name.strip()) if queues else registry.queues
    if unknown := [name for name in chosen if name not in registry.queues]:
        known = ", ".join(registry.queues) or "none: no plugin with job types is loaded"
        raise SettingsError(f"no loaded plugin owns jobs of queue {', '.join(unknown)}; the queues are {known}")
    if not chosen:
        raise SettingsError("no plugin with job types is loaded; ourvidz plugins list says why")
    until = Until.ONE_JOB if once else Until.DRAINED if drain else Until.STOPPED
    queue = make_queue(settings)
    try:
        fitness = Fitness(queues=chosen)
        if not no_checks:
            fitness = _look_before_start(settings, registry, chosen, leaves_some=until is Until.STOPPED)
        with make_worker(settings, registry, queue, fitness.queues, impossible=fitness.impossible) as running:
            stops.append(running.stop)
            if asked.is_set():
                running.stop()
            if line is not None:
                line.say_ready(fitness.queues, fitness.left_out)
            running.run(until)
    finally:
        queue.close()


def _look_before_start(settings: Settings, registry: Registry, queues: Sequence[str], *, leaves_some: bool) -> Fitness:
    """What of ``queues`` can be served. Without ``leaves_some`` nothing is left to others, and fails here."""
    from ourvidz_core.cli.doctor import start_checks
    from ourvidz_core.doctor.examine import examine
    from ourvidz_core.doctor.fitness import Fitness, judge, refuse_start

    examined = examine(start_checks(settings, registry, queues))
    refuse_start(examined)
    for one in examined:
        for finding in one.findings if one.name != "redis" else ():  # of that the connection has warned
            if finding.level is Level.YELLOW:
                logger.warning("%s: %s (cure: %s)", one.name, finding.message, finding.cure)
    fitness = judge(examined, queues, registry.job_types) if leaves_some else Fitness(queues=tuple(queues))
    for what, reason in fitness.left_out.items():
        logger.error("%s is left to other workers: %s", what, reason)
    return fitness


def _end_alone(stops: Sequence[Callable[[], None]]) -> None:
    """The orchestrator is gone, and a new one starts workers of its own: hand everything back, and end."""
    if not stops:
        os._exit(0)  # nothing was taken yet
    limit = threading.Timer(ALONE_SECONDS, os._exit, [1])
    limit.daemon = True
    limit.start()
    for stop in (*stops, *stops):
        stop()
