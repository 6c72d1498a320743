"""Write facts into a finished file, beside those that WAN wrote. The pictures stay as they are, bit by bit."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ourvidz_wan.arguments import IMAGE_SUFFIX
from ourvidz_wan.video import CONTAINER_OPTIONS
from ourvidz_wan.video import read_facts as read_video_facts


def add_facts(path: Path, facts: Mapping[str, Any]) -> None:
    """Write ``facts`` into the PNG or MP4 at ``path``, beside what it says already."""
    unfinished = path.with_name(f".{path.name}.part")
    write = _add_to_picture if path.suffix == IMAGE_SUFFIX else _add_to_video
    try:
        write(path, unfinished, facts)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _add_to_picture(path: Path, target: Path, facts: Mapping[str, Any]) -> None:
    from PIL import Image

    from ourvidz_core.engine.pictures import read_facts, write_png

    with Image.open(path, formats=("PNG",)) as image:
        write_png(image, target, {**read_facts(path), **facts})


def _add_to_video(path: Path, target: Path, facts: Mapping[str, Any]) -> None:
    import av

    from ourvidz_core.engine.provenance import file_facts

    with (
        av.open(path) as source,
        av.open(target, mode="w", format="mp4", options=CONTAINER_OPTIONS) as container,
    ):
        container.metadata.update({**read_video_facts(path), **file_facts(facts)})
        given = source.streams.video[0]
        stream = container.add_stream_from_template(given)
        for packet in source.demux(given):
            # The last packet is empty: it only says that the end has come.
            if packet.dts is not None:
                packet.stream = stream
                container.mux(packet)
    with target.open("ab") as file:
        for kind, box in _boxes(path.read_bytes()):
            if kind == b"uuid":
                file.write(box)


def _boxes(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The top-level boxes of an ISO media file, with their kinds."""
    place = 0
    while place + 8 <= len(content):
        size, kind = struct.unpack_from(">I4s", content, place)
        if size == 1:
            (size,) = struct.unpack_from(">Q", content, place + 8)
        if size < 8:  # up to the end of the file
            size = len(content) - place
        yield kind, content[place : place + size]
        place += size
