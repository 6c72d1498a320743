"""What ``context.preview`` leaves in the work directory, when it is asked for, and what it never does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ourvidz_core.testing.doubles import RecordingContext
from ourvidz_core.wire.previews import PREVIEW_BYTES, is_preview

RED, BLUE = (220, 30, 40), (20, 40, 210)


def large(colour: tuple[int, int, int]) -> Image.Image:
    return Image.new("RGB", (1024, 512), colour)


def shown(directory: Path) -> Image.Image:
    return Image.open(directory / "preview.jpg")


def test_nothing_is_made_unless_it_is_switched_on(tmp_path: Path) -> None:
    RecordingContext(tmp_path).preview(lambda: pytest.fail("the picture was made"))
    assert not list(tmp_path.iterdir())


def test_the_newest_picture_is_left_small_and_alone(tmp_path: Path) -> None:
    context = RecordingContext(tmp_path, previews=True)
    large(BLUE).convert("RGBA").save(tmp_path / "frame.png")
    context.preview(large(RED))
    assert shown(tmp_path).getpixel((9, 9)) == pytest.approx(RED, abs=6)
    context.preview(tmp_path / "frame.png")
    picture = shown(tmp_path)
    assert (picture.format, picture.size) == ("JPEG", (256, 128))
    assert picture.getpixel((9, 9)) == pytest.approx(BLUE, abs=6)
    assert {path.name for path in tmp_path.iterdir()} == {"frame.png", "preview.jpg"}


def test_the_picture_that_packs_worst_is_no_larger_than_it_may_be(tmp_path: Path) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    RecordingContext(tmp_path, previews=True).preview(Image.fromarray(noise))
    content = (tmp_path / "preview.jpg").read_bytes()
    assert is_preview(content)
    assert len(content) <= PREVIEW_BYTES


def test_a_step_that_comes_too_soon_costs_nothing(tmp_path: Path) -> None:
    context = RecordingContext(tmp_path, previews=True, preview_seconds=60.0)
    made: list[int] = []

    def picture(step: int) -> Image.Image:
        made.append(step)
        return large(RED)

    for step in range(50):
        context.preview(lambda step=step: picture(step))
    assert made == [0]


def test_a_preview_that_cannot_be_made_fails_no_job(tmp_path: Path) -> None:
    context = RecordingContext(tmp_path, previews=True)
    context.preview(lambda: 1 / 0)
    context.preview(tmp_path / "missing.png")
    context.preview("no picture")  # type: ignore[arg-type]
    (tmp_path / "preview.jpg").mkdir()  # nothing can take its place
    context.preview(large(RED))
    context.progress(1, 1)
