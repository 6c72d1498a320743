"""Messages of the real producer, taken from their bytes to stored files and the callback's facts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ourvidz_wan import plugin
from ourvidz_wan.video import read_video

from ourvidz_core.testing.host import PluginHost, plugin_module
from ourvidz_core.wire.callbacks import JobStatus

EXAMPLES = Path(__file__).parents[3] / "examples" / "payloads"
PAYLOADS = sorted(path for path in EXAMPLES.glob("*.json") if path.name.startswith(("image_", "video_")))
#: What each message's reference must have led to.
METHODS = {
    "image_fast_ref": ("single", "image_to_image"),
    "video_fast_ref_single": ("single", "resembling_first_frame"),
    "video_fast_ref_both": ("both", "pinned_frames"),
}


@pytest.fixture
def host(tmp_path, model_dir, monkeypatch, pictures):
    monkeypatch.setenv("OURVIDZ_WAN_CKPT_DIR", str(model_dir))
    with PluginHost(tmp_path, plugin_module(plugin, distribution="ourvidz-wan"), references=urls_of(pictures)) as host:
        yield host


def urls_of(pictures):
    """Every URL of the example messages, with a picture behind it."""
    found = {}
    for path in PAYLOADS:
        message = json.loads(path.read_text("utf-8"))
        for value in (*message["config"].values(), *message["metadata"].values()):
            if isinstance(value, str) and value.startswith("https://"):
                found[value] = pictures["fire" if "end" in value else "lake"]
    return found


@pytest.mark.parametrize("path", PAYLOADS, ids=lambda path: path.stem)
def test_a_message_of_the_real_producer_becomes_the_right_file(path, host):
    message = json.loads(path.read_text("utf-8"))
    outcome = host.run(message)
    callback = outcome.callback
    assert callback.status is JobStatus.COMPLETED, callback.error_message
    is_video = message["type"].startswith("video")
    mode, method = METHODS.get(path.stem, ("none", None))

    assert callback.assets == (f"{message['user_id']}/{message['id']}_0.{'mp4' if is_video else 'png'}",)
    stored = host.assets_dir / message["bucket"] / callback.assets[0]
    facts = callback.metadata
    assert facts["wan_task"] == "t2v-1.3B"
    assert facts["frame_num"] == (81 if is_video else 1)
    assert facts["requested_frame_num"] == message["config"]["frame_num"]
    assert facts["steps"] == message["config"]["sample_steps"]
    assert facts["reference_mode"] == mode
    assert facts["reference_applied"] is (method is not None)
    assert facts.get("reference_method") == method
    assert facts["num_images"] == 1
    if "seed" in message["config"]:
        assert facts["seed"] == message["config"]["seed"]
    if is_video:
        assert read_video(stored).shape == (81, 80, 48, 3)
    else:
        assert stored.read_bytes().startswith(b"\x89PNG")
    assert "token=" not in json.dumps(callback.to_json())


def test_seeds_are_honoured_to_the_byte(host):
    message = json.loads((EXAMPLES / "image_fast.json").read_text("utf-8"))

    def made(job_id, seed):
        outcome = host.run({**message, "id": job_id, "config": {**message["config"], "seed": seed}})
        return (host.assets_dir / message["bucket"] / outcome.callback.assets[0]).read_bytes()

    assert made("a", 7) == made("b", 7)
    assert made("a", 7) != made("c", 8)


def test_a_reference_that_cannot_be_fetched_fails_the_job(tmp_path, model_dir, monkeypatch):
    from ourvidz_core.errors import ReferenceUnavailable

    monkeypatch.setenv("OURVIDZ_WAN_CKPT_DIR", str(model_dir))
    message = json.loads((EXAMPLES / "video_fast_ref_single.json").read_text("utf-8"))
    url = message["metadata"]["reference_image_url"]
    gone = {url: ReferenceUnavailable("the reference is gone")}
    with PluginHost(tmp_path, plugin_module(plugin, distribution="ourvidz-wan"), references=gone) as host:
        callback = host.run(message).callback
    assert callback.status is JobStatus.FAILED
    assert callback.error_message == "the reference is gone"
    assert callback.metadata["wan_task"] == "t2v-1.3B"
