"""Decode foreign bytes into a clean PNG, in a process of its own.

``python -m ourvidz_core.delivery.decode_image SOURCE DESTINATION MAX_PIXELS`` limits its
own memory and time, loads Pillow, opens its two files and gives up opening anything else:
no file, no socket, no process. Then it looks at the bytes, and prints one JSON line:
``width``, ``height`` and ``format``, or ``error`` with the reason. Imports nothing of ours,
so that the parent can run this file by its path, however the package is installed.
"""

from __future__ import annotations

import errno
import io
import json
import os
import resource
import struct
import sys
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

#: Measured at 50 megapixels, address space at its peak: JPEG 0.4 to 0.6 GB, PNG 0.3 to 0.85 GB, WebP 0.8 GB,
#: lossless WebP with transparency 1.4 GB. The limit there is 1.5 GB.
BASE_MEMORY_BYTES = 384 * 2**20
MEMORY_BYTES_PER_PIXEL = 22
#: Measured at 50 megapixels on one busy core: 3 to 9 s. The limit there is 50 s.
BASE_CPU_SECONDS = 10
CPU_SECONDS_PER_MEGAPIXEL = 0.8

FORMATS = ("PNG", "JPEG", "WEBP")
EXIT_UNUSABLE = 1
EXIT_NO_ROOM = 3
EXIT_BROKEN = 4


def main(argv: list[str]) -> int:
    """Decode, and say on stdout how it went."""
    source, destination, max_pixels = argv[0], argv[1], int(argv[2])
    limit_resources(max_pixels)
    try:
        load_decoders()
        with open(source, "rb") as read, open(destination, "wb") as written:
            lock_in()
            outcome = decode(read, written, max_pixels)
    except ImportError as error:
        return _report({"error": str(error)}, EXIT_BROKEN)
    except MemoryError:
        return _report({"error": "it needs more memory to decode than an image of that size may"}, EXIT_UNUSABLE)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return _report({"error": f"no room for {destination}"}, EXIT_NO_ROOM)
        return _report({"error": _reason(error)}, EXIT_UNUSABLE)
    except Exception as error:  # a decoder raises whatever its format's parser raises
        return _report({"error": _reason(error)}, EXIT_UNUSABLE)
    return _report(outcome, EXIT_UNUSABLE if "error" in outcome else 0)


def memory_limit(max_pixels: int) -> int:
    """How many bytes the decoder may map for an image of ``max_pixels``."""
    return BASE_MEMORY_BYTES + MEMORY_BYTES_PER_PIXEL * max_pixels


def cpu_limit(max_pixels: int) -> int:
    """How many seconds of CPU the decoder may use for an image of ``max_pixels``."""
    return int(BASE_CPU_SECONDS + CPU_SECONDS_PER_MEGAPIXEL * max_pixels / 1e6)


def limit_resources(max_pixels: int) -> None:
    """Bound this process's memory, CPU time and output; it leaves no core dump."""
    cpu_seconds = cpu_limit(max_pixels)
    for kind, limit in (
        (resource.RLIMIT_AS, memory_limit(max_pixels)),
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_FSIZE, 2**20 + 4 * max_pixels),
        (resource.RLIMIT_CORE, 0),
    ):
        try:
            resource.setrlimit(kind, (limit, limit))
        except (ValueError, OSError):
            # A lower hard limit than ours stands already, or (macOS) the system knows no such limit.
            continue


def load_decoders() -> None:
    """Import whatever decoding imports on its way: once locked in, nothing can be."""
    from PIL import Image, ImageCms, ImageOps, ImagePalette  # noqa: F401 - imported to be there

    Image.init()


def lock_in() -> None:
    """Open nothing from here on. Foreign bytes that take this process over find no file, no network, no child."""
    for kind in (resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC):
        resource.setrlimit(kind, (0, 0))


def decode(source: IO[bytes], destination: IO[bytes], max_pixels: int) -> dict[str, Any]:
    """Write the first frame of ``source``, upright and in plain sRGB, as a PNG without metadata."""
    from PIL import Image

    # The size is checked below, before anything is decoded, with a message of ours.
    Image.MAX_IMAGE_PIXELS = None
    with Image.open(source, formats=FORMATS) as image:
        width, height = image.size
        if width * height > max_pixels:
            return {"error": f"it is {width}x{height} pixels; at most {max_pixels / 1e6:g} megapixels are taken"}
        image.seek(0)
        image.load()
        _turn_upright(image)
        plain = _in_srgb(_flattened(image))
        plain.info.clear()  # Pillow would write the profile and the transparency found there
        plain.save(destination, format="PNG", compress_level=1)  # lives as long as its job, so speed counts
        return {"width": plain.width, "height": plain.height, "format": image.format}


def _turn_upright(image: Image.Image) -> None:
    from PIL import ImageOps

    try:
        ImageOps.exif_transpose(image, in_place=True)
    except (SyntaxError, ValueError, TypeError, KeyError, struct.error):
        return  # cameras and editors write broken EXIF around sound pictures


def _flattened(image: Image.Image) -> Image.Image:
    """Without transparency: over white, as the page that showed it would have had it."""
    from PIL import Image

    if image.mode in ("RGB", "L", "CMYK") and "transparency" not in image.info:
        return image
    if image.mode == "I" or image.mode.startswith("I;16"):
        return image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image.getchannel("A"))
        if "icc_profile" in image.info:
            white.info["icc_profile"] = image.info["icc_profile"]
        return white
    return image if image.mode == "CMYK" else image.convert("RGB")


def _in_srgb(image: Image.Image) -> Image.Image:
    """In the colour space that models were trained in: a phone's wide-gamut photo is paler without this."""
    from PIL import ImageCms

    profile = image.info.get("icc_profile")
    if profile and image.mode in ("RGB", "L", "CMYK"):
        try:
            converted = ImageCms.profileToProfile(
                image, ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB"), outputMode="RGB"
            )
        except (ImageCms.PyCMSError, OSError, ValueError):
            converted = None  # a profile of another colour model, or a broken one
        if converted is not None:
            return converted
    return image if image.mode == "RGB" else image.convert("RGB")


def _reason(error: Exception) -> str:
    # Pillow's message for an unknown format names our temporary file and nothing else.
    if type(error).__name__ == "UnidentifiedImageError":
        return "it is not a PNG, JPEG or WebP image"
    return f"it cannot be decoded ({str(error)[:200] or type(error).__name__})"


def _report(outcome: dict[str, Any], status: int) -> int:
    sys.stdout.write(json.dumps(outcome) + "\n")
    sys.stdout.flush()
    return status


if __name__ == "__main__":
    exit_status = main(sys.argv[1:])
    # Decoders that ran out of memory may not survive their own clean-up.
    os._exit(exit_status)
