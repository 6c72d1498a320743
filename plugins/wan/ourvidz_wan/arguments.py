"""The command line of ``wan_generate``: its options, their defaults, and what is wrong with them.

Everything that can be refused is refused here, before torch is imported.
"""

from __future__ import annotations

import argparse
import json
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from attrs import field, frozen

from ourvidz_core.engine.tiers import Tier
from ourvidz_core.errors import OurVidzError
from ourvidz_core.wire.jobs import SEED_LIMIT
from ourvidz_wan.config import DEFAULT_REFERENCE_STRENGTH, FRAMES_PER_LATENT, EncoderChoice, Solver, frames_of
from ourvidz_wan.tasks import TASKS, Task

#: One frame is written as a picture, more as a video.
IMAGE_SUFFIX = ".png"
VIDEO_SUFFIX = ".mp4"
DEFAULT_VIDEO_FRAMES = 81
REFERENCE_OPTIONS = ("image", "first_frame", "last_frame", "src_video", "src_mask", "src_ref_images")


class UsageError(OurVidzError):
    """The command line asks for something that cannot be done. One line, for stderr."""


@frozen(kw_only=True)
class GenerateArguments:
    """A checked command line of ``wan_generate``."""

    task: Task
    ckpt_dir: Path
    prompt: str
    save_file: Path
    size: str
    frame_num: int
    sample_steps: int
    sample_guide_scale: float
    sample_solver: Solver
    sample_shift: float
    base_seed: int
    offload_model: bool
    image: Path | None = None
    first_frame: Path | None = None
    last_frame: Path | None = None
    src_video: Path | None = None
    src_mask: Path | None = None
    src_ref_images: tuple[Path, ...] = ()
    reference_strength: float = DEFAULT_REFERENCE_STRENGTH
    #: None is the model's own.
    negative_prompt: str | None = None
    #: How many devices predict, the first of them ``device``.
    gpus: int = 1
    device: str = "auto"
    tier: Tier = Tier.EXACT
    #: In the fast tier alone.
    fp8_attention: bool = False
    video_encoder: EncoderChoice = EncoderChoice.X264
    #: What the file says beside the facts, such as what its prompt was made of.
    metadata: Mapping[str, str] = field(factory=dict)


