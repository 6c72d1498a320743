"""``wan_generate``: one command line, run by the warm engine or as a process of its own.

Imports torch only once the command line is known to be good.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from attrs import field, frozen

from ourvidz_core.errors import OurVidzError
from ourvidz_wan.arguments import GenerateArguments, UsageError, parse_arguments

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ourvidz_wan.checkpoints import WanModels
    from ourvidz_wan.sampling import OnProgress

    Frame = NDArray[np.uint8]

EXIT_FAILURE = 1
EXIT_USAGE = 2
#: What a shell reports of a program that SIGTERM ended.
EXIT_TERMINATED = 128 + signal.SIGTERM


@frozen(kw_only=True)
class GenerateResult:
    """A file that was written, and what is true of it; the file says the same."""

    path: Path
    width: int
    height: int
    #: None for an image.
    frames: int | None
    facts: Mapping[str, Any]


@frozen(kw_only=True)
class Unwritten:
    """What was generated and is not yet a whole file. The device is free."""

    result: GenerateResult
    #: Writes the file, or waits until it is written. Called once; needs no device and may run in any thread.
    write: Callable[[], None] = field(repr=False)


def run(arguments: GenerateArguments, models: WanModels, on_progress: OnProgress) -> GenerateResult:
    """Generate what ``arguments`` ask for with loaded ``models``, and write it to ``arguments.save_file``.

    The one path for the engine and for the command line: the same arguments make the same bytes.
    """
    generated = generate(arguments, models, on_progress)
    generated.write()
    return generated.result


def generate(arguments: GenerateArguments, models: WanModels, on_progress: OnProgress) -> Unwritten:
    """:func:`run` up to where the device is free. A video is encoded meanwhile, frames as they are decoded."""
    from ourvidz_wan.nvenc import choose_encoder
    from ourvidz_wan.sampling import decoded, make_latents
    from ourvidz_wan.video import VideoWriter, even

    # Before the device is at work: what may be tried first takes part of a second.
    encoder = choose_encoder(arguments.video_encoder) if arguments.frame_num > 1 else None
    made = make_latents(arguments, models, on_progress)
    reported = {**made.facts} if encoder is None else {**made.facts, "video_encoder": encoder.name}
    facts = {**arguments.metadata, **reported, "prompt": arguments.prompt, "seed": arguments.base_seed}
    width, height = made.size
    # Under another name first: a file under the asked-for name is a whole one.
    unfinished = arguments.save_file.with_name(f".{arguments.save_file.name}.part")
    if encoder is None:
        (frames,) = decoded(models, made.latents)
        result = GenerateResult(path=arguments.save_file, width=width, height=height, frames=None, facts=reported)
        return Unwritten(result=result, write=lambda: _write_image(frames[0], unfinished, result, facts))
    writer = VideoWriter(unfinished, facts, fps=made.fps, encoder=encoder)
    try:
        for frames in decoded(models, made.latents):
            writer.add(frames)
    except BaseException:
        writer.give_up()
        unfinished.unlink(missing_ok=True)
        raise
    writer.end()
    result = GenerateResult(
        path=arguments.save_file,
        width=even(width),
        height=even(height),
        frames=arguments.frame_num,
        facts=reported,
    )
    return Unwritten(result=result, write=lambda: _take_place(unfinished, result, writer.wait))


def _write_image(frame: Frame, unfinished: Path, result: GenerateResult, facts: Mapping[str, Any]) -> None:
    from PIL import Image

    from ourvidz_core.engine.pictures import write_png

    _take_place(unfinished, result, lambda: write_png(Image.fromarray(frame), unfinished, facts))


def _take_place(unfinished: Path, result: GenerateResult, write: Callable[[], object]) -> None:
    try:
        write()
        os.replace(unfinished, result.path)
    finally:
        unfinished.unlink(missing_ok=True)


def main(argv: Sequence[str] | None = None) -> int:
    """The console script. Exit status 2: the command line cannot be done; 1: it failed."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
    except UsageError as error:
        _say(f"wan_generate: {error}")
        return EXIT_USAGE
    try:
        with _progress() as on_progress:
            result = run(arguments, _load(arguments), on_progress)
    except (OurVidzError, OSError) as error:
        _say(f"wan_generate: {error}")
        return EXIT_FAILURE
    sys.stdout.write(f"{result.path}\n")
    return 0


def _load(arguments: GenerateArguments) -> WanModels:
    # A million objects come that stay. To look through them for garbage again and again takes a sixth of that time.
    gc.disable()
    try:
        from ourvidz_core.engine.context import find_device
        from ourvidz_wan.checkpoints import load_models

        device = find_device() if arguments.device == "auto" else arguments.device
        return load_models(
            arguments.ckpt_dir, arguments.task, device=device, offload=arguments.offload_model, gpus=arguments.gpus
        )
    finally:
        gc.freeze()
        gc.enable()


@contextmanager
def _progress() -> Iterator[OnProgress]:
    """A bar on a terminal; elsewhere the lines that the engine reads."""
    if not sys.stderr.isatty():
        yield lambda step, total: _say(f"step {step} of {total}")
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as progress:
        sampling = progress.add_task("sampling", total=None)
        yield lambda step, total: progress.update(sampling, completed=step, total=total)


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def _terminate(_signum: int, _frame: FrameType | None) -> None:
    # A second one would break off what the first began.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # An exception, so that unfinished files are removed on the way out.
    raise SystemExit(EXIT_TERMINATED)


if __name__ == "__main__":
    sys.exit(main())
