"""What a message means to the enhanced types: what it means to WAN, and one switch more."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import attrs
import pytest
from ourvidz_wan import plugin as wan_plugin
from ourvidz_wan.config import WanConfig
from ourvidz_wan.job_types import JOB_TYPES as WAN_JOB_TYPES
from ourvidz_wan_enhanced import plugin
from ourvidz_wan_enhanced.job_types import JOB_TYPES, EnhancedConfig

from ourvidz_core.engine.models import ModelCache
from ourvidz_core.engine.protocol import decode_job, encode_job
from ourvidz_core.errors import PayloadError
from ourvidz_core.testing.host import PluginHost, plugin_module
from ourvidz_core.wire.jobs import Reference, References
from ourvidz_core.wire.payloads import Payload, structure_payload

EXAMPLES = Path(__file__).parents[3] / "examples" / "payloads"
TYPES = {job_type.name: job_type for job_type in JOB_TYPES}
WAN_TYPES = {job_type.name: job_type for job_type in WAN_JOB_TYPES}


def parse(job_type="video7b_fast_enhanced", metadata=None, **config):
    payload = Payload(
        id="job-1", type=job_type, prompt="a cat", user_id="user-1", config=config, metadata=metadata or {}
    )
    return plugin.parse_job(TYPES[job_type], payload)


def test_the_plugin_imports_nothing_heavy():
    program = """
        import sys
        import ourvidz_wan_enhanced.plugin, ourvidz_wan_enhanced.cli
        heavy = {"torch", "diffusers", "transformers", "openai", "av", "PIL", "numpy"} & set(sys.modules)
        sys.exit(", ".join(sorted(heavy)) or 0)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True, timeout=60)


@pytest.mark.parametrize(
    ("name", "steps", "scale", "frames", "megabytes", "seconds"),
    [
        ("image7b_fast_enhanced", 25, 6.5, 1, 20, 85),
        ("image7b_high_enhanced", 50, 7.5, 1, 20, 100),
        ("video7b_fast_enhanced", 25, 6.5, 81, 100, 195),
        ("video7b_high_enhanced", 50, 7.5, 81, 100, 240),
    ],
)
def test_the_types_are_those_of_the_specification(name, steps, scale, frames, megabytes, seconds):
    job_type = TYPES[name]
    assert (job_type.queue, job_type.bucket) == ("wan_queue", name)
    assert (job_type.max_asset_mb, job_type.expected_seconds) == (megabytes, seconds)
    preset = job_type.preset
    assert (preset.sample_steps, preset.sample_guide_scale, preset.frame_num) == (steps, scale, frames)
    assert preset.enhance_prompt is True


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*7b*.json")), ids=lambda path: path.stem)
def test_the_producers_messages_are_understood_whole(path):
    payload = structure_payload(json.loads(path.read_text("utf-8")))
    job = plugin.parse_job(TYPES[payload.type], payload)
    assert job.config.enhance_prompt is True
    assert job.ignored_config == {}
    assert job.expected_seconds == payload.config["expected_time"]


@pytest.mark.parametrize(
    ("config", "is_wanted"),
    [
        ({}, True),
        ({"enhance_prompt": True}, True),
        ({"enhance_prompt": None}, True),
        ({"enhance_prompt": False}, False),
    ],
    ids=["absent", "true", "null", "false"],
)
def test_the_switch_is_obeyed_and_so_never_ignored(config, is_wanted):
    job = parse(**config)
    assert job.config.enhance_prompt is is_wanted
    assert job.ignored_config == {}


def test_all_faults_are_told_at_once():
    with pytest.raises(PayloadError) as raised:
        parse(enhance_prompt="yes", sample_steps=0)
    assert {fault.path for fault in raised.value.faults} == {"$.config.enhance_prompt", "$.config.sample_steps"}


def test_a_job_travels_to_the_engine_and_back(tmp_path):
    with PluginHost(tmp_path, plugin_module(plugin, distribution="ourvidz-wan-enhanced")) as host:
        job = parse(enhance_prompt=False, sample_solver="dpm++")
        body = json.loads(json.dumps(encode_job(job)))
        assert decode_job(body, host.registry) == job


