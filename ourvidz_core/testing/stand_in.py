"""A plugin that paints gradients, in the engine and by a command: what an extension is tried on."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from attrs import frozen

from ourvidz_core.plugins.context import JobContext
from ourvidz_core.plugins.hookspecs import hookimpl
from ourvidz_core.plugins.loading import FoundPlugin
from ourvidz_core.wire.artifacts import Artifact, Generation
from ourvidz_core.wire.commands import Command
from ourvidz_core.wire.job_types import ContentType, JobType
from ourvidz_core.wire.jobs import Job

DISTRIBUTION = "ourvidz-stand-in"
QUEUE = "stand_in_queue"
_PAINT = "from PIL import Image; import sys; Image.linear_gradient('L').save(sys.argv[1])"


@frozen(kw_only=True)
class StandInConfig:
    """What a message's ``config`` may say."""

    width: int = 64


def stand_in_plugin() -> FoundPlugin:
    """The plugin, for a :class:`~ourvidz_core.testing.host.PluginHost`: owns ``stand_in`` and ``stand_in_command``."""
    return FoundPlugin(distribution=DISTRIBUTION, version="1.0", load=lambda: sys.modules[__name__])


@hookimpl
def register_job_types() -> Iterator[JobType]:
    """One type made in the engine, and one made by a command."""
    for name in ("stand_in", "stand_in_command"):
        yield JobType(
            name=name,
            queue=QUEUE,
            content_type=ContentType.IMAGE,
            preset=StandInConfig(),
            sample={"prompt": "a toy", "config": {"width": 32}},
        )


@hookimpl
def build_command(job: Job, context: JobContext) -> Command | None:
    """A command for one of the two."""
    if job.job_type == "stand_in":
        return None
    output = context.output_path("png")
    return Command(argv=(sys.executable, "-c", _PAINT, output), outputs=(output,))


@hookimpl
def generate(job: Job, command: Command | None, context: JobContext) -> Generation:
    """Paint a gradient, a step at a time."""
    if command is not None:
        return Generation(artifacts=context.run(command))
    from PIL import Image

    context.progress(0, 1)
    path = context.output_path("png")
    Image.linear_gradient("L").resize((job.config.width, 32)).save(path)
    context.progress(1, 1)
    return Generation(artifacts=(Artifact(path=path, media_type="image/png", seed=job.seed),))
