"""``ourvidz demo``: real messages through a real worker, and a sheet of what came out."""

from __future__ import annotations

import click


@click.command()
def demo() -> None:
    """Push messages of all installed job types through a worker and show what they made."""
