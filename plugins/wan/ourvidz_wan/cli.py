"""``ourvidz wan``: what an operator does with WAN weights. Light until a command runs."""

from __future__ import annotations

from pathlib import Path

import click

from ourvidz_core.errors import OurVidzError
from ourvidz_wan.tasks import TASKS


@click.group()
def wan() -> None:
    """Work with WAN models."""


@wan.command()
@click.argument("source", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--task", type=click.Choice(list(TASKS)), default="t2v-1.3B", show_default=True, help="What SOURCE is.")
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32"]),
    default="bfloat16",
    show_default=True,
    help="Of the written weights; what has to stay in float32 does.",
)
def convert(source: Path, target: Path, task: str, dtype: str) -> None:
    """Write the model in SOURCE to the new directory TARGET in the diffusers layout.

    It loads faster than the files WAN was published as, which are larger and hold
    weights under other names.
    """
    import torch

    from ourvidz_wan.checkpoints import convert_checkpoint

    try:
        convert_checkpoint(source, target, TASKS[task], dtype=getattr(torch, dtype))
    except OurVidzError as error:
        raise click.ClickException(str(error)) from error
    click.echo(target)
