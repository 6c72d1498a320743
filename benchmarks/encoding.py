"""What encoding a picture or a video costs, and how large it gets: PNG by level, library and threads, MP4 by preset.

``python benchmarks/encoding.py [--json]``. ``write_png`` is what jobs use. Other PNG libraries are measured where
they are installed: ``pip install imagecodecs opencv-python-headless``. Nothing needs a GPU. One picture's time
is processor time, so that it says the same on a busy machine; that of threads and videos is wall time.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import os
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ourvidz_core.engine.pictures import write_png

SIDE = 1024
REPEATS = 5
BATCH = 6

Pixels = NDArray[np.uint8]
Encoder = Callable[[Pixels], bytes]


def picture(seed: int, side: int = SIDE) -> Pixels:
    """Smooth light, soft shapes with edges, and a fine grain: as hard to pack as a photograph."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:side, 0:side].astype(np.float32) / side
    light = np.stack([120 + 90 * np.sin(3 * x + channel + seed) * np.cos(2 * y) for channel in range(3)], axis=-1)
    for _ in range(12):
        centre_x, centre_y, radius = rng.random(3)
        inside = (x - centre_x) ** 2 + (y - centre_y) ** 2 < (0.05 + 0.2 * radius) ** 2
        light[inside] = 0.5 * light[inside] + rng.uniform(0, 120, 3)
    coarse = rng.normal(0, 1, (side // 4, side // 4, 3)).repeat(4, axis=0).repeat(4, axis=1)
    grain = rng.normal(0, 1, (side, side, 1)) + rng.normal(0, 0.7, (side, side, 3))
    textured = 0.3 + (np.sin(9 * x) * np.sin(7 * y) > 0)[..., None]
    return (light + textured * (2.5 * coarse + 2 * grain)).clip(0, 255).astype(np.uint8)


def encoders() -> Iterator[tuple[str, Encoder]]:
    """Ways to a PNG, by what they are called."""
    yield "write_png (ISA-L, filter Up)", ours
    for level in (1, 2, 3, 4, 6, 9):
        yield f"Pillow level {level}", lambda pixels, level=level: pillow(pixels, compress_level=level)  # type: ignore[misc]
    for name, strategy in (("Huffman only", zlib.Z_HUFFMAN_ONLY), ("run lengths", zlib.Z_RLE)):
        yield (
            f"Pillow, {name}",
            lambda pixels, s=strategy: pillow(pixels, compress_level=1, compress_type=s),  # type: ignore[misc]
        )
    if codecs := installed("imagecodecs"):
        for level in (1, 6):
            yield (
                f"imagecodecs level {level}",
                lambda pixels, level=level: bytes(codecs.png_encode(pixels, level=level)),
            )  # type: ignore[misc]
    if cv2 := installed("cv2"):
        for level in (1, 6):
            yield (
                f"OpenCV level {level}",
                lambda pixels, level=level: bytes(cv2.imencode(".png", pixels, [16, level])[1]),
            )  # type: ignore[misc]


def ours(pixels: Pixels) -> bytes:
    """As jobs write it."""
    with tempfile.NamedTemporaryFile(suffix=".png") as file:
        write_png(Image.fromarray(pixels), Path(file.name), {})
        return Path(file.name).read_bytes()


def pillow(pixels: Pixels, **options: Any) -> bytes:
    """By Pillow alone."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", **options)
    return buffer.getvalue()


def installed(name: str) -> Any:
    """The module, or None where it is not here."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def seconds_of(work: Callable[[], object], clock: Callable[[], float]) -> float:
    """The median time by ``clock``, after one run that warms up."""
    work()
    taken = []
    for _ in range(REPEATS):
        started = clock()
        work()
        taken.append(clock() - started)
    return statistics.median(taken)


def png_rows(pictures: list[Pixels]) -> Iterator[dict[str, Any]]:
    """One picture by each encoder."""
    for name, encode in encoders():
        encoded = [encode(pixels) for pixels in pictures]
        decoded = np.asarray(Image.open(io.BytesIO(encoded[0])))
        is_swapped = name.startswith("OpenCV")  # it takes blue first; for the cost that is all the same
        assert np.array_equal(decoded[..., ::-1] if is_swapped else decoded, pictures[0]), name
        yield {
            "what": name,
            "ms": 1e3 * seconds_of(lambda encode=encode: encode(pictures[0]), time.process_time),  # type: ignore[misc]
            "mb": statistics.mean(map(len, encoded)) / 1e6,
        }


def thread_rows(pictures: list[Pixels], directory: Path) -> Iterator[dict[str, Any]]:
    """A batch beside each other."""
    images = [Image.fromarray(pixels) for pixels in pictures]
    facts = {"prompt": "a lighthouse at dusk", "seed": 7}

    def write(index: int) -> None:
        write_png(images[index], directory / f"{index}.png", facts)

    for threads in (1, 2, 3, 6):
        with ThreadPoolExecutor(threads) as pool:
            seconds = seconds_of(lambda pool=pool: list(pool.map(write, range(len(images)))), time.perf_counter)  # type: ignore[misc]
        yield {"what": f"{len(images)} images by write_png, {threads} threads", "ms": 1e3 * seconds}


def video_rows(directory: Path) -> Iterator[dict[str, Any]]:
    """Videos by each preset of x264, the processor's time for them, and how near they stay to their frames."""
    from ourvidz_wan import video

    wide = picture(3, 1024)[:832, :480]
    passing = np.stack([np.roll(wide, shift, axis=1) for shift in range(81)])
    chosen = video.ENCODER_OPTIONS["preset"]
    path = directory / "video.mp4"
    for name, frames in (("a picture that passes", passing), ("noise", noise(81, 480, 832))):
        for preset in ("ultrafast", "veryfast", "faster", "medium"):
            video.ENCODER_OPTIONS["preset"] = preset
            started = time.process_time()
            video.write_video(frames, path, {}, fps=16)
            taken = time.process_time() - started
            error = np.mean((video.read_video(path).astype(np.float32) - frames) ** 2)
            yield {
                "what": f"81 frames 480x832 of {name}, x264 {preset}",
                "ms": 1e3 * taken,
                "mb": path.stat().st_size / 1e6,
                "psnr": float(10 * np.log10(255**2 / error)),
            }
    video.ENCODER_OPTIONS["preset"] = chosen


def noise(count: int, height: int, width: int) -> Pixels:
    """Frames ``[count, height, width, 3]`` of faint, soft noise, each in part that before it."""
    chance = np.random.default_rng(4)
    frames, before = [], np.zeros((height, width, 3))
    for _ in range(count):
        small = chance.normal(size=(height // 4 + 1, width // 4 + 1, 3))
        soft = np.stack(
            [
                np.asarray(Image.fromarray(small[..., channel]).resize((width, height), Image.Resampling.BICUBIC))
                for channel in range(3)
            ],
            axis=-1,
        )
        before = 0.8 * before + 0.6 * soft
        frames.append((127.5 + 4 * before).clip(0, 255).astype(np.uint8))
    return np.stack(frames)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    pictures = [picture(seed) for seed in range(BATCH)]
    with tempfile.TemporaryDirectory() as directory:
        rows = [
            *png_rows(pictures[:3]),
            *thread_rows(pictures, Path(directory)),
            *(video_rows(Path(directory)) if installed("ourvidz_wan") else ()),
        ]
    if arguments.json:
        print(json.dumps({"cpus": os.cpu_count(), "side": SIDE, "rows": rows}))
        return
    print(f"{SIDE}x{SIDE} pictures, {os.cpu_count()} processors")
    for row in rows:
        size = f"{row['mb']:8.2f} MB" if "mb" in row else ""
        quality = f"{row['psnr']:8.1f} dB" if "psnr" in row else ""
        print(f"{row['what']:44} {row['ms']:9.1f} ms{size}{quality}")


if __name__ == "__main__":
    main()
