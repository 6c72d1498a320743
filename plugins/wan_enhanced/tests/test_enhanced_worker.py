"""The producer's own messages through a real worker process: a real Redis, a real engine, a real storage."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import redis
from click.testing import CliRunner
from ourvidz_wan.video import read_facts as read_video_facts
from ourvidz_wan_enhanced import plugin
from ourvidz_wan_enhanced.cli import enhance
from ourvidz_wan_enhanced.effort import is_work_left

from ourvidz_core.cli.main import COMMAND_GROUP
from ourvidz_core.delivery.embedded import EmbeddedRedis
from ourvidz_core.engine.pictures import read_facts as read_picture_facts
from ourvidz_core.testing.host import PluginHost, plugin_module
from ourvidz_core.testing.servers import SupabaseServer

REPOSITORY = Path(__file__).parents[3]
EXAMPLES = sorted((REPOSITORY / "examples" / "payloads").glob("*7b*.json"))
#: Runs again, in another process, which starts WAN as a subprocess.
AGAIN = next(path.stem for path in EXAMPLES if path.stem.startswith("video7b_fast"))
SERVICE_KEY = "service-key-canary"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Both plugins as pip leaves them, whether or not pip did."""
    directory = tmp_path_factory.mktemp("site")
    for name in ("wan", "wan_enhanced"):
        project = tomllib.loads((REPOSITORY / "plugins" / name / "pyproject.toml").read_text("utf-8"))["project"]
        metadata = directory / f"{project['name'].replace('-', '_')}-0.1.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 0.1.0\n")
        lines = []
        for group, entries in project["entry-points"].items():
            lines += [f"[{group}]", *(f"{key} = {value}" for key, value in entries.items())]
        (metadata / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return directory


@pytest.fixture(scope="module")
def environ(site, wan_dir, qwen_dir, tmp_path_factory):
    paths = [site, REPOSITORY / "plugins" / "wan", REPOSITORY / "plugins" / "wan_enhanced", REPOSITORY]
    state = tmp_path_factory.mktemp("state")
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith(("OURVIDZ_", "SUPABASE_"))},
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "OMP_NUM_THREADS": "1",
        "OURVIDZ_ALLOW_PLUGINS": "ourvidz-wan,ourvidz-wan-enhanced",
        "OURVIDZ_REQUIRE_PLUGINS": "ourvidz-wan,ourvidz-wan-enhanced",
        "OURVIDZ_WAN_CKPT_DIR": str(wan_dir),
        "OURVIDZ_ENHANCER_MODEL": str(qwen_dir),
        "OURVIDZ_DEVICE": "cpu",
        "OURVIDZ_STATE_DIR": str(state / "state"),
        "OURVIDZ_WORK_DIR": str(state / "work"),
        "OURVIDZ_CALLBACK_MIN_AGE_SECONDS": "0",
        "OURVIDZ_CALLBACK_RETRY_SECONDS": "0.05",
        "OURVIDZ_RETRY_DELAY_SECONDS": "0.05",
    }


@pytest.fixture(scope="module")
def messages():
    # Without a seed each id would draw its own; one for all would have the first text remembered.
    read = {path.stem: json.loads(path.read_text("utf-8")) for path in EXAMPLES}
    return {
        name: {**message, "id": name, "config": {**message["config"], "seed": seed, "sample_steps": 2}}
        for seed, (name, message) in enumerate(read.items())
    }


