"""Draw the five reference modes of WAN side by side: the same prompt and seed, a row for each mode.

``python docs/draw_reference_frames.py`` uses the installed demo model and writes the picture of
``docs/explanation/reference-frames.md``. ``--ckpt-dir`` takes any t2v-1.3B weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from ourvidz_wan.arguments import parse_arguments
from ourvidz_wan.checkpoints import WanModels, load_models
from ourvidz_wan.sampling import sample
from ourvidz_wan.tasks import TASKS
from PIL import Image, ImageDraw, ImageFont

from ourvidz_core.engine.context import find_device
from ourvidz_core.engine.variants import find_model

DOCS = Path(__file__).parent
TARGET = DOCS / "explanation" / "reference-frames.png"
REFERENCES = DOCS.parent / "examples" / "demo" / "references"
#: The options of each mode, and which of the two pictures they take.
MODES: Mapping[str, Mapping[str, str]] = {
    "none": {},
    "single": {"image": "start"},
    "start": {"first_frame": "start"},
    "end": {"last_frame": "end"},
    "both": {"first_frame": "start", "last_frame": "end"},
}
#: Close together where a pin shows, at the ends.
SHOWN = (0, 1, 2, 4, 8, 20, 40, 60, 72, 76, 79, 80)
TILE_HEIGHT = 80
#: A palette keeps the file small.
COLOURS = 128
MARGIN, LABEL_WIDTH, LABEL_HEIGHT = 3, 52, 16


def main() -> None:
    """Generate five videos and draw them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt-dir", type=Path, default=Path("demo"), help="t2v-1.3B weights, or an installed model")
    parser.add_argument("--prompt", default="a red circle moves right on a plain white background")
    parser.add_argument("--start", type=Path, default=REFERENCES / "start.png")
    parser.add_argument("--end", type=Path, default=REFERENCES / "end.png")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--out", type=Path, default=TARGET)
    given = parser.parse_args()
    ckpt_dir = find_model(given.ckpt_dir, "wan")
    pictures = {"start": given.start, "end": given.end}
    models = load_models(ckpt_dir, TASKS["t2v-1.3B"], device=find_device())
    options = {"prompt": given.prompt, "base_seed": given.seed, "sample_steps": given.steps, "ckpt_dir": ckpt_dir}
    videos = {
        mode: generate(models, {**options, **{option: pictures[which] for option, which in taken.items()}})
        for mode, taken in MODES.items()
    }
    draw(videos, pictures).quantize(COLOURS).save(given.out, optimize=True)
    print(given.out)


def generate(models: WanModels, options: Mapping[str, object]) -> NDArray[np.uint8]:
    """The frames of one command line."""
    given = {"task": "t2v-1.3B", "save_file": "unused.mp4", "frame_num": SHOWN[-1] + 1, **options}
    arguments = parse_arguments([f"--{name}={value}" for name, value in given.items()])
    return sample(arguments, models, lambda step, total: None).frames


def draw(videos: Mapping[str, NDArray[np.uint8]], pictures: Mapping[str, Path]) -> Image.Image:
    """A row for each mode: its name, what it was given, and the frames of ``SHOWN``."""
    height, width = next(iter(videos.values())).shape[1:3]
    tile = (round(TILE_HEIGHT * width / height), TILE_HEIGHT)
    font = ImageFont.load_default(12)
    headings = ("start", "end", *map(str, SHOWN))
    # A wider gap sets the references apart from the frames.
    lefts = [
        LABEL_WIDTH + column * (tile[0] + MARGIN) + (4 * MARGIN if column > 1 else 0)
        for column in range(2 + len(SHOWN))
    ]
    sheet = Image.new("RGB", (lefts[-1] + tile[0] + MARGIN, LABEL_HEIGHT + len(videos) * (tile[1] + MARGIN)), "white")
    pen = ImageDraw.Draw(sheet)
    for left, heading in zip(lefts, headings, strict=True):
        pen.text((left, 1), heading, fill="black", font=font)
    for row, (mode, frames) in enumerate(videos.items()):
        top = LABEL_HEIGHT + row * (tile[1] + MARGIN)
        pen.text((MARGIN, top + tile[1] // 2 - 8), mode, fill="black", font=font)
        for which in MODES[mode].values():
            reference = Image.open(pictures[which]).convert("RGB").resize(tile)
            sheet.paste(reference, (lefts[("start", "end").index(which)], top))
        for left, frame in zip(lefts[2:], SHOWN, strict=True):
            sheet.paste(Image.fromarray(frames[frame]).resize(tile, Image.Resampling.LANCZOS), (left, top))
    return sheet


if __name__ == "__main__":
    main()
