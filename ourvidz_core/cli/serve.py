"""``ourvidz worker``: take jobs from queues until told to stop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable

import attrs
import click

from ourvidz_core.cli.common import open_registry, open_settings
from ourvidz_core.errors import SettingsError


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
def worker(queues: str | None, require: tuple[str, ...], once: bool, drain: bool) -> None:
    """Take jobs from the queues, store what they make, and report.

    SIGTERM or Ctrl-C: no more jobs are taken, those at hand may finish for
    OURVIDZ_DRAIN_SECONDS and are then handed back. A second one hands them back at once.
    """
    from ourvidz_core.cli.wiring import make_queue, make_worker
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
    settings = attrs.evolve(settings, require_plugins=[*settings.require_plugins, *require])
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
        with make_worker(settings, registry, queue, chosen) as running:
            stops.append(running.stop)
            if asked.is_set():
                running.stop()
            running.run(until)
    finally:
        queue.close()
