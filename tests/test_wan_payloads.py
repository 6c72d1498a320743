"""The producer's own WAN messages, byte for byte, from a Redis list to stored videos and one callback each."""

from __future__ import annotations

import io

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
MODES = {"video_fast_ref_both": "both", "video_fast_ref_single": "single", "image_fast_ref": "single"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Run]:
    """All messages in the warm engine, and one of them again as a subprocess."""
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
        warm = run_payloads(directory / "warm", ALL, "wan_queue", server, OURVIDZ_WAN_CKPT_DIR=str(model))
        apart = run_payloads(
            directory / "apart",
            ["video_fast_seed"],
            "wan_queue",
            server,
            OURVIDZ_WAN_CKPT_DIR=str(model),
            OURVIDZ_WAN_RUN_AS="subprocess",
        )
    return warm, apart


def frames_of(run: Run, name: str) -> np.ndarray:
    (stored,) = run.stored(name)
    with av.open(io.BytesIO(stored.body)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.mark.parametrize("name", ALL)
def test_a_message_of_the_producer_completes_with_what_it_asked_for(runs: tuple[Run, Run], name: str) -> None:
    run, _ = runs
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
    assert metadata["reference_mode"] == MODES.get(name, "none")
    assert metadata["reference_applied"] is (name in MODES)


@pytest.mark.parametrize("name", names("video_*.json"))
def test_a_video_has_81_frames_at_16_a_second_and_is_not_one_colour(runs: tuple[Run, Run], name: str) -> None:
    (stored,) = runs[0].stored(name)
    with av.open(io.BytesIO(stored.body)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt, stream.average_rate) == ("h264", "yuv420p", 16)
        assert container.metadata["digital_source_type"] == DIGITAL_SOURCE_TYPE
        assert container.metadata["prompt"].startswith("a lighthouse")
        assert sum(1 for _ in container.decode(video=0)) == 81
    assert stored.body.index(b"moov") < stored.body.index(b"mdat")
    assert frames_of(runs[0], name).std() > 1


def test_an_image_job_makes_a_real_png(runs: tuple[Run, Run]) -> None:
    (picture,) = runs[0].pictures("image_fast")
    assert picture.format == "PNG"
    assert picture.text["prompt"].startswith("a lighthouse")


def test_the_seed_of_a_message_is_honoured_and_another_seed_is_another_video(runs: tuple[Run, Run]) -> None:
    run, _ = runs
    assert run.last("video_fast_seed")["metadata"]["seed"] == payload("video_fast_seed")["config"]["seed"]
    assert not np.array_equal(frames_of(run, "video_fast_seed"), frames_of(run, "video_fast"))


def test_the_warm_engine_and_a_subprocess_make_the_same_bytes(runs: tuple[Run, Run]) -> None:
    warm, apart = runs
    assert warm.stored("video_fast_seed")[0].body == apart.stored("video_fast_seed")[0].body
