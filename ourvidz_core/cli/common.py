"""What several commands share: settings, the registry, logging, printing."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from typing import Any

import click

from ourvidz_core.logs import set_up
from ourvidz_core.plugins.loading import load_registry
from ourvidz_core.plugins.registry import Registry
from ourvidz_core.settings import Settings, load


def open_settings(*, at_least: int = logging.DEBUG) -> Settings:
    """The settings, and logging set up by them.

    Below ``at_least`` nothing is logged unless ``--log-level`` asks for it: a command that
    answers on the terminal needs no log beside its answer.
    """
    context = click.get_current_context(silent=True)
    asked = (context.find_root().obj or {}).get("log_level") if context else None
    settings = load(log_level=asked)
    level = logging.getLevelNamesMapping()[settings.log_level.upper()]
    set_up(settings, level=level if asked else max(level, at_least))
    return settings


def open_registry(settings: Settings) -> Registry:
    """The loaded plugins."""
    return load_registry(settings)


def print_json(value: Any) -> None:
    """``value`` as JSON on stdout."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def table(head: Sequence[str], rows: Iterable[Sequence[object]], *, markdown: bool = False) -> str:
    """A table as plain text, or as Markdown."""
    texts = [[str(cell) for cell in row] for row in rows]
    if markdown:
        lines = ["| " + " | ".join(cells) + " |" for cells in ([*head], ["---"] * len(head), *texts)]
        return "\n".join(lines)
    widths = [max(len(row[column]) for row in [list(head), *texts]) for column in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [list(head), *texts]
    )
