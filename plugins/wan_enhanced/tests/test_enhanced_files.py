"""Facts are added to a finished file, and its pictures stay the same."""

from __future__ import annotations

import av
import numpy as np
import pytest
from ourvidz_wan.video import XMP_BOX, read_facts, read_video, write_video
from ourvidz_wan_enhanced.files import add_facts
from PIL import Image

from ourvidz_core.engine.checks import check_artifact
from ourvidz_core.engine.pictures import read_facts as read_picture_facts
from ourvidz_core.engine.pictures import write_png
from ourvidz_core.engine.provenance import DIGITAL_SOURCE_TYPE
from ourvidz_core.wire.artifacts import Artifact

FACTS = {"prompt": "a majestic fox & friends", "seed": 3, "steps": 25}
ADDED = {"original_prompt": "狐狸 🦊", "enhancement": "applied"}


@pytest.fixture
def frames():
    return np.random.default_rng(1).integers(0, 255, (9, 48, 64, 3), dtype=np.uint8)


def packets(path):
    with av.open(path) as container:
        return [
            (packet.pts, packet.dts, bytes(packet)) for packet in container.demux(video=0) if packet.dts is not None
        ]


def test_a_video_keeps_its_packets_and_its_mark(frames, tmp_path):
    path = tmp_path / "made.mp4"
    write_video(frames, path, FACTS, fps=16)
    before = (packets(path), read_video(path), read_facts(path))
    size = path.stat().st_size
    add_facts(path, ADDED)
    assert packets(path) == before[0]
    assert np.array_equal(read_video(path), before[1])
    assert read_facts(path) == {**before[2], **ADDED}
    content = path.read_bytes()
    assert content.count(XMP_BOX.bytes) == 1
    assert DIGITAL_SOURCE_TYPE.encode() in content
    assert content.index(b"moov") < content.index(b"mdat")  # a browser plays before it has everything
    assert len(content) - size < 2000
    checked = check_artifact(Artifact(path=path, media_type="video/mp4"), media_type="video/mp4")
    assert (checked.width, checked.height, checked.frames) == (64, 48, 9)
    with av.open(path) as container:
        context = container.streams.video[0].codec_context
        assert (context.colorspace, context.color_primaries, context.color_trc) == (1, 1, 1)
        assert container.streams.video[0].average_rate == 16
    assert list(tmp_path.iterdir()) == [path]


def test_a_picture_keeps_its_pixels(frames, tmp_path):
    path = tmp_path / "made.png"
    write_png(Image.fromarray(frames[0]), path, FACTS)
    before = read_picture_facts(path)
    add_facts(path, ADDED)
    assert read_picture_facts(path) == {**before, **ADDED}
    with Image.open(path) as image:
        assert np.array_equal(np.asarray(image), frames[0])
    assert b"XML:com.adobe.xmp" in path.read_bytes()


@pytest.mark.parametrize("name", ["made.png", "made.mp4"])
def test_the_same_facts_make_the_same_bytes(name, frames, tmp_path):
    contents = []
    for turn in ("a", "b"):
        path = tmp_path / turn / name
        path.parent.mkdir()
        if name.endswith("png"):
            write_png(Image.fromarray(frames[0]), path, FACTS)
        else:
            write_video(frames, path, FACTS, fps=16)
        add_facts(path, ADDED)
        contents.append(path.read_bytes())
    assert contents[0] == contents[1]