@pytest.fixture(scope="module")
def drained(environ, messages, tmp_path_factory):
    """What a worker reported and stored of the messages, and its log, once it has emptied the queue."""
    server = EmbeddedRedis(tmp_path_factory.mktemp("redis"))
    with redis.Redis.from_url(server.address) as client, SupabaseServer(key=SERVICE_KEY) as supabase:
        for message in messages.values():
            client.lpush("wan_queue", json.dumps(message))
        run = subprocess.run(
            [sys.executable, "-m", "ourvidz_core", "worker", "--drain"],
            env={
                **environ,
                "REDIS_URL": server.address,
                "SUPABASE_URL": supabase.url,
                "SUPABASE_SERVICE_KEY": SERVICE_KEY,
            },
            stderr=subprocess.PIPE,
            timeout=100,
            check=False,
        )
        log = run.stderr.decode()
        assert run.returncode == 0, log
        callbacks = [request.json() for request in supabase.callbacks]
        objects = dict(supabase.objects)
    server.close()
    return {body["job_id"]: body for body in callbacks}, objects, log


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_enhanced_prompt_reaches_the_file_and_the_callback(path, messages, drained, tiny_qwen, tmp_path):
    callbacks, objects, log = drained
    message, body = messages[path.stem], callbacks[path.stem]
    assert body["status"] == "completed", body
    assert body["enhancedPrompt"] == message["prompt"] + tiny_qwen.ADDITION
    facts = body["metadata"]
    assert facts["enhancement"] == "applied"
    assert facts["enhancement_model"] == "tiny-qwen"
    assert facts["enhancement_tokens"] > 10
    assert 0 < facts["enhancement_seconds"] < 20
    assert facts["ignored_config"] == {}
    assert facts["wan_task"] == "t2v-1.3B"
    assert facts["performance_ratio"] > 0
    assert facts["bucket"] == message["bucket"] == path.stem
    (asset,) = body["assets"]
    stored = objects[path.stem, asset]
    is_video = path.stem.startswith("video")
    assert stored.media_type == ("video/mp4" if is_video else "image/png")
    assert facts["frame_num"] == (81 if is_video else 1)
    file = tmp_path / asset.rpartition("/")[2]
    file.write_bytes(stored.body)
    written = (read_video_facts if is_video else read_picture_facts)(file)
    # What wan_generate was told as --prompt, and what its user wrote.
    assert written["prompt"] == body["enhancedPrompt"]
    assert written["original_prompt"] == message["prompt"]
    assert (written["enhancement"], written["enhancement_model"]) == ("applied", "tiny-qwen")
    assert message["prompt"] not in log


def test_another_process_with_wan_as_a_subprocess_makes_the_same_text_and_the_same_file(
    messages, drained, wan_dir, qwen_dir, tmp_path, monkeypatch
):
    callbacks, objects, _ = drained
    first = callbacks[AGAIN]
    monkeypatch.setenv("OURVIDZ_WAN_CKPT_DIR", str(wan_dir))
    monkeypatch.setenv("OURVIDZ_WAN_RUN_AS", "subprocess")
    monkeypatch.setenv("OURVIDZ_ENHANCER_MODEL", str(qwen_dir))
    with PluginHost(tmp_path, plugin_module(plugin, distribution="ourvidz-wan-enhanced")) as host:
        again = host.run(messages[AGAIN]).callback.to_json()
    assert first["enhancedPrompt"] == again["enhancedPrompt"]
    assert [body["metadata"]["enhancement"] for body in (first, again)] == ["applied"] * 2
    assert [body["metadata"]["steps"] for body in (first, again)] == [2, 2]
    assert objects[AGAIN, first["assets"][0]].body == (host.assets_dir / AGAIN / again["assets"][0]).read_bytes()


def test_a_job_that_fails_by_policy_says_so(wan_dir, endless_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("OURVIDZ_WAN_CKPT_DIR", str(wan_dir))
    monkeypatch.setenv("OURVIDZ_ENHANCER_MODEL", str(endless_dir))
    monkeypatch.setenv("OURVIDZ_ENHANCER_POLICY", "fail")
    with PluginHost(tmp_path, plugin_module(plugin, distribution="ourvidz-wan-enhanced")) as host:
        callback = host.run(json.loads(EXAMPLES[0].read_text("utf-8"))).callback.to_json()
    assert callback["status"] == "failed"
    assert callback["metadata"]["error_type"] == "EnhancementFailed"
    assert callback["metadata"]["enhancement"] == "failed (the text did not end within 256 tokens)"
    assert callback["metadata"]["enhancement_model"] == "endless"
    assert "enhancedPrompt" not in callback


def test_the_command_line_shows_what_would_become_of_a_prompt(qwen_dir, tiny_qwen):
    (command,) = entry_points(group=COMMAND_GROUP, name="enhance")
    prompt = "a lighthouse on a rocky coast at sunset"
    result = CliRunner().invoke(command.load(), [prompt, "--json"], env=enhancer(qwen_dir), standalone_mode=False)
    assert not result.return_value, result.output
    shown = json.loads(result.stdout)
    assert (shown["prompt"], shown["enhanced_prompt"]) == (prompt, prompt + tiny_qwen.ADDITION)
    assert shown["enhancement"] == "applied"


def test_the_command_line_shows_why_a_prompt_stays_as_it_is(endless_dir):
    result = CliRunner().invoke(enhance, ["a fox", "--image"], env=enhancer(endless_dir), standalone_mode=False)
    assert result.return_value == 1
    assert "failed (the text did not end within 256 tokens)" in result.output


def enhancer(directory):
    """Settings of the command in this process, which it would end if it left work behind, or found some."""
    deadline = time.monotonic() + 60
    while is_work_left():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return {
        "OURVIDZ_ENHANCER_MODEL": str(directory),
        "OURVIDZ_ENHANCER_DEADLINE_SECONDS": "100",
        "OURVIDZ_DEVICE": "cpu",
    }
