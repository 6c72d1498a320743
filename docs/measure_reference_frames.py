"""Measure how well WAN's reference modes work, and write the table of ``docs/explanation/reference-frames.md``.

``python docs/measure_reference_frames.py`` needs the installed demo model and some minutes of a processor;
``--ckpt-dir`` takes any t2v-1.3B weights. Every case is a held-out scene: its caption, and its own first and last frame
as references, so that a good video exists. A correlation and a share of 0 are plain pinning: the known latents
are set and nothing else moves.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import attrs
import numpy as np
from numpy.typing import NDArray
from ourvidz_wan import conditioning, sampling
from ourvidz_wan.arguments import parse_arguments
from ourvidz_wan.checkpoints import WanModels, load_models
from ourvidz_wan.config import scaled_size
from ourvidz_wan.tasks import TASKS
from PIL import Image

from ourvidz_core.engine.context import find_device
from ourvidz_core.engine.variants import find_model

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples.models import scenes, training

Frames = NDArray[np.uint8]

PAGE = Path(__file__).parent / "explanation" / "reference-frames.md"
BEGIN, END = "<!-- measured by docs/measure_reference_frames.py -->\n", "<!-- end of the measured table -->\n"
#: Modes that pin frames, with the options that take the first and the last picture.
MODES: Mapping[str, Mapping[str, str]] = {
    "start": {"first_frame": "first"},
    "end": {"last_frame": "last"},
    "both": {"first_frame": "first", "last_frame": "last"},
}
CORRELATIONS, SHARES = (0.8, 0.9, 0.95, 0.98), (0.0, 0.3, 0.6)
DOUBTS = (0.1, 0.25, 0.5)
_MOTIONS = ("left", "right", "up", "down", "grows")
_SIZE = "480*832"


@attrs.frozen(kw_only=True)
class Case:
    """One scene that moves, and its ends as files."""

    prompt: str
    seed: int
    pictures: Mapping[str, Path]


def main() -> None:
    """Measure, print, and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ckpt-dir", type=Path, default=Path("demo"))
    parser.add_argument("--cases", type=int, default=3)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--json", type=Path, help="also write all figures there")
    parser.add_argument("--no-write", action="store_true", help="leave the page as it is")
    given = parser.parse_args()
    models = load_models(find_model(given.ckpt_dir, "wan"), TASKS["t2v-1.3B"], device=find_device())
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as directory:
        cases = list(make_cases(given.cases, models, Path(directory)))
        free = [generate(models, case, given.steps) for case in cases]
        rows.append({"mode": "none", **summary(cases, free, free)})
        methods = [(0.0, 0.0), *itertools.product(CORRELATIONS, SHARES)]
        for mode, (correlation, share) in itertools.product(MODES, methods):
            with pinning(correlation, share):
                made = [generate(models, case, given.steps, MODES[mode]) for case in cases]
            rows.append({"mode": mode, "rho": correlation, "s": share, **summary(cases, made, free)})
            print(json.dumps(rows[-1]), flush=True)
        for doubt in DOUBTS:
            with mock.patch.object(conditioning, "SINGLE_DOUBT", doubt):
                made = [generate(models, case, given.steps, {"image": "first"}) for case in cases]
            rows.append({"mode": "single", "R": doubt, **summary(cases, made, free)})
            print(json.dumps(rows[-1]), flush=True)
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")
    if not given.no_write:
        write_table(table(rows, given.cases, given.steps))


def make_cases(count: int, models: WanModels, directory: Path) -> Iterator[Case]:
    """Scenes whose shape moves or grows, drawn at the size of the model's videos."""
    size = scaled_size(_SIZE, models.variant.size_scale)
    drawn = [s for s in scenes.draw_scenes(40 * count, 5, video=True, held_out=True) if s.motion in _MOTIONS][:count]
    for seed, scene in enumerate(drawn):
        clip = training.bytes_of(scenes.render_frames([scene], *size, 81))[0]
        pictures = {"first": directory / f"{seed}-first.png", "last": directory / f"{seed}-last.png"}
        for path, frame in zip(pictures.values(), (clip[0], clip[-1]), strict=True):
            Image.fromarray(frame).save(path)
        yield Case(prompt=scenes.describe(scene), seed=seed, pictures=pictures)


