"""A video file: its frames, its bytes and what it says of itself."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading

import av
import numpy as np
import pytest
from ourvidz_wan.video import XMP_BOX, VideoWriter, read_facts, read_video, write_video

from ourvidz_core.engine.provenance import DIGITAL_SOURCE_TYPE

FACTS = {"prompt": "ein Leuchtturm; größer = besser\nzweite Zeile", "seed": 0, "steps": 25, "guidance_scale": 6.5}


def moving(frames=9, height=80, width=48):
    moment, down, right = np.mgrid[0:frames, 0:height, 0:width]
    bands = (right * 3 + moment * 4, down * 2, right + down)
    return np.clip(np.stack(bands, axis=-1), 0, 255).astype(np.uint8)


@pytest.fixture
def video(tmp_path):
    path = tmp_path / "moving.mp4"
    write_video(moving(), path, FACTS, fps=16)
    return path


def test_it_is_h264_with_every_frame_at_16_a_second(video):
    with av.open(video) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert (stream.codec_context.width, stream.codec_context.height) == (48, 80)
        assert stream.average_rate == 16
        assert stream.frames == 9
        assert float(stream.duration * stream.time_base) == pytest.approx(9 / 16)
        times = [frame.time for frame in container.decode(stream)]
    assert times == pytest.approx([index / 16 for index in range(9)])


def test_the_frames_are_the_frames(video):
    shown, wanted = read_video(video).astype(float), moving().astype(float)
    assert shown.shape == wanted.shape
    assert 10 * np.log10(255**2 / np.mean((shown - wanted) ** 2)) > 35


def test_colours_stay_the_colours(tmp_path):
    colours = [(200, 30, 60), (10, 200, 90), (40, 60, 220), (250, 250, 250), (5, 5, 5)]
    for colour in colours:
        path = tmp_path / "flat.mp4"
        write_video(np.full((5, 32, 32, 3), colour, np.uint8), path, {}, fps=16)
        assert np.abs(read_video(path).astype(int) - colour).max() <= 3


def test_the_index_stands_before_the_media(video):
    content = video.read_bytes()
    assert 0 < content.find(b"moov") < content.find(b"mdat")


def test_it_says_what_made_it(video):
    facts = read_facts(video)
    assert facts["prompt"] == FACTS["prompt"]
    assert facts["seed"] == "0"
    assert facts["guidance_scale"] == "6.5"
    assert facts["digital_source_type"] == DIGITAL_SOURCE_TYPE


def test_it_carries_the_mark_of_ai_media_as_xmp(video):
    content = video.read_bytes()
    box = content[content.rindex(XMP_BOX.bytes) - 8 :]
    assert int.from_bytes(box[:4], "big") == len(box)
    assert DIGITAL_SOURCE_TYPE.encode() in box


def test_the_same_frames_make_the_same_bytes_on_any_number_of_cores(video, tmp_path):
    again = tmp_path / "again.mp4"
    program = (
        "import sys; sys.path[:0] = sys.argv[2:]; from pathlib import Path; import test_wan_video as t;"
        "t.write_video(t.moving(), Path(sys.argv[1]), t.FACTS, fps=16)"
    )
    some_core = min(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0

    def on_one_core():
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {some_core})

    subprocess.run(
        [sys.executable, "-c", program, again, os.path.dirname(__file__), *sys.path],
        check=True,
        timeout=60,
        preexec_fn=on_one_core,
    )
    assert hashlib.sha256(again.read_bytes()).digest() == hashlib.sha256(video.read_bytes()).digest()


def test_several_frames_are_encoded_at_once(tmp_path):
    path = tmp_path / "large.mp4"
    write_video(moving(2, 832, 480), path, {}, fps=16)
    # x264 says in the file how it ran.
    assert b" threads=8 lookahead_threads=1 sliced_threads=0 " in path.read_bytes()


def test_other_frames_make_other_bytes(video, tmp_path):
    other = tmp_path / "other.mp4"
    write_video(moving()[::-1], other, FACTS, fps=16)
    assert other.read_bytes() != video.read_bytes()


@pytest.mark.parametrize(("height", "width"), [(33, 48), (32, 47), (33, 47)], ids=["odd height", "odd width", "both"])
def test_odd_sides_grow_to_even_ones(height, width, tmp_path):
    path = tmp_path / "odd.mp4"
    written = write_video(moving(5, height, width), path, {}, fps=16)
    assert written == (width + width % 2, height + height % 2)
    shown = read_video(path)
    assert shown.shape[1:3] == (written[1], written[0])
    assert np.abs(shown[:, :height, :width].astype(int) - moving(5, height, width)).mean() < 6


def test_frames_that_come_in_parts_make_the_same_file(video, tmp_path):
    path = tmp_path / "parts.mp4"
    writer = VideoWriter(path, FACTS, fps=16)
    for part in np.split(moving(), [1, 5]):
        writer.add(part)
    writer.end()
    assert writer.wait() == (48, 80)
    assert path.read_bytes() == video.read_bytes()


def test_what_goes_wrong_while_parts_are_written_is_raised_in_the_end(tmp_path):
    writer = VideoWriter(tmp_path / "nowhere" / "moving.mp4", FACTS, fps=16)
    writer.add(moving())
    writer.end()
    with pytest.raises(FileNotFoundError):
        writer.wait()


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="there are no signals to threads")
def test_who_breaks_off_the_waiting_ends_the_writing(tmp_path):
    """Else the thread goes on, and its file is there again after it was removed."""
    is_broken_off = threading.Event()

    def break_off(_number, _frame):
        if not is_broken_off.is_set():
            is_broken_off.set()
            raise SystemExit(143)

    def keep_asking(waiting):
        # One signal may come just before the thread falls asleep, and would not wake it.
        while not is_broken_off.wait(0.05):
            signal.pthread_kill(waiting, signal.SIGUSR1)

    writer = VideoWriter(tmp_path / "moving.mp4", FACTS, fps=16)
    writer.add(moving())
    before = signal.signal(signal.SIGUSR1, break_off)
    asking = threading.Thread(target=keep_asking, args=(threading.get_ident(),))

    def wait_for_frames_that_nobody_adds():
        asking.start()
        writer.wait()

    try:
        with pytest.raises(SystemExit):
            wait_for_frames_that_nobody_adds()
    finally:
        is_broken_off.set()
        asking.join()
        signal.signal(signal.SIGUSR1, before)
    assert writer._written.done()
    (tmp_path / "moving.mp4").unlink()
    assert list(tmp_path.iterdir()) == []


def test_no_frames_are_no_video(tmp_path):
    with pytest.raises(ValueError, match=r"no frames to write to empty\.mp4"):
        write_video([], tmp_path / "empty.mp4", FACTS, fps=16)
