"""Messages of the real producer on a host in this process; all of them run in ``tests/test_wan_payloads.py``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ourvidz_wan import plugin

from ourvidz_core.testing.host import PluginHost, plugin_module
from ourvidz_core.wire.callbacks import JobStatus

EXAMPLES = Path(__file__).parents[3] / "examples" / "payloads"


@pytest.fixture
def host(tmp_path, model_dir, monkeypatch):
    monkeypatch.setenv("OURVIDZ_WAN_CKPT_DIR", str(model_dir))
    with PluginHost(tmp_path, plugin_module(plugin, distribution="ourvidz-wan")) as host:
        yield host


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