def generate(
    models: WanModels, case: Case, steps: int, taken: Mapping[str, str] | None = None, *, frames: int = 81
) -> Frames:
    """The video of one case; ``taken`` are the options of a mode."""
    options = {
        "task": "t2v-1.3B",
        "ckpt_dir": case.pictures["first"].parent,
        "save_file": "unused.mp4",
        "prompt": case.prompt,
        "size": _SIZE,
        "frame_num": frames,
        "sample_steps": steps,
        "base_seed": case.seed,
        **{option: case.pictures[which] for option, which in (taken or {}).items()},
    }
    arguments = parse_arguments([f"--{name}={value}" for name, value in options.items()])
    return sampling.sample(arguments, models, lambda step, total: None).frames


@contextmanager
def pinning(correlation: float, share: float) -> Iterator[None]:
    """Let pinned frames reach their neighbours under these assumptions."""

    def pinned(**known: Any) -> conditioning.FrameConditioner:
        return attrs.evolve(conditioning.pinned(**known), frame_correlation=correlation, static_share=share)

    with mock.patch.object(sampling, "pinned", pinned):
        yield


def summary(cases: list[Case], made: list[Frames], free: list[Frames]) -> dict[str, float]:
    """What is told of one row, over all cases."""
    figures = [measure(case, frames, unled) for case, frames, unled in zip(cases, made, free, strict=True)]
    return {name: round(float(np.median([figure[name] for figure in figures])), 2) for name in figures[0]}


def measure(case: Case, frames: Frames, free: Frames) -> dict[str, float]:
    """Likeness of both ends in dB, jump at both ends, and motion against the video without references.

    A jump is the first (last) difference of neighbouring frames over the median one; motion is
    how far frames a tenth of the video apart differ.
    """
    steps = np.abs(np.diff(frames.astype(np.float32), axis=0)).mean((1, 2, 3))
    usual = max(float(np.median(steps)), 1e-3)
    return {
        "first": likeness(frames[0], case.pictures["first"]),
        "last": likeness(frames[-1], case.pictures["last"]),
        "jump at the start": float(steps[0]) / usual,
        "jump at the end": float(steps[-1]) / usual,
        "motion": moved(frames) / max(moved(free), 1e-3),
    }


def likeness(frame: Frames, picture: Path) -> float:
    """PSNR in dB of ``frame`` against the picture it shall show."""
    shown = np.asarray(Image.open(picture).convert("RGB"), np.float32)
    return float(10 * np.log10(255**2 / np.square(frame - shown).mean()))


def moved(frames: Frames) -> float:
    """How far frames that are a tenth of the video apart differ, in grey levels."""
    apart = max(1, len(frames) // 10)
    return float(np.abs(frames[apart:].astype(np.float32) - frames[:-apart].astype(np.float32)).mean())


def table(rows: list[dict[str, Any]], cases: int, steps: int) -> str:
    """The rows as Markdown; of the grid, those that differ from the constants in use in one of them."""
    used = {"rho": conditioning.FRAME_CORRELATION, "s": conditioning.STATIC_SHARE}
    rows = [row for row in rows if not row.get("rho") or any(row[name] == value for name, value in used.items())]
    head = ("mode", "rho", "s", "R", "first", "last", "jump at the start", "jump at the end", "motion")
    lines = [f"Medians over {cases} held-out scenes, {steps} steps.\n", "| " + " | ".join(head) + " |"]
    lines.append("|---" * len(head) + "|")
    for row in rows:
        is_plain = row.get("rho") == 0 and row.get("s") == 0
        cells = ["plain pin" if is_plain and name == "rho" else row.get(name, "") for name in head]
        lines.append("| " + " | ".join("" if is_plain and i == 2 else str(cell) for i, cell in enumerate(cells)) + " |")
    return "\n".join(lines) + "\n"


def write_table(text: str) -> None:
    """Put the table between its marks in the page."""
    page = PAGE.read_text("utf-8")
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", "utf-8")


if __name__ == "__main__":
    main()
