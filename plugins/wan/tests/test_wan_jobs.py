"""What a WAN payload means, row by row of the contract."""

from __future__ import annotations

import json
from pathlib import Path

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ourvidz_wan.config import Solver, dimensions_of, frames_of
from ourvidz_wan.job_types import JOB_TYPES
from ourvidz_wan.jobs import parse_wan_job

from ourvidz_core.engine.tiers import Tier
from ourvidz_core.errors import PayloadError
from ourvidz_core.wire.job_types import ContentType, Quality
from ourvidz_core.wire.payloads import structure_payload

TYPES = {job_type.name: job_type for job_type in JOB_TYPES}
EXAMPLES = Path(__file__).parents[3] / "examples" / "payloads"


def payload_of(job_type="video_fast", config=None, metadata=None, **fields):
    return structure_payload(
        {
            "id": "job-1",
            "type": job_type,
            "prompt": "a lighthouse",
            "user_id": "user-1",
            "config": config or {},
            "metadata": metadata or {},
            **fields,
        }
    )


def parse(job_type="video_fast", config=None, metadata=None, **fields):
    return parse_wan_job(TYPES[job_type], payload_of(job_type, config, metadata, **fields))


@pytest.mark.parametrize(
    ("name", "content_type", "quality", "steps", "guidance", "frames", "seconds", "limit_mb"),
    [
        ("image_fast", ContentType.IMAGE, Quality.FAST, 25, 6.5, 1, 25, 5),
        ("image_high", ContentType.IMAGE, Quality.HIGH, 50, 7.5, 1, 40, 10),
        ("video_fast", ContentType.VIDEO, Quality.FAST, 25, 6.5, 81, 135, 50),
        ("video_high", ContentType.VIDEO, Quality.HIGH, 50, 7.5, 81, 180, 200),
    ],
    ids=list(TYPES),
)
def test_the_job_types_are_those_of_the_specification(
    name, content_type, quality, steps, guidance, frames, seconds, limit_mb
):
    job_type = TYPES[name]
    assert (job_type.queue, job_type.bucket) == ("wan_queue", name)
    assert (job_type.content_type, job_type.quality) == (content_type, quality)
    assert (job_type.expected_seconds, job_type.max_asset_mb) == (seconds, limit_mb)
    config = parse(name).config
    assert (config.sample_steps, config.sample_guide_scale, config.frame_num) == (steps, guidance, frames)
    assert (config.size, config.sample_solver, config.sample_shift) == ("480*832", Solver.UNIPC, 5.0)


URLS = {"single": "https://a.test/single.png", "start": "https://a.test/start.png", "end": "https://a.test/end.png"}
CONFIG_KEYS = {"single": "image", "start": "first_frame", "end": "last_frame"}
METADATA_KEYS = {"single": "reference_image_url", "start": "start_reference_url", "end": "end_reference_url"}
MODES = {
    (): "none",
    ("single",): "single",
    ("start",): "start",
    ("end",): "end",
    ("single", "start"): "start",
    ("single", "end"): "end",
    ("start", "end"): "both",
    ("single", "start", "end"): "both",
}


@pytest.mark.parametrize("where", ["config", "metadata"])
@pytest.mark.parametrize(("given_roles", "mode"), MODES.items(), ids=["+".join(roles) or "none" for roles in MODES])
def test_each_combination_of_references_has_its_mode(given_roles, mode, where):
    keys = {"config": CONFIG_KEYS, "metadata": METADATA_KEYS}[where]
    job = parse(**{where: {keys[role]: URLS[role] for role in given_roles}})
    assert job.reference_mode == mode
    used = {"none": (), "single": ("single",), "start": ("start",), "end": ("end",), "both": ("start", "end")}[mode]
    assert {role: reference.url for role, reference in job.references} == {role: URLS[role] for role in used}


@pytest.mark.parametrize("role", URLS)
def test_the_config_comes_before_the_metadata(role):
    job = parse(config={CONFIG_KEYS[role]: URLS[role]}, metadata={METADATA_KEYS[role]: "https://a.test/other.png"})
    assert [reference.url for _, reference in job.references] == [URLS[role]]


@pytest.mark.parametrize("nothing", [None, ""])
@pytest.mark.parametrize("role", URLS)
def test_an_empty_reference_in_the_config_leaves_it_to_the_metadata(role, nothing):
    job = parse(config={CONFIG_KEYS[role]: nothing}, metadata={METADATA_KEYS[role]: URLS[role]})
    assert [reference.url for _, reference in job.references] == [URLS[role]]


def test_a_reference_in_sdxls_place_is_none_to_wan_and_said_to_be_ignored():
    job = parse(config={"reference_image_url": URLS["single"] + "?token=secret"})
    assert job.reference_mode == "none"
    assert job.ignored_config == {"reference_image_url": URLS["single"]}


@pytest.mark.parametrize("roles", [("start",), ("end",), ("start", "end")], ids="+".join)
@pytest.mark.parametrize("where", ["config", "metadata"])
def test_a_strength_means_nothing_to_pinned_frames_wherever_it_stands(roles, where):
    urls = {METADATA_KEYS[role]: URLS[role] for role in roles}
    given = {"metadata": urls, "config": {}}
    given[where] = {**given[where], "reference_strength": 0.5}
    assert parse(**given).ignored_config == {"reference_strength": 0.5}
    assert parse("image_fast", **given).ignored_config == {}


@pytest.mark.parametrize(("requested", "made"), [(83, 81), (81, 81), (84, 81), (85, 85), (5, 5), (8, 5)])
def test_frames_become_4n_plus_1_and_the_request_is_reported(requested, made):
    job = parse(config={"frame_num": requested})
    assert job.config.frame_num == made
    assert job.facts["requested_frame_num"] == requested


