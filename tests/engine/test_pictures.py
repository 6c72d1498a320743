"""A PNG says what made it, holds its pixels exactly, and is the same file every time."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from ourvidz_core.engine.pictures import read_facts, write_png
from ourvidz_core.engine.provenance import DIGITAL_SOURCE_TYPE

FACTS = {"prompt": "ein Haus <am> See", "seed": 7, "steps": 25, "style": None}


def noise(mode: str, size: tuple[int, int], seed: int = 1) -> Image.Image:
    bands = len(Image.new(mode, (1, 1)).getbands())
    return Image.frombytes(mode, size, random.Random(seed).randbytes(bands * size[0] * size[1]))


def reread(path: Path) -> Image.Image:
    with Image.open(path, formats=("PNG",)) as image:
        image.load()
        return image


@settings(max_examples=40, deadline=None)
@given(mode=st.sampled_from(["RGB", "RGBA", "L", "LA"]), width=st.integers(1, 70), height=st.integers(1, 70))
def test_every_pixel_comes_back(tmp_path_factory, mode, width, height):
    path = tmp_path_factory.mktemp("png") / "image.png"
    image = noise(mode, (width, height))
    write_png(image, path, FACTS)
    again = reread(path)
    assert (again.mode, again.size, again.tobytes()) == (mode, (width, height), image.tobytes())
    assert read_facts(path) == {
        "prompt": "ein Haus <am> See",
        "seed": "7",
        "steps": "25",
        "software": read_facts(path)["software"],
        "digital_source_type": DIGITAL_SOURCE_TYPE,
    }
    assert "ein Haus &lt;am&gt; See" in again.info["XML:com.adobe.xmp"]


@pytest.mark.parametrize("size", [(300, 291), (300, 292), (701, 523), (1024, 1024)], ids=str)
def test_a_picture_that_several_threads_pack_comes_back(tmp_path, size):
    image = Image.effect_noise(size, 60).convert("RGB")
    write_png(image, tmp_path / "image.png", FACTS)
    assert reread(tmp_path / "image.png").tobytes() == image.tobytes()


@pytest.mark.parametrize("mode", ["1", "P", "I;16"])
def test_rare_modes_are_written_too(tmp_path, mode):
    image = noise("RGB", (32, 32)).convert(mode) if mode != "I;16" else Image.new(mode, (32, 32), 54321)
    write_png(image, tmp_path / "image.png", FACTS)
    assert reread(tmp_path / "image.png").tobytes() == image.tobytes()
    assert read_facts(tmp_path / "image.png")["seed"] == "7"


def test_a_colour_profile_goes_along(tmp_path):
    image = noise("RGB", (8, 8))
    image.info["icc_profile"] = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    write_png(image, tmp_path / "image.png", FACTS)
    assert reread(tmp_path / "image.png").info["icc_profile"] == image.info["icc_profile"]


def test_threads_write_the_same_bytes_as_one_after_the_other(tmp_path):
    images = [noise("RGB", (256, 256), seed) for seed in range(6)]

    def written(name: str, image: Image.Image) -> bytes:
        write_png(image, tmp_path / name, FACTS)
        return (tmp_path / name).read_bytes()

    alone = [written(f"alone-{index}.png", image) for index, image in enumerate(images)]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(written, [f"together-{index}.png" for index in range(6)], images))
    assert together == alone
    assert len(set(alone)) == 6