def parse_arguments(argv: Sequence[str]) -> GenerateArguments:
    """Parse and check the options of ``wan_generate``, the program's name left out.

    :raises UsageError: naming the option, what it may be, and what it is.
    """
    given = make_parser().parse_args(argv)
    task = _task(given.task)
    if given.size not in task.sizes:
        raise UsageError(f"--size {given.size} is not supported by {task.name}; use one of {', '.join(task.sizes)}")
    save_file = Path(given.save_file)
    frames = _frame_num(given.frame_num, task, save_file)
    _check_numbers(given)
    ckpt_dir = Path(given.ckpt_dir)
    if not ckpt_dir.is_dir():
        raise UsageError(f"--ckpt_dir {ckpt_dir} is no directory; it must hold the weights of {task.name}")
    if not save_file.parent.is_dir():
        raise UsageError(f"--save_file {save_file}: there is no directory {save_file.parent}")
    _check_references(given, task)
    return GenerateArguments(
        task=task,
        ckpt_dir=ckpt_dir,
        prompt=_text(given.prompt),
        save_file=save_file,
        size=given.size,
        frame_num=frames,
        sample_steps=given.sample_steps or task.default_steps,
        sample_guide_scale=given.sample_guide_scale,
        sample_solver=Solver(given.sample_solver),
        sample_shift=given.sample_shift,
        # -1 is how the original command line spells a random seed.
        base_seed=secrets.randbelow(SEED_LIMIT) if given.base_seed == -1 else given.base_seed,
        offload_model=given.offload_model,
        image=given.image,
        first_frame=given.first_frame,
        last_frame=given.last_frame,
        src_video=given.src_video,
        src_mask=given.src_mask,
        src_ref_images=given.src_ref_images,
        reference_strength=given.reference_strength,
        negative_prompt=None if given.negative_prompt is None else _text(given.negative_prompt),
        gpus=given.gpus,
        device=given.device,
        tier=Tier(given.tier),
        fp8_attention=given.fp8_attention,
        video_encoder=EncoderChoice(given.video_encoder),
        metadata=given.metadata,
    )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def make_parser() -> argparse.ArgumentParser:
    """The options of ``wan_generate``, with their defaults."""
    parser = _Parser(
        prog="wan_generate",
        description="Generate a video or an image with WAN 2.1.",
        # A shortened option would change its meaning with the next option that is added.
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--task", required=True, help=", ".join(TASKS))
    add("--ckpt_dir", required=True, help="directory of the weights, in the diffusers or the native layout")
    add("--prompt", required=True, help="what to show; write --prompt=TEXT, so that it may begin with a dash")
    add("--save_file", required=True, help="an .mp4, or a .png for one frame")
    add("--size", default="480*832", help="width*height (default: %(default)s)")
    add("--frame_num", type=int, help="4n+1 frames (default: 81, or 1 for a .png)")
    add("--sample_steps", type=int, help="sampling steps (default: 50; i2v: 40)")
    add("--sample_guide_scale", type=float, default=5.0, help="guidance scale (default: %(default)s)")
    add("--sample_solver", default="unipc", choices=[solver.value for solver in Solver], help="(default: unipc)")
    add("--sample_shift", type=float, default=5.0, help="shift of the noise schedule (default: %(default)s)")
    add("--base_seed", type=int, default=-1, help="seed (default: random)")
    add("--offload_model", type=_truth, default=True, help="keep only the working model on the GPU (default: True)")
    add("--image", type=Path, help="a picture that the result resembles; i2v: its first frame")
    add("--first_frame", type=Path, help="the video begins with this picture")
    add("--last_frame", type=Path, help="the video ends with this picture")
    add("--src_video", type=Path, help="VACE: a video to work from")
    add("--src_mask", type=Path, help="VACE: a video, white where src_video is made anew")
    add("--src_ref_images", type=_paths, default=(), help="VACE: pictures of what shall appear, comma-separated")
    add(
        "--reference_strength",
        type=float,
        default=DEFAULT_REFERENCE_STRENGTH,
        help="0.1 to 1.0, higher is closer to --image (default: %(default)s)",
    )
    add("--negative_prompt", help="what not to show (default: the model's own)")
    add("--gpus", type=int, default=1, help="how many GPUs a text-to-video job uses (default: %(default)s)")
    add(
        "--tier",
        default=Tier.EXACT.value,
        choices=[tier.value for tier in Tier],
        help="exact: every step; fast: under half of them (default: %(default)s)",
    )
    add(
        "--fp8_attention",
        type=_truth,
        default=False,
        help="fast tier: attend in fp8 where the GPU can, less exactly (default: False)",
    )
    add(
        "--video_encoder",
        default=EncoderChoice.X264.value,
        choices=[choice.value for choice in EncoderChoice],
        help="auto: the card's NVENC where it works and does as well (default: %(default)s)",
    )
    add("--metadata", type=_texts, default={}, help="JSON object of texts that the file says of itself, too")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    return parser


def _task(name: str) -> Task:
    if name not in TASKS:
        raise UsageError(f"--task {name} is unknown; use one of {', '.join(TASKS)}")
    return TASKS[name]


def _frame_num(given: int | None, task: Task, save_file: Path) -> int:
    suffix = save_file.suffix.lower()
    if suffix not in (IMAGE_SUFFIX, VIDEO_SUFFIX):
        raise UsageError(f"--save_file {save_file} must end in {VIDEO_SUFFIX}, or in {IMAGE_SUFFIX} for one frame")
    frames = given
    if frames is None:
        frames = 1 if suffix == IMAGE_SUFFIX or task.makes_images_only else DEFAULT_VIDEO_FRAMES
    if frames < 1:
        raise UsageError(f"--frame_num {frames} is too few; use 1, or 4n+1 for a video")
    if frames % FRAMES_PER_LATENT != 1:
        lower = frames_of(frames)
        raise UsageError(f"--frame_num {frames} is not 4n+1; use {lower} or {lower + FRAMES_PER_LATENT}")
    if frames == 1 and {"first_frame", "last_frame"} <= set(task.needs):
        raise UsageError(f"--frame_num 1: {task.name} leads from a first frame to a last one; use 4n+1 frames")
    if task.makes_images_only and frames != 1:
        raise UsageError(f"--frame_num {frames}: {task.name} makes one frame; use 1")
    if (frames == 1) != (suffix == IMAGE_SUFFIX):
        raise UsageError(
            f"--save_file {save_file} does not fit --frame_num {frames}:"
            f" one frame is written as {IMAGE_SUFFIX}, more as {VIDEO_SUFFIX}"
        )
    return frames


def _check_numbers(given: argparse.Namespace) -> None:
    if given.sample_steps is not None and given.sample_steps < 1:
        raise UsageError(f"--sample_steps {given.sample_steps} is too few; use at least 1")
    if not 0 <= given.sample_guide_scale < float("inf"):
        raise UsageError(f"--sample_guide_scale {given.sample_guide_scale} must be a number of at least 0")
    if not 0 < given.sample_shift < float("inf"):
        raise UsageError(f"--sample_shift {given.sample_shift} must be a number above 0")
    if not -1 <= given.base_seed < 2**63:
        raise UsageError(f"--base_seed {given.base_seed} must be from 0 to 2**63 - 1, or -1 for a random one")
    if given.fp8_attention and given.tier == Tier.EXACT.value:
        raise UsageError("--fp8_attention is not exact; use it with --tier fast")
    if given.gpus < 1:
        raise UsageError(f"--gpus {given.gpus} is too few; use at least 1")
    if not 0.1 <= given.reference_strength <= 1.0:
        raise UsageError(f"--reference_strength {given.reference_strength} must be from 0.1 to 1.0")


def _check_references(given: argparse.Namespace, task: Task) -> None:
    named = [option for option in REFERENCE_OPTIONS if getattr(given, option)]
    for option in task.needs:
        if option not in named:
            raise UsageError(f"--task {task.name} needs --{option}")
    for option in named:
        if option not in task.takes:
            may = f"it takes {', '.join(f'--{name}' for name in task.takes)}"
            raise UsageError(f"--{option} is nothing that {task.name} reads; {may}")
    if "image" in named and len(named) > 1:
        raise UsageError(f"--image cannot be combined with --{next(n for n in named if n != 'image')}; give one kind")
    if "src_mask" in named and "src_video" not in named:
        raise UsageError("--src_mask says what to make anew of a --src_video, and none is given")
    if "src_video" in named and {"first_frame", "last_frame"} & set(named):
        raise UsageError("--src_video cannot be combined with --first_frame or --last_frame; give one kind")
    for option in named:
        paths = getattr(given, option)
        for path in paths if isinstance(paths, tuple) else (paths,):
            _check_readable(option, path)


def _check_readable(option: str, path: Path) -> None:
    if not path.is_file():
        raise UsageError(f"--{option} {path} is no file")
    if option in ("src_video", "src_mask"):
        return
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
    # Pillow raises SyntaxError for a broken PNG.
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UsageError(f"--{option} {path} is not a readable image: {_one_line(error)}") from None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _text(value: str | list[str]) -> str:
    # Before Python 3.13 argparse takes "--" out of "--prompt=--" and leaves an empty list.
    return value if isinstance(value, str) else "--"


def _truth(text: str) -> bool:
    known = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in known:
        raise argparse.ArgumentTypeError(f"expected True or False, not {text!r}")
    return known[text.lower()]


def _texts(text: str) -> dict[str, str]:
    try:
        texts = json.loads(text)
    except ValueError:
        texts = None
    if not isinstance(texts, dict) or not all(isinstance(value, str) for value in texts.values()):
        raise argparse.ArgumentTypeError(f"expected a JSON object of texts, not {text!r}")
    return texts


def _paths(text: str) -> tuple[Path, ...]:
    return tuple(Path(part.strip()) for part in text.split(",") if part.strip())
