"""Write a generated image as a PNG that says what made it, and read that back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ourvidz_core.engine.provenance import file_facts, xmp_packet

if TYPE_CHECKING:
    from PIL.Image import Image

_XMP_KEYWORD = "XML:com.adobe.xmp"


def write_png(image: Image, path: Path, facts: Mapping[str, Any], *, compress_level: int = 4) -> None:
    """Write ``image`` to ``path`` with ``facts`` as text entries and the AI-media mark.

    The same image and facts make the same bytes. ``facts["prompt"]`` is also the XMP description.
    """
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt(_XMP_KEYWORD, xmp_packet(str(facts.get("prompt", ""))))
    for key, text in file_facts(facts).items():
        info.add_itxt(key, text)
    image.save(path, format="PNG", pnginfo=info, compress_level=compress_level)


def read_facts(path: Path) -> dict[str, str]:
    """The text entries of a PNG that :func:`write_png` wrote."""
    from PIL import Image

    with Image.open(path, formats=("PNG",)) as image:
        image.load()
        texts: Mapping[str, str] = getattr(image, "text", {})
        return {key: str(text) for key, text in texts.items() if key != _XMP_KEYWORD}
