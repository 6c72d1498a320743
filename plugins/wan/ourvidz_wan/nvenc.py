"""NVENC, the encoder on NVIDIA's cards: whether this one has it, and whether it does as well as x264.

Those for data centres, such as an H100 or H200, have none.
"""

from __future__ import annotations

import logging
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from ourvidz_wan.config import EncoderChoice
from ourvidz_wan.video import X264, Encoder, read_video, write_video

if TYPE_CHECKING:
    from ourvidz_wan.video import Frames

logger = logging.getLogger(__name__)

#: A constant quality, as x264 has it. No card has run it.
NVENC = Encoder(
    name="h264_nvenc",
    options={"preset": "p5", "tune": "hq", "rc": "vbr", "cq": "18", "b": "0"},
)
#: How much worse than x264's its frames may be.
TOLERATED_DB = 1.0
_PROBED_FRAMES, _PROBED_HEIGHT, _PROBED_WIDTH = 9, 480, 272


def choose_encoder(choice: EncoderChoice) -> Encoder:
    """The encoder of a video; the first call of a process may try NVENC, which takes part of a second."""
    if choice is EncoderChoice.AUTO and nvenc_fault() is None:
        return NVENC
    return X264


@lru_cache(maxsize=1)
def nvenc_fault() -> str | None:
    """Why NVENC is not used here, or None where it is: it is tried with a short clip, once in a process."""
    fault = _fault()
    logger.info("%s", _encoded_by(fault))
    return fault


def encoded_by() -> str:
    """What encodes videos where NVENC is asked for, and why it is x264 where it is."""
    return _encoded_by(nvenc_fault())


def _encoded_by(fault: str | None) -> str:
    return f"videos are encoded by {NVENC.name if fault is None else f'{X264.name}: {fault}'}"


def _fault() -> str | None:
    import av

    frames = _clip()
    try:
        made = _decibels(frames, NVENC)
    except (av.FFmpegError, OSError, ValueError, RuntimeError) as error:
        return f"{NVENC.name} does not work here ({error})"
    wanted = _decibels(frames, X264)
    if made < wanted - TOLERATED_DB:
        return f"{NVENC.name} is off: its frames have {made:.1f} dB where those of {X264.name} have {wanted:.1f} dB"
    return None


def _decibels(frames: Frames, encoder: Encoder) -> float:
    import numpy as np

    with tempfile.TemporaryDirectory(prefix="ourvidz-nvenc-") as directory:
        path = Path(directory) / "clip.mp4"
        write_video(frames, path, {}, fps=16, encoder=encoder)
        shown = read_video(path)
    if shown.shape != frames.shape:
        raise ValueError(f"{len(frames)} frames became {len(shown)}")
    error = float(np.mean((shown.astype(np.float32) - frames) ** 2))
    return float(10 * np.log10(255**2 / max(error, 1e-9)))


def _clip() -> Frames:
    """A disc that moves over soft bands."""
    import numpy as np

    moment, down, right = np.mgrid[0:_PROBED_FRAMES, 0:_PROBED_HEIGHT, 0:_PROBED_WIDTH].astype(np.float32)
    bands = [128 + 90 * np.sin(right / 40 + shade + moment / 30) * np.cos(down / 60) for shade in range(3)]
    is_disc = (right - 60 - 8 * moment) ** 2 + (down - 200 - 5 * moment) ** 2 < 50**2
    clip: Frames = np.where(is_disc[..., None], 220, np.stack(bands, axis=-1)).astype(np.uint8)
    return clip
