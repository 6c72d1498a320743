"""Pictures made to harm whoever opens them: the decoder's process ends, the worker says why and goes on."""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
import textwrap
import time
import zlib
from pathlib import Path

import pytest
from PIL import Image, ImageCms

from ourvidz_core.delivery import decode_image
from ourvidz_core.delivery.references import StubReferences
from ourvidz_core.errors import ReferenceInvalid
from ourvidz_core.wire.jobs import Reference

MAX_PIXELS = 4_000_000
URL = "https://images.example/a"


def fetch(content: bytes, directory: Path) -> Reference:
    return StubReferences({URL: content}, max_pixels=MAX_PIXELS).fetch(Reference(url=URL), directory, "single")


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(*chunks: bytes, width: int = 8, height: int = 8, pixels: bytes | None = None) -> bytes:
    """A PNG with ``chunks`` between its header and its pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes((3 * width + 1) * height)) if pixels is None else pixels
    return b"\x89PNG\r\n\x1a\n" + b"".join([chunk(b"IHDR", header), *chunks, chunk(b"IDAT", body), chunk(b"IEND", b"")])


def zeros(megabytes: int) -> bytes:
    """Megabytes of nothing, compressed to a thousandth: one of them, again and again."""
    packer = zlib.compressobj(9, wbits=-15)
    one = packer.compress(bytes(2**20)) + packer.flush(zlib.Z_FULL_FLUSH)
    return b"\x78\xda" + one * megabytes + packer.flush()


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def icon_of(size: int) -> bytes:
    inner = png(width=size, height=size)
    return struct.pack("<HHH", 0, 1, 1) + struct.pack("<BBBBHHII", 0, 0, 0, 0, 1, 32, len(inner), 22) + inner


def webp(width: int, height: int) -> bytes:
    """A lossless WebP that claims a size."""
    bits = struct.pack("<BI", 0x2F, (width - 1) | (height - 1) << 14) + bytes(20)
    body = b"WEBP" + b"VP8L" + struct.pack("<I", len(bits)) + bits + bytes(len(bits) % 2)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def jpeg(width: int, height: int) -> bytes:
    """A JPEG that claims a size."""
    whole = encoded(Image.new("RGB", (16, 16)), "JPEG")
    at = whole.index(b"\xff\xc0") + 5
    return whole[:at] + struct.pack(">HH", height, width) + whole[at + 4 :]


BOMBS = {
    "a PNG of 4 thousand million pixels": png(width=65_535, height=65_535, pixels=zeros(8)),
    "a PNG of 2^31 by 1": png(width=2**31 - 1, height=1, pixels=zeros(1)),
    "a JPEG of 65500 by 65500": jpeg(65_500, 65_500),
    "a WebP of 16383 by 16383": webp(16_383, 16_383),
    "an animated PNG of 65535 by 65535": png(
        chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0)), width=65_535, height=65_535, pixels=zeros(1)
    ),
    "a text of 500 MB in a PNG": png(chunk(b"zTXt", b"Comment\0\0" + zeros(500))),
    "a profile of 500 MB in a PNG": png(chunk(b"iCCP", b"icc\0\0" + zeros(500))),
    "a GIF": encoded(Image.new("P", (4, 4)), "GIF", save_all=True, append_images=[Image.new("P", (4, 4), 1)]),
    "a TIFF of many pages": b"II*\0\x08\0\0\0" + b"\xff\xff" + bytes(12 * 100),
    "an SVG that includes a file": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "an SVG of a thousand million laughs": b'<!DOCTYPE svg [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]><svg>&b;</svg>',
    "an icon": icon_of(256),
    "a PostScript program": b"%!PS-Adobe-3.0 EPSF-3.0\n(/etc/passwd) (r) file 100 string readstring\n",
    "a picture on the web, in WMF": b"\xd7\xcd\xc6\x9a" + bytes(100),
    "a PSD": b"8BPS\0\x01" + bytes(6) + struct.pack(">HIIHH", 3, 30_000, 30_000, 8, 3),
    "a JPEG 2000": b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(50),
    "an ICNS": b"icns" + struct.pack(">I", 2**31 - 1) + bytes(50),
    "a DDS of 2^31": b"DDS " + struct.pack("<IIII", 124, 0x1007, 2**31 - 1, 2**31 - 1) + bytes(120),
    "a FITS": b"SIMPLE  =                    T" + b" " * 2850,
}


@pytest.mark.parametrize("what", BOMBS)
def test_a_bomb_is_refused_in_time_and_leaves_nothing(what: str, tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(ReferenceInvalid, match=r"send a PNG, JPEG or WebP image|at most 4 megapixels"):
        fetch(BOMBS[what], tmp_path)
    assert time.monotonic() - began < 5
    assert not list(tmp_path.iterdir())


def test_of_a_hundred_thousand_frames_one_is_decoded(tmp_path: Path) -> None:
    frame = chunk(b"fcTL", struct.pack(">IIIIIHHBB", 0, 8, 8, 0, 0, 1, 10, 0, 0))
    animated = png(chunk(b"acTL", struct.pack(">II", 100_000, 0)), frame)[:-12]
    for number in range(1, 5000):  # the rest is claimed
        animated += chunk(b"fcTL", struct.pack(">IIIIIHHBB", number, 8, 8, 0, 0, 1, 10, 0, 0))
    began = time.monotonic()
    assert fetch(animated + chunk(b"IEND", b""), tmp_path).width == 8
    assert time.monotonic() - began < 3


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_what_hides_behind_a_picture_does_not_reach_the_plugin(kind: str, tmp_path: Path) -> None:
    hidden = b"PK\x03\x04 <script>canary</script> %PDF-1.7"
    options: dict[str, object] = {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0" + hidden} if kind != "PNG" else {}
    options["icc_profile"] = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes() + hidden
    polyglot = encoded(Image.linear_gradient("L").convert("RGB"), kind, **options) + hidden
    fetched = fetch(polyglot, tmp_path)
    assert fetched.path is not None
    clean = fetched.path.read_bytes()
    assert b"canary" not in clean
    assert clean.endswith(chunk(b"IEND", b""))
    with Image.open(fetched.path) as image:
        assert not image.info


# -- the decoder's process

LOCKED_IN = """
import importlib.util, json, os, resource, socket, subprocess, sys
spec = importlib.util.spec_from_file_location("decode_image", sys.argv[1])
decode_image = importlib.util.module_from_spec(spec)
spec.loader.exec_module(decode_image)
decode_image.limit_resources(1_000_000)
decode_image.load_decoders()
tries = {
    "read a file": lambda: open("/etc/passwd"),
    "write a file": lambda: open(sys.argv[2], "w"),
    "open a socket": lambda: socket.socket(),
    "open a pair of sockets": lambda: socket.socketpair(),
    "start a program": lambda: subprocess.run(["true"]),
    "take the limits back": lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (50, 50)),
}
decode_image.lock_in()
done = []
for what, attempt in tries.items():
    try:
        attempt()
        done.append(what)
    except (OSError, ValueError):
        pass
