"""``ourvidz enhance``: see what the enhancer makes of a prompt. Light until it runs."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from ourvidz_wan_enhanced.enhancement import Enhancement

#: Nobody's job waits for this command.
_TIMEOUT_SECONDS = 3600.0


@click.command()
@click.argument("prompt")
@click.option("--video/--image", "is_video", default=True, show_default=True, help="What the prompt is for.")
@click.option("--seed", type=click.IntRange(min=0, max=2**63 - 1), default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def enhance(prompt: str, is_video: bool, seed: int, as_json: bool) -> int:
    """Show what the enhancer makes of PROMPT, with the worker's own settings, model and checks.

    Ends with 0 when it made a better one and with 1 when it did not.
    """
    import logging

    from ourvidz_core.cli.common import open_settings, print_json

    settings = open_settings(at_least=logging.ERROR)
    enhancement = _enhance(prompt, is_video=is_video, seed=seed, device=settings.device)
    if as_json:
        print_json({"prompt": prompt, "enhanced_prompt": enhancement.prompt, **enhancement.facts})
    else:
        click.echo(f"{'prompt':<26}{prompt}")
        click.echo(f"{'enhanced prompt':<26}{enhancement.prompt or '-'}")
        for name, value in enhancement.facts.items():
            click.echo(f"{name.replace('_', ' '):<26}{value}")
    status = 0 if enhancement.prompt is not None else 1
    _leave_at_once_if_work_is_left(status)
    return status


def _enhance(prompt: str, *, is_video: bool, seed: int, device: str) -> Enhancement:
    from ourvidz_core.engine.context import EngineContext
    from ourvidz_core.engine.models import ModelCache
    from ourvidz_core.wire.job_types import ContentType
    from ourvidz_wan_enhanced.enhancement import enhance as enhance_prompt

    with tempfile.TemporaryDirectory() as directory:
        context = EngineContext(
            work_dir=Path(directory), models=ModelCache(), timeout_seconds=_TIMEOUT_SECONDS, device=device
        )
        content_type = ContentType.VIDEO if is_video else ContentType.IMAGE
        return enhance_prompt(prompt, content_type=content_type, seed=seed, context=context)


def _leave_at_once_if_work_is_left(status: int) -> None:
    from ourvidz_wan_enhanced.effort import is_work_left

    if is_work_left():
        # Python's own end would pull the interpreter from under a thread inside torch, which aborts the process.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