REFERENCE_MESSAGES = {
    "none": {},
    "single": {"image": "https://a.test/1"},
    "single in metadata": {"metadata": {"reference_image_url": "https://a.test/1"}},
    "start": {"first_frame": "https://a.test/1"},
    "end": {"last_frame": "https://a.test/2"},
    "both": {"first_frame": "https://a.test/1", "last_frame": "https://a.test/2"},
    "start beats single": {"image": "https://a.test/3", "first_frame": "https://a.test/1"},
    "strength": {"image": "https://a.test/1", "reference_strength": 0.4},
}


@pytest.mark.parametrize("config", REFERENCE_MESSAGES.values(), ids=REFERENCE_MESSAGES.keys())
@pytest.mark.parametrize("quality", ["fast", "high"])
def test_references_are_parsed_as_on_the_plain_types(config, quality):
    enhanced, plain = f"video7b_{quality}_enhanced", f"video_{quality}"
    job = parse(enhanced, seed=3, **config)
    metadata = config.get("metadata", {})
    rest = {key: value for key, value in config.items() if key != "metadata"}
    payload = Payload(
        id="job-1", type=plain, prompt="a cat", user_id="user-1", config={**rest, "seed": 3}, metadata=metadata
    )
    expected = wan_plugin.parse_job(WAN_TYPES[plain], payload)
    wan_fields = {field.name: getattr(job.config, field.name) for field in attrs.fields(WanConfig)}
    assert attrs.evolve(job, job_type=plain, config=WanConfig(**wan_fields)) == expected


@pytest.mark.parametrize(
    "roles", [(), ("single",), ("start",), ("end",), ("start", "end")], ids=["none", "single", "start", "end", "both"]
)
def test_references_run_as_on_the_plain_types(roles, context_of, pictures, qwen_dir):
    """One code path: the same job without enhancement makes the same frames, and with it the same conditioning."""
    found = dict(zip(roles, pictures.values(), strict=False))
    references = References(
        **{role: Reference(url=f"https://a.test/{role}", path=path) for role, path in found.items()}
    )
    quick = {"sample_steps": 2, "frame_num": 9, "seed": 3}
    payload = Payload(
        id="job-1", type="video_fast", prompt="a lighthouse on a rocky coast at sunset", user_id="u", config=quick
    )
    plain = attrs.evolve(wan_plugin.parse_job(WAN_TYPES["video_fast"], payload), references=references)
    enhanced = attrs.evolve(plugin.parse_job(TYPES["video7b_fast_enhanced"], payload), references=references)
    off = attrs.evolve(enhanced, config=attrs.evolve(enhanced.config, enhance_prompt=False))
    assert isinstance(enhanced.config, EnhancedConfig)
    runs, models = {}, ModelCache()
    of_the_file = ("--save_file=", "--metadata=")
    for name, hooks, job in (("plain", wan_plugin, plain), ("off", plugin, off), ("on", plugin, enhanced)):
        context = context_of(model=qwen_dir, models=models)
        prepared = hooks.prepare_job(job, context)
        command = hooks.build_command(prepared, context)
        generation = hooks.generate(prepared, command, context)
        runs[name] = (prepared, [part for part in command.argv if not part.startswith(of_the_file)], generation)
    from ourvidz_wan.video import read_video

    frames = {name: read_video(generation.finish()[0].path) for name, (_, _, generation) in runs.items()}
    assert (frames["plain"] == frames["off"]).all()
    assert runs["plain"][1] == runs["off"][1]
    assert dict(runs["plain"][2].facts) == dict(runs["off"][2].facts) == dict(runs["on"][2].facts)
    assert [part for part in runs["plain"][1] if "--prompt" not in part] == [
        part for part in runs["on"][1] if "--prompt" not in part
    ]
    assert runs["on"][0].facts["enhancement"] == "applied"
    assert not (frames["plain"] == frames["on"]).all()