kinds = ("AS", "CPU", "FSIZE", "CORE", "NOFILE", "NPROC")
limits = {kind: resource.getrlimit(getattr(resource, f"RLIMIT_{kind}"))[0] for kind in kinds}
print(json.dumps([done, limits]))
"""


def test_a_decoder_that_was_taken_over_opens_no_file_no_socket_and_no_program(tmp_path: Path) -> None:
    finished = subprocess.run(
        [sys.executable, "-P", "-c", LOCKED_IN, decode_image.__file__, str(tmp_path / "new")],
        capture_output=True,
        text=True,
        check=True,
    )
    done, limits = json.loads(finished.stdout)
    # Root may raise a limit that it has lowered; nobody else can.
    assert set(done) <= {"take the limits back"}
    assert not (tmp_path / "new").exists()
    assert limits["AS"] <= decode_image.memory_limit(1_000_000) < 500e6
    assert limits["CPU"] <= decode_image.cpu_limit(1_000_000) < 15
    assert limits["FSIZE"] < 10e6
    assert limits["CORE"] == 0
    if not done:
        assert (limits["NOFILE"], limits["NPROC"]) == (0, 0)


def test_a_crash_of_the_decoder_is_an_error_of_that_picture_and_the_next_is_decoded(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given a decoder with a hole, which one picture knows
    site = tmp_path_factory.mktemp("site")
    (site / "sitecustomize.py").write_text(
        textwrap.dedent(
            """
            import os
            from PIL import PngImagePlugin
            whole = PngImagePlugin.PngImageFile.load_end
            def load_end(self):
                whole(self)
                if self.size == (13, 13):
                    os.kill(os.getpid(), 11)
            PngImagePlugin.PngImageFile.load_end = load_end
            """
        )
    )
    monkeypatch.setenv("PYTHONPATH", str(site))
    with pytest.raises(ReferenceInvalid, match=r"broke the decoder \(-11\)"):
        fetch(png(width=13, height=13), tmp_path)
    assert fetch(png(), tmp_path).width == 8
