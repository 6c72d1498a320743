"""Write a generated image as a PNG that says what made it, and read that back."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ourvidz_core.engine.provenance import file_facts, xmp_packet

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.PngImagePlugin import PngInfo

_XMP_KEYWORD = "XML:com.adobe.xmp"
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
#: Images of these modes are packed by ISA-L, in an eighth of the time that Pillow takes for a tenth less
#: (docs/explanation/performance.md); the number is PNG's colour type. Others are left to Pillow.
_COLOUR_TYPES: Mapping[str, int] = {"L": 0, "RGB": 2, "RGBA": 6}
#: What an image may bring along that only Pillow writes.
_ONLY_PILLOW_WRITES = {"icc_profile", "transparency"}
#: PNG's filter "Up": a row is written as its difference from the one above.
_UP = b"\x02"
_LEVEL = 1
#: Parts of a picture that threads pack beside each other. Fixed, so that a picture makes the same bytes everywhere.
_PARTS = 4
_LEAST_PART = 1 << 18
_ZLIB_HEADER = b"\x78\x01"


def write_png(image: Image, path: Path, facts: Mapping[str, Any]) -> None:
    """Write ``image`` to ``path`` with ``facts`` as text entries and the AI-media mark.

    The same image and facts make the same bytes. ``facts["prompt"]`` is also the XMP description.
    Most of the work lets go of Python's lock: a large image is packed by several threads, and threads write images
    beside each other.
    """
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt(_XMP_KEYWORD, xmp_packet(str(facts.get("prompt", ""))))
    for key, text in file_facts(facts).items():
        info.add_itxt(key, text)
    if image.mode in _COLOUR_TYPES and not _ONLY_PILLOW_WRITES & image.info.keys():
        _write_quickly(image, path, info)
    else:
        image.save(path, format="PNG", pnginfo=info)


def _write_quickly(image: Image, path: Path, info: PngInfo) -> None:
    from PIL.PngImagePlugin import putchunk

    header = struct.pack(">IIBBBBB", image.width, image.height, 8, _COLOUR_TYPES[image.mode], 0, 0, 0)
    with path.open("wb") as file:
        file.write(_SIGNATURE)
        putchunk(file, b"IHDR", header)
        for kind, body, *_ in info.chunks:
            putchunk(file, kind, body)
        putchunk(file, b"IDAT", _packed(_filtered(image)))
        putchunk(file, b"IEND", b"")


def _packed(rows: bytes) -> bytes:
    """A zlib stream of parts that are packed beside each other; none refers to the one before."""
    from isal import isal_zlib

    size = max(_LEAST_PART, -(-len(rows) // _PARTS))
    starts = range(0, len(rows), size)

    def pack(start: int) -> bytes:
        packer = isal_zlib.compressobj(_LEVEL, isal_zlib.DEFLATED, -isal_zlib.MAX_WBITS)
        is_last = start == starts[-1]
        packed: bytes = packer.compress(memoryview(rows)[start : start + size])
        return packed + packer.flush(isal_zlib.Z_FINISH if is_last else isal_zlib.Z_FULL_FLUSH)

    with ThreadPoolExecutor(len(starts)) as pool:
        parts = list(pool.map(pack, starts))
    return b"".join([_ZLIB_HEADER, *parts, isal_zlib.adler32(rows).to_bytes(4, "big")])


def _filtered(image: Image) -> bytes:
    import PIL.Image
    from PIL import ImageChops

    above = PIL.Image.new(image.mode, image.size, 0)
    above.paste(image, (0, 1))
    rows = ImageChops.subtract_modulo(image, above).tobytes()
    stride = image.width * len(image.getbands())
    return b"".join(_UP + rows[start : start + stride] for start in range(0, len(rows), stride))


def read_facts(path: Path) -> dict[str, str]:
    """The text entries of a PNG that :func:`write_png` wrote."""
    from PIL import Image

    with Image.open(path, formats=("PNG",)) as image:
        image.load()
        texts: Mapping[str, str] = getattr(image, "text", {})
        return {key: str(text) for key, text in texts.items() if key != _XMP_KEYWORD}
