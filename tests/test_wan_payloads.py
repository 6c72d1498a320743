"""The producer's own WAN messages, byte for byte, from a Redis list to stored videos and one callback each."""

from __future__ import annotations

import io
import json

import av
import numpy as np
import pytest
from PIL import Image

from ourvidz_core.engine.provenance import DIGITAL_SOURCE_TYPE
from ourvidz_core.testing.servers import FileServer
from tests.deployment import Run, names, payload, run_payloads

pytest.importorskip("ourvidz_wan")

# One module-wide fixture runs every message.
pytestmark = pytest.mark.timeout(300)

ALL = [*names("image_*.json"), *names("video_*.json")]
#: What each message's reference must have led to.
METHODS = {
    "image_fast_ref": ("single", "image_to_image"),
    "video_fast_ref_single": ("single", "resembling_first_frame"),
    "video_fast_ref_both": ("both", "pinned_frames"),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """All messages in one warm engine."""
    from examples.models import tiny_wan

    directory = tmp_path_factory.mktemp("payloads")
    model = directory / "model"
    tiny_wan.save(tiny_wan.make_pipeline(), model)
    pictures = {}
    for name, shade in (("start", 40), ("end", 200), ("ref", 120)):
        picture = io.BytesIO()
        Image.radial_gradient("L").resize((480, 832)).point(lambda p, s=shade: (p + s) // 2).convert("RGB").save(
            picture, "PNG"
        )
        pictures[name] = picture.getvalue()
    paths = {
        "/object/sign/image_fast/u/start.png": pictures["start"],
        "/object/sign/image_fast/u/end.png": pictures["end"],
        "/object/sign/reference_images/u/ref.png": pictures["ref"],
        "/object/sign/reference_images/u/1752950000000-ref.png": pictures["ref"],
        "/object/sign/image_fast/u/ref.png": pictures["ref"],
    }
    with FileServer(paths) as server:
        return run_payloads(directory / "run", ALL, "wan_queue", server, OURVIDZ_WAN_CKPT_DIR=str(model))


def frames_of(run: Run, name: str) -> np.ndarray:
    (stored,) = run.stored(name)
    with av.open(io.BytesIO(stored.body)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.mark.parametrize("name", ALL)
def test_a_message_of_the_producer_completes_with_what_it_asked_for(run: Run, name: str) -> None:
    asked = payload(name)
    assert [body["status"] for body in run.all(name)] == ["processing", "completed"]
    body = run.last(name)
    metadata = body["metadata"]
    is_video = asked["config"]["content_type"] == "video"
    assert body["assets"] == [f"{asked['user_id']}/{asked['id']}_0.{'mp4' if is_video else 'png'}"]
    assert run.stored(name)[0].media_type == ("video/mp4" if is_video else "image/png")
    assert metadata["wan_task"] == "t2v-1.3B"
    assert metadata["content_type"] == asked["config"]["content_type"]
    assert metadata["frame_num"] == (81 if is_video else 1)
    assert metadata["requested_frame_num"] == (83 if is_video else 1)
    assert metadata["steps"] == asked["config"]["sample_steps"]
    mode, method = METHODS.get(name, ("none", None))
    assert (metadata["reference_mode"], metadata.get("reference_method")) == (mode, method)
    assert metadata["reference_applied"] is (method is not None)
    assert metadata["num_images"] == 1
    assert "token=" not in json.dumps(body)


@pytest.mark.parametrize("name", names("video_*.json"))
def test_a_video_has_81_frames_at_16_a_second_and_is_not_one_colour(run: Run, name: str) -> None:
    (stored,) = run.stored(name)
    with av.open(io.BytesIO(stored.body)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt, stream.average_rate) == ("h264", "yuv420p", 16)
        assert container.metadata["digital_source_type"] == DIGITAL_SOURCE_TYPE
        assert container.metadata["prompt"].startswith("a lighthouse")
    assert stored.body.index(b"moov") < stored.body.index(b"mdat")
    frames = frames_of(run, name)
    assert frames.shape == (81, 80, 48, 3)
    assert frames.std() > 1


def test_an_image_job_makes_a_real_png(run: Run) -> None:
    (picture,) = run.pictures("image_fast")
    assert picture.format == "PNG"
    assert picture.text["prompt"].startswith("a lighthouse")


def test_the_seed_of_a_message_is_honoured_and_another_seed_is_another_video(run: Run) -> None:
    assert run.last("video_fast_seed")["metadata"]["seed"] == payload("video_fast_seed")["config"]["seed"]
    assert not np.array_equal(frames_of(run, "video_fast_seed"), frames_of(run, "video_fast"))
