"""What the tests of the outbound clients share: real servers, and a picture."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from ourvidz_core.testing.servers import FileServer, SupabaseServer


@pytest.fixture
def picture() -> bytes:
    """A PNG of 40x20 pixels: red on the left, blue on the right."""
    image = Image.new("RGB", (40, 20), "red")
    image.paste("blue", (20, 0, 40, 20))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def picture_file(tmp_path: Path, picture: bytes) -> Path:
    """The picture, as a file that a job left."""
    file = tmp_path / "out.png"
    file.write_bytes(picture)
    return file


@pytest.fixture
def files(picture: bytes) -> Iterator[FileServer]:
    """A server that has the picture at ``/picture.png``."""
    with FileServer({"/picture.png": picture}) as server:
        yield server


@pytest.fixture
def supabase() -> Iterator[SupabaseServer]:
    """Storage and callbacks with the deployed buckets."""
    with SupabaseServer() as server:
        yield server
