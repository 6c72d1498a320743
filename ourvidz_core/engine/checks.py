"""Open each artifact and look at it before it is uploaded, so that nothing empty or broken is delivered."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import attrs

from ourvidz_core.errors import ArtifactError
from ourvidz_core.wire.artifacts import Artifact

#: The image formats whose content is checked, by media type.
IMAGE_FORMATS = {"image/png": "PNG", "image/jpeg": "JPEG", "image/webp": "WEBP"}
#: The containers whose content is checked, by media type: the name FFmpeg has for each.
VIDEO_FORMATS = {"video/mp4": "mp4", "video/webm": "webm"}


class _Seen(NamedTuple):
    """What decoding showed. ``frames`` is None for an image."""

    width: int
    height: int
    frames: int | None
    is_one_colour: bool


def check_artifact(artifact: Artifact, *, media_type: str) -> Artifact:
    """Decode ``artifact`` completely and return it with its true size and frame count.

    ``media_type`` is what the job type promises. Types that are neither images nor videos
    known here are only checked to be there. A dark picture passes; one whose every pixel
    (of every frame) is the same does not.

    :raises ArtifactError: saying what is wrong with which file.
    """
    path = artifact.path
    if artifact.media_type != media_type:
        raise ArtifactError(f"{path.name} is declared as {artifact.media_type}; its job type makes {media_type}")
    try:
        size_bytes = path.stat().st_size
    except OSError as error:
        raise ArtifactError(f"{path.name} was not written: {error.strerror}") from error
    if not path.is_file():
        raise ArtifactError(f"{path.name} is no regular file")
    if not size_bytes:
        raise ArtifactError(f"{path.name} is empty")

    if media_type in IMAGE_FORMATS:
        seen = _decode_image(path, IMAGE_FORMATS[media_type])
    elif media_type in VIDEO_FORMATS:
        seen = _decode_video(path, VIDEO_FORMATS[media_type])
    else:
        return artifact
    for name in ("width", "height", "frames"):
        claimed, found = getattr(artifact, name), getattr(seen, name)
        if claimed is not None and claimed != found:
            raise ArtifactError(f"{path.name} should have {name} {claimed} and has {found}")
    if seen.is_one_colour:
        raise ArtifactError(f"{path.name} shows one single colour and nothing else; the model's output is unusable")
    return attrs.evolve(artifact, width=seen.width, height=seen.height, frames=seen.frames)


def _decode_image(path: Path, image_format: str) -> _Seen:
    from PIL import Image

    try:
        with Image.open(path) as image:
            if image.format != image_format:
                raise ArtifactError(f"{path.name} is a {image.format} file, not {image_format}")
            image.load()
            extrema = image.getextrema()
            width, height = image.size
    # Pillow raises SyntaxError for a broken PNG.
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ArtifactError(f"{path.name} is not a complete {image_format} image: {error}") from error
    bands = extrema if isinstance(extrema[0], tuple) else (extrema,)
    return _Seen(width, height, None, all(low == high for low, high in bands))


def _decode_video(path: Path, container_format: str) -> _Seen:
    import av
    import numpy as np

    frames = 0
    colour: bytes | None = None
    is_one_colour = True
    try:
        with av.open(path) as container:
            names = container.format.name.split(",")
            if container_format not in names:
                raise ArtifactError(f"{path.name} is a {names[0]} file, not {container_format}")
            if not container.streams.video:
                raise ArtifactError(f"{path.name} holds no video")
            stream = container.streams.video[0]
            # A damaged frame is otherwise concealed with pieces of its neighbours.
            stream.codec_context.options = {"err_detect": "explode"}
            announced = stream.frames
            width, height = stream.codec_context.width, stream.codec_context.height
            for frame in container.decode(stream):
                frames += 1
                if frame.is_corrupt:
                    raise ArtifactError(f"{path.name} is damaged at frame {frames - 1}")
                if is_one_colour:
                    pixels = frame.to_ndarray(format="rgb24").reshape(-1, 3)
                    colour = colour or pixels[0].tobytes()
                    is_one_colour = bool((pixels == np.frombuffer(colour, dtype=np.uint8)).all())
    except av.FFmpegError as error:
        raise ArtifactError(f"{path.name} is not a complete video; frame {frames} failed: {error.strerror}") from error
    if not frames:
        raise ArtifactError(f"{path.name} holds no frame")
    if announced and frames != announced:
        raise ArtifactError(f"{path.name} announces {announced} frames and holds {frames}")
    return _Seen(width, height, frames, is_one_colour)
