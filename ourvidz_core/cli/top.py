"""``ourvidz top``: what the dashboard shows, in a terminal."""

from __future__ import annotations

import logging
import time

import click

from ourvidz_core.cli.common import open_settings
from ourvidz_core.cli.dashboard import opened_reader
from ourvidz_core.errors import QueueError


@click.command()
@click.option("--once", is_flag=True, help="Print one frame and end.")
@click.option("--interval", type=click.FloatRange(min=0.2), default=1.0, show_default=True, metavar="SECONDS")
@click.option(
    "--queues", help="Queues to show, comma-separated; all that a plugin owns or a worker serves unless said."
)
def top(once: bool, interval: float, queues: str | None) -> None:
    """Show queues, running jobs, workers and what ended lately, until Ctrl-C."""
    from rich.console import Console
    from rich.live import Live

    from ourvidz_core.dashboard.terminal import draw

    console = Console()
    with opened_reader(open_settings(at_least=logging.CRITICAL), queues) as reader:
        overview = reader.read()
        if once:
            console.print(draw(overview))
            return
        with Live(draw(overview), console=console, screen=True, auto_refresh=False) as live:
            while True:
                time.sleep(interval)
                trouble = None
                try:
                    overview = reader.read()
                except QueueError as error:
                    trouble = f"{error}. What is shown was true before."
                live.update(draw(overview, trouble=trouble), refresh=True)
