"""Nothing that is empty, broken, of another kind or of one single colour is uploaded."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from ourvidz_core.engine.checks import check_artifact
from ourvidz_core.errors import ArtifactError
from ourvidz_core.wire.artifacts import Artifact

FRAMES, WIDTH, HEIGHT = 12, 48, 80


def write_video(path: Path, frames: np.ndarray, container: str = "mp4") -> Path:
    with av.open(path, "w", format=container) as output:
        stream = output.add_stream("libx264", rate=16)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        for frame in frames:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        output.mux(stream.encode(None))
    return path


def moving(shades: int = 256) -> np.ndarray:
    noise = np.random.default_rng(0).integers(0, shades, (FRAMES, HEIGHT // 8, WIDTH // 8, 3), np.uint8)
    return noise.repeat(8, axis=1).repeat(8, axis=2)


@pytest.fixture
def video(tmp_path):
    return write_video(tmp_path / "made.mp4", moving())


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "made.png"
    Image.fromarray(moving()[0]).save(path)
    return path


def check_video(path, **claims):
    return check_artifact(Artifact(path=path, media_type="video/mp4", **claims), media_type="video/mp4")


def check_picture(path, **claims):
    return check_artifact(Artifact(path=path, media_type="image/png", **claims), media_type="image/png")


def test_a_video_gets_its_true_size_and_frame_count(video):
    checked = check_video(video)
    assert (checked.width, checked.height, checked.frames) == (WIDTH, HEIGHT, FRAMES)


def test_a_picture_gets_its_true_size(picture):
    checked = check_picture(picture)
    assert (checked.width, checked.height, checked.frames) == (WIDTH, HEIGHT, None)


def test_true_claims_pass(video, picture):
    check_video(video, width=WIDTH, height=HEIGHT, frames=FRAMES)
    check_picture(picture, width=WIDTH, height=HEIGHT)


@pytest.mark.parametrize("claim", [{"frames": 13}, {"width": 46}, {"height": 82}], ids=str)
def test_a_false_claim_about_a_video_is_refused(claim, video):
    ((name, value),) = claim.items()
    with pytest.raises(ArtifactError, match=rf"made\.mp4 should have {name} {value} and has"):
        check_video(video, **claim)


@pytest.mark.parametrize("claim", [{"width": 46}, {"height": 82}, {"frames": 1}], ids=str)
def test_a_false_claim_about_a_picture_is_refused(claim, picture):
    with pytest.raises(ArtifactError, match=r"made\.png should have"):
        check_picture(picture, **claim)


@pytest.mark.parametrize("check", [check_video, check_picture])
def test_a_file_that_is_not_there_is_refused(check, tmp_path):
    with pytest.raises(ArtifactError, match="was not written"):
        check(tmp_path / "nothing")


@pytest.mark.parametrize("check", [check_video, check_picture])
def test_an_empty_file_is_refused(check, tmp_path):
    (tmp_path / "empty").touch()
    with pytest.raises(ArtifactError, match="is empty"):
        check(tmp_path / "empty")


def test_a_directory_is_no_artifact(tmp_path):
    with pytest.raises(ArtifactError, match="no regular file"):
        check_video(tmp_path)


@pytest.mark.parametrize("part", [0.02, 0.3, 0.6, 0.9])
def test_a_truncated_video_is_refused(part, video):
    content = video.read_bytes()
    video.write_bytes(content[: int(len(content) * part)])
    with pytest.raises(ArtifactError):
        check_video(video)


def test_a_truncated_video_with_its_index_in_front_is_refused(tmp_path):
    path = tmp_path / "fast.mp4"
    with av.open(path, "w", format="mp4", options={"movflags": "+faststart"}) as output:
        stream = output.add_stream("libx264", rate=16)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for frame in moving():
            output.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        output.mux(stream.encode(None))
    content = path.read_bytes()
    check_video(path)
    for part in (0.5, 0.8, 0.95):
        path.write_bytes(content[: int(len(content) * part)])
        with pytest.raises(ArtifactError):
            check_video(path)


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_a_truncated_picture_is_refused(part, picture):
    content = picture.read_bytes()
    picture.write_bytes(content[: int(len(content) * part)])
    with pytest.raises(ArtifactError, match="not a complete PNG image"):
        check_picture(picture)


def test_a_damaged_video_is_refused(video):
    content = bytearray(video.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 200] = b"\xff" * 200
    video.write_bytes(content)
    with pytest.raises(ArtifactError):
        check_video(video)


def test_a_video_under_a_pictures_name_is_refused(video):
    with pytest.raises(ArtifactError, match="not a complete PNG image"):
        check_picture(video.rename(video.with_suffix(".png")))


def test_a_picture_under_a_videos_name_is_refused(picture):
    with pytest.raises(ArtifactError):
        check_video(picture.rename(picture.with_suffix(".mp4")))


def test_another_container_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="is a matroska file, not mp4"):
        check_video(write_video(tmp_path / "made.mp4", moving(), container="matroska"))


def test_another_picture_format_is_refused(tmp_path):
    path = tmp_path / "made.png"
    Image.fromarray(moving()[0]).save(path, format="JPEG")
    with pytest.raises(ArtifactError, match="is a JPEG file, not PNG"):
        check_picture(path)


def test_a_media_type_other_than_the_job_types_is_refused(picture):
    with pytest.raises(ArtifactError, match="declared as image/png; its job type makes video/mp4"):
        check_artifact(Artifact(path=picture, media_type="image/png"), media_type="video/mp4")


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (90, 120, 30)], ids=["black", "white", "green"])
def test_one_single_colour_is_refused(colour, tmp_path):
    flat = np.full((FRAMES, HEIGHT, WIDTH, 3), colour, np.uint8)
    with pytest.raises(ArtifactError, match="one single colour"):
        check_video(write_video(tmp_path / "flat.mp4", flat))
    Image.fromarray(flat[0]).save(tmp_path / "flat.png")
    with pytest.raises(ArtifactError, match="one single colour"):
        check_picture(tmp_path / "flat.png")


def test_a_dark_video_passes(tmp_path):
    """A size or brightness floor would refuse legitimate clips."""
    check_video(write_video(tmp_path / "night.mp4", moving(shades=8)))


def test_a_video_that_changes_its_one_colour_passes(tmp_path):
    fade = np.stack([np.full((HEIGHT, WIDTH, 3), 20 * index, np.uint8) for index in range(FRAMES)])
    check_video(write_video(tmp_path / "fade.mp4", fade))


def test_a_type_that_nobody_knows_only_has_to_be_there(tmp_path):
    path = tmp_path / "sound.wav"
    path.write_bytes(b"RIFF")
    artifact = Artifact(path=path, media_type="audio/wav")
    assert check_artifact(artifact, media_type="audio/wav") is artifact
