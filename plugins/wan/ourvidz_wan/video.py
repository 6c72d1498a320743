"""Write frames as an MP4 that says what made it, and read both back."""

from __future__ import annotations

import queue
import struct
import uuid
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import frozen

from ourvidz_core.engine.provenance import file_facts, xmp_packet

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Frames = NDArray[np.uint8]

#: The box in which ISO media files carry an XMP packet (XMP specification, part 3).
XMP_BOX = uuid.UUID("be7acfcb-97a9-42e8-9c71-999491e3afac")
#: A fixed number, so that the bytes do not depend on how many cores a machine has. Four make a file 1% smaller.
ENCODER_THREADS = 8
#: How far the encoder looks ahead; what it holds back for that is left to encode when the last frame is decoded.
LOOKAHEAD_FRAMES = 20
#: Visually lossless at WAN's sizes; an 81-frame video at 480*832 stays far below its bucket's limit.
CONSTANT_RATE_FACTOR = 18
ENCODER_OPTIONS = {
    "crf": str(CONSTANT_RATE_FACTOR),
    # Half a decibel less than "medium" for less than half of its time, while a GPU may wait for the file.
    "preset": "veryfast",
    "x264-params": ":".join(
        (
            f"threads={ENCODER_THREADS}",
            # Several frames at once. FFmpeg would have each frame cut into slices, and what comes ahead of
            # encoding, a third of the work, done between two frames by one thread.
            "sliced-threads=0",
            "lookahead-threads=1",
            f"rc-lookahead={LOOKAHEAD_FRAMES}",
            # The same choices on every processor, whatever instructions it has.
            "cpu-independent=1",
        )
    ),
}


@frozen(kw_only=True)
class Encoder:
    """An H.264 encoder of FFmpeg."""

    name: str
    options: Mapping[str, str]
    #: None is its own choice.
    threads: int | None = None


X264 = Encoder(name="libx264", options=ENCODER_OPTIONS, threads=ENCODER_THREADS)
#: ``faststart`` puts the index first, so that a browser plays before it has everything;
#: ``use_metadata_tags`` keeps metadata keys that QuickTime never defined.
CONTAINER_OPTIONS = {"movflags": "+faststart+use_metadata_tags", "fflags": "+bitexact"}


class VideoWriter:
    """Writes a video in a thread of its own while its frames come in."""

    def __init__(self, path: Path, facts: Mapping[str, Any], *, fps: int, encoder: Encoder = X264) -> None:
        """See :func:`write_video`."""
        self._coming: queue.SimpleQueue[Frames | None] = queue.SimpleQueue()
        self._is_given_up = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="write-video")
        self._written = self._thread.submit(write_video, self._frames(), path, facts, fps=fps, encoder=encoder)

    def add(self, frames: Frames) -> None:
        """Take the next ``frames``, ``[frames, height, width, 3]``, which nobody changes any more."""
        self._coming.put(frames)

    def end(self) -> None:
        """Say that no more frames come."""
        self._coming.put(None)
        self._thread.shutdown(wait=False)

    def give_up(self) -> None:
        """Stop, and leave what was written for the caller to remove."""
        self._is_given_up = True
        self.end()
        wait([self._written])

    def wait(self) -> tuple[int, int]:
        """The width and height written, once the file is whole; raises what the writing raised.

        Where the waiting is broken off, the writing is given up: it would make a new file after this one is removed.
        """
        try:
            return self._written.result()
        except BaseException:
            self.give_up()
            raise

    def _frames(self) -> Iterator[Frames]:
        while (frames := self._coming.get()) is not None:
            if self._is_given_up:
                return
            yield frames


def even(side: int) -> int:
    """The side that a 4:2:0 video has for one of ``side`` pixels: it cannot be odd."""
    return side + side % 2


def write_video(
    frames: Frames | Iterable[Frames], path: Path, facts: Mapping[str, Any], *, fps: int, encoder: Encoder = X264
) -> tuple[int, int]:
    """Write ``frames`` ``[frames, height, width, 3]``, or parts of them, as H.264; the width and height written.

    By x264 the same frames and facts make the same bytes, however they are parted. 4:2:0 video has
    even sides, so an odd side grows by repeating its last line.

    :raises ValueError: there are no frames.
    """
    import av
    import numpy as np
    from av.video.reformatter import ColorRange, Colorspace, VideoReformatter

    parts = iter([frames] if isinstance(frames, np.ndarray) else frames)
    first = next(parts, None)
    if first is None:
        raise ValueError(f"there are no frames to write to {path.name}")
    shown_height, shown_width = first.shape[1:3]
    height, width = even(shown_height), even(shown_width)
    is_odd = (height, width) != (shown_height, shown_width)
    padding = ((0, 0), (0, height - shown_height), (0, width - shown_width), (0, 0))
    with av.open(path, mode="w", format="mp4", options=CONTAINER_OPTIONS) as container:
        container.metadata.update(file_facts(facts))
        stream = container.add_stream(encoder.name, rate=fps, options=dict(encoder.options))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        context = stream.codec_context
        context.time_base = Fraction(1, fps)
        if encoder.threads is not None:
            context.thread_count = encoder.threads
        # Untagged video of this size is taken for BT.601 by some players and for BT.709 by others.
        context.colorspace = context.color_primaries = context.color_trc = 1
        context.color_range = 1
        padded = (np.pad(part, padding, mode="edge") if is_odd else part for part in chain([first], parts))
        # One for all frames: a frame's own would be made anew for each, its threads with it.
        reformatter = VideoReformatter()
        for index, frame in enumerate(chain.from_iterable(padded)):
            picture = reformatter.reformat(
                av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24"),
                format="yuv420p",
                dst_colorspace=Colorspace.ITU709,
                dst_color_range=ColorRange.MPEG,
            )
            picture.pts = index
            picture.time_base = context.time_base
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    with path.open("ab") as file:
        file.write(_xmp_box(str(facts.get("prompt", ""))))
    return width, height


def read_video(path: Path) -> Frames:
    """All frames of a video as ``[frames, height, width, 3]`` RGB."""
    import av
    import numpy as np

    with av.open(path) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def read_facts(path: Path) -> dict[str, str]:
    """The metadata of a video that :func:`write_video` wrote."""
    import av

    container_own = {"major_brand", "minor_version", "compatible_brands", "encoder", "creation_time"}
    with av.open(path) as container:
        return {key: value for key, value in container.metadata.items() if key not in container_own}


def _xmp_box(description: str) -> bytes:
    """A top-level ``uuid`` box; behind the media, so that no offset in the index moves."""
    body = XMP_BOX.bytes + xmp_packet(description).encode()
    return struct.pack(">I4s", 8 + len(body), b"uuid") + body
