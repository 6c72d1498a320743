"""Writes the preview of a running job."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING

from ourvidz_core.wire.previews import PREVIEW_BYTES, PREVIEW_FILE, PREVIEW_PIXELS

if TYPE_CHECKING:
    from PIL.Image import Image

_QUALITIES = (80, 60, 40, 20)


def write_preview(picture: Image | Path, work_dir: Path) -> None:
    """Put ``picture`` into ``work_dir`` as a small JPEG, at once and whole, in place of the one before.

    One that does not become small enough is left out.
    """
    from PIL import Image

    if isinstance(picture, Path):
        with Image.open(picture) as opened:
            small = opened.convert("RGB")
    else:
        small = picture.convert("RGB")
    small.thumbnail((PREVIEW_PIXELS, PREVIEW_PIXELS))
    content = next(
        filter(lambda made: len(made) <= PREVIEW_BYTES, (_jpeg(small, quality) for quality in _QUALITIES)), None
    )
    if content is not None:
        new = work_dir / f".{PREVIEW_FILE}"
        new.write_bytes(content)
        os.replace(new, work_dir / PREVIEW_FILE)


def _jpeg(image: Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()