def test_an_image_job_makes_one_frame_whatever_is_asked():
    job = parse("image_fast", config={"frame_num": 83})
    assert job.config.frame_num == 1
    assert job.ignored_config == {"frame_num": 83}


def test_more_images_are_recorded_and_not_made():
    job = parse("image_fast", config={"num_images": 3})
    assert job.asset_count == 1
    assert job.ignored_config == {"num_images": 3}


@pytest.mark.parametrize(
    ("config", "ignored"),
    [
        ({"task": "t2v-14B"}, {"task": "t2v-14B"}),
        ({"task": "t2v-1.3B"}, {}),
        ({"enhance_prompt": True}, {"enhance_prompt": True}),
        ({"enhance_prompt": False}, {}),
        ({"num_images": True}, {"num_images": True}),
        ({"reference_type": "style"}, {"reference_type": "style"}),
        ({"something_new": {"a": 1}}, {"something_new": {"a": 1}}),
        ({"something_empty": None}, {}),
        ({"reference_strength": 0.5}, {"reference_strength": 0.5}),
        ({"reference_strength": 0.5, "first_frame": URLS["start"]}, {"reference_strength": 0.5}),
        ({"reference_strength": 0.5, "image": URLS["single"]}, {}),
    ],
    ids=str,
)
def test_what_is_not_obeyed_is_said(config, ignored):
    assert parse(config=config).ignored_config == ignored


def test_a_reference_that_counts_is_not_listed_as_ignored():
    config = {CONFIG_KEYS[role]: url for role, url in URLS.items()} | {"reference_image_url": URLS["single"]}
    assert parse(config=config, metadata={"reference_image_url": URLS["single"]}).ignored_config == {}


def test_what_the_config_says_is_honoured():
    config = {
        "size": "832*480",
        "sample_steps": 30,
        "sample_guide_scale": 7,
        "sample_solver": "dpm++",
        "sample_shift": 3,
        "tier": "fast",
        "seed": 0,
    }
    job = parse(config=config, metadata={"seed": 9})
    assert job.seed == 0
    assert attrs.asdict(job.config) == {
        "size": "832*480",
        "sample_steps": 30,
        "sample_guide_scale": 7.0,
        "sample_solver": Solver.DPM,
        "sample_shift": 3.0,
        "frame_num": 81,
        "reference_strength": 0.85,
        "tier": Tier.FAST,
    }
    assert job.ignored_config == {}


def test_every_fault_is_named_at_once_with_its_path():
    config = {
        "size": "512*512",
        "sample_steps": "25",
        "sample_guide_scale": -1,
        "sample_solver": "euler",
        "sample_shift": True,
        "tier": "quick",
        "frame_num": 3,
        "seed": -4,
        "first_frame": 7,
        "last_frame": URLS["end"],
        "reference_strength": 0.05,
    }
    with pytest.raises(PayloadError) as refusal:
        parse(config=config)
    assert {fault.path for fault in refusal.value.faults} == {f"$.config.{key}" for key in config} - {
        "$.config.last_frame"
    }


@pytest.mark.parametrize("strength", [0.1, 0.5, 1, 1.0])
def test_strength_is_taken_from_the_config_then_from_the_metadata(strength):
    assert parse(config={"image": URLS["single"], "reference_strength": strength}).config.reference_strength == strength
    job = parse(metadata={"reference_image_url": URLS["single"], "reference_strength": strength})
    assert job.config.reference_strength == strength


@pytest.mark.parametrize("strength", [0, 0.09, 1.01, -1, "0.5", True])
def test_a_strength_outside_its_range_is_a_fault(strength):
    with pytest.raises(PayloadError, match="reference_strength"):
        parse(metadata={"reference_image_url": URLS["single"], "reference_strength": strength})


def test_a_strength_that_leaked_into_a_job_without_reference_harms_nobody():
    assert parse(metadata={"reference_strength": 0}).reference_mode == "none"


@pytest.mark.parametrize("reference", URLS.values())
def test_parsing_touches_no_network(reference, monkeypatch):
    import socket

    def refuse(*_: object) -> None:
        raise AssertionError("a parse opened a socket")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    parse(config={"image": reference})


@given(st.dictionaries(st.text(max_size=12), st.none() | st.booleans() | st.integers() | st.text(max_size=8)))
def test_unknown_keys_never_fail_a_job(extra):
    known = {"size", "sample_steps", "sample_guide_scale", "sample_solver", "sample_shift", "frame_num", "seed"}
    known |= {"image", "first_frame", "last_frame", "reference_image_url", "reference_strength"}
    parse(config={key: value for key, value in extra.items() if key not in known}, metadata={"x": extra})


@given(st.integers(1, 10_000))
def test_frames_are_the_next_lower_4n_plus_1(requested):
    assert frames_of(requested) % 4 == 1
    assert 0 <= requested - frames_of(requested) < 4


def test_a_size_is_width_then_height():
    assert dimensions_of("480*832") == (480, 832)


PAYLOADS = sorted(path for path in EXAMPLES.glob("*.json") if path.name.startswith(("image_", "video_")))


@pytest.mark.parametrize("path", PAYLOADS, ids=lambda path: path.stem)
def test_messages_of_the_real_producer_are_understood(path):
    message = json.loads(path.read_text("utf-8"))
    job = parse_wan_job(TYPES[message["type"]], structure_payload(message))
    assert job.config.frame_num == (81 if message["type"].startswith("video") else 1)
    assert job.facts["requested_frame_num"] == message["config"]["frame_num"]
    assert job.config.sample_steps == message["config"]["sample_steps"]
