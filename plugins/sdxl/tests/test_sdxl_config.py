"""What a message means to SDXL: every rule of the contract's rows."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ourvidz_sdxl.config import NegativePromptSource, ReferenceType, Solver, fits_sdxl
from sdxl_support import TYPES, parsed, payload, produced

from ourvidz_core.errors import PayloadError
from ourvidz_core.wire.jobs import ReferenceMode

FAST = TYPES["sdxl_image_fast"].preset
HIGH = TYPES["sdxl_image_high"].preset


@pytest.mark.parametrize(
    ("name", "steps", "guidance", "expected_seconds", "max_asset_mb"),
    [("sdxl_image_fast", 15, 6.0, 30.0, 5.0), ("sdxl_image_high", 25, 7.5, 42.0, 10.0)],
)
def test_job_types_are_those_of_the_specification(
    name: str, steps: int, guidance: float, expected_seconds: float, max_asset_mb: float
) -> None:
    job_type = TYPES[name]
    assert job_type.queue == "sdxl_queue"
    assert job_type.bucket == name
    assert (job_type.preset.num_inference_steps, job_type.preset.guidance_scale) == (steps, guidance)
    assert (job_type.preset.width, job_type.preset.height) == (1024, 1024)
    assert job_type.expected_seconds == expected_seconds
    assert job_type.max_asset_mb == max_asset_mb


def test_message_without_config_runs_the_preset() -> None:
    job = parsed(payload())
    assert job.config == FAST
    assert job.ignored_config == {}
    assert job.asset_count == 1


def test_copied_wan_block_is_ignored_and_listed() -> None:
    job = parsed(produced("sdxl_image_fast"))
    assert (job.config.width, job.config.height) == (1024, 1024)
    assert (job.config.num_inference_steps, job.config.guidance_scale) == (15, 6.0)
    assert job.config.sample_solver is Solver.UNIPC
    assert job.ignored_config == {
        "size": "480*832",
        "sample_steps": 25,
        "sample_guide_scale": 6.5,
        "sample_shift": 5,
    }


def test_value_of_a_wan_block_that_runs_anyway_is_not_called_ignored() -> None:
    job = parsed(produced("sdxl_image_high"))
    assert job.config.guidance_scale == 7.5
    assert job.ignored_config == {"size": "480*832", "sample_steps": 50, "sample_shift": 5}


def test_steps_that_came_with_a_wan_size_are_ignored_though_they_are_in_the_preset_table() -> None:
    job = parsed(payload(config={"size": "832*480", "sample_steps": 25, "sample_guide_scale": 7.5}))
    assert job.config == FAST
    assert job.ignored_config == {"size": "832*480", "sample_steps": 25, "sample_guide_scale": 7.5}


@pytest.mark.parametrize("size", ["1024*1024", "1152*896", "832*1216", "704*1344", "1536*640"])
def test_size_of_sdxl_is_honoured_with_its_steps_and_guidance(size: str) -> None:
    job = parsed(payload(config={"size": size, "sample_steps": 25, "sample_guide_scale": 7.5}))
    assert f"{job.config.width}*{job.config.height}" == size
    assert (job.config.num_inference_steps, job.config.guidance_scale) == (25, 7.5)
    assert job.ignored_config == {}


def test_steps_and_guidance_outside_the_preset_table_are_ignored() -> None:
    job = parsed(payload(config={"size": "1024*1024", "sample_steps": 50, "sample_guide_scale": 6.5}))
    assert job.config == FAST
    assert job.ignored_config == {"sample_steps": 50, "sample_guide_scale": 6.5}


@pytest.mark.parametrize(
    "size", ["13x", "13*7", "1024x1024", "1024*", "*", "-8*8", "512*512", "1000000*8", 1024, ["a"]]
)
def test_malformed_or_impossible_size_is_refused(size: object) -> None:
    with pytest.raises(PayloadError) as refused:
        parsed(payload(config={"size": size}))
    assert [fault.path for fault in refused.value.faults] == ["$.config.size"]


@given(st.integers(0, 3000), st.integers(0, 3000))
def test_fitting_sizes_are_near_the_area_of_sdxl(width: int, height: int) -> None:
    if fits_sdxl(width, height):
        assert width % 8 == height % 8 == 0
        assert 0.88 <= width * height / 1024**2 <= 1.12


def test_explicit_values_win_over_copied_ones() -> None:
    explicit = {"width": 768, "height": 1344, "num_inference_steps": 40, "guidance_scale": 3}
    job = parsed(payload(config={**explicit, "size": "1024*1024", "sample_steps": 25, "sample_guide_scale": 7.5}))
    assert (job.config.width, job.config.height) == (768, 1344)
    assert (job.config.num_inference_steps, job.config.guidance_scale) == (40, 3.0)
    assert job.ignored_config == {"size": "1024*1024", "sample_steps": 25, "sample_guide_scale": 7.5}


def test_explicit_values_win_over_a_wan_block() -> None:
    job = parsed(payload(config={"size": "480*832", "width": 1216, "height": 832}))
    assert (job.config.width, job.config.height) == (1216, 832)
    assert job.ignored_config == {"size": "480*832"}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("width", 1023), ("width", 504), ("width", 2056), ("width", "1024"), ("height", True), ("height", 1024.0),
        ("num_inference_steps", 0), ("num_inference_steps", 101), ("num_inference_steps", 15.5),
        ("guidance_scale", 0.5), ("guidance_scale", 21), ("guidance_scale", "6"), ("guidance_scale", float("inf")),
        ("sample_steps", "25"), ("sample_guide_scale", [6]), ("sample_solver", "euler"), ("sample_solver", 1),
        ("num_images", 2), ("num_images", 0), ("num_images", "3"), ("num_images", True), ("num_images", 3.0),
        ("reference_type", "face"), ("reference_type", 1), ("reference_type", {}),
        ("reference_strength", 0), ("reference_strength", 0.05), ("reference_strength", 1.5),
        ("reference_strength", "0.5"), ("reference_image_url", 7), ("seed", -1), ("seed", "1"),
    ],
)  # fmt: skip
def test_wrong_value_is_refused_with_its_path(key: str, value: object) -> None:
    with pytest.raises(PayloadError) as refused:
        parsed(payload(config={key: value}))
    assert [fault.path for fault in refused.value.faults] == [f"$.config.{key}"]


def test_all_faults_of_a_message_are_told_at_once() -> None:
    with pytest.raises(PayloadError) as refused:
        parsed(
            payload(prompt=" ", config={"num_images": 2, "size": "13*7", "seed": -1}, metadata={"reference_type": "x"})
        )
    paths = {fault.path for fault in refused.value.faults}
    assert paths == {"$.prompt", "$.config.num_images", "$.config.size", "$.config.seed", "$.metadata.reference_type"}


@pytest.mark.parametrize(
    ("config", "metadata", "count"),
    [({}, {}, 1), ({"num_images": 3}, {"num_images": 6}, 3), ({}, {"num_images": 6}, 6), ({"num_images": None}, {}, 1)],
)
def test_image_count_is_the_configs_then_the_metadatas(
    config: dict[str, Any], metadata: dict[str, Any], count: int
) -> None:
    job = parsed(payload(config=config, metadata=metadata))
    assert job.config.num_images == job.asset_count == count


def test_wrong_image_count_in_the_metadata_is_named_there() -> None:
    with pytest.raises(PayloadError, match=r"\$\.metadata\.num_images"):
        parsed(payload(metadata={"num_images": 2}))


@pytest.mark.parametrize(("text", "solver"), [("unipc", Solver.UNIPC), ("dpm++", Solver.DPM), (None, None), ("", None)])
def test_solver_is_that_of_the_message_or_the_checkpoints_own(text: str | None, solver: Solver | None) -> None:
    assert parsed(payload(config={"sample_solver": text})).config.sample_solver is solver


@pytest.mark.parametrize(
    ("config", "metadata", "seed"),
    [({"seed": 42}, {"seed": 7}, 42), ({}, {"seed": 0}, 0), ({"seed": 0}, {"seed": 7}, 0)],
)
def test_seed_is_the_configs_then_the_metadatas(config: dict[str, Any], metadata: dict[str, Any], seed: int) -> None:
    assert parsed(payload(config=config, metadata=metadata)).seed == seed


def test_reference_is_looked_up_in_three_places() -> None:
    places = [
        ("config", "reference_image_url"),
        ("metadata", "reference_image_url"),
        ("metadata", "reference_url"),
    ]
    for index in range(len(places)):
        changes: dict[str, dict[str, str]] = {"config": {}, "metadata": {}}
        for parent, key in places[index:]:
            changes[parent][key] = f"https://images.example.test/{parent}/{key}.png"
        parent, key = places[index]
        job = parsed(payload(**changes))
        assert job.references.single is not None
        assert job.references.single.url == f"https://images.example.test/{parent}/{key}.png"


def test_empty_reference_is_no_reference() -> None:
    job = parsed(payload(config={"reference_image_url": ""}, metadata={"reference_url": None}))
    assert job.reference_mode is ReferenceMode.NONE


def test_reference_of_a_regenerated_image_is_in_its_metadata() -> None:
    job = parsed(produced("sdxl_image_fast_regenerate"))
    assert job.seed == 42
    assert job.reference_mode is ReferenceMode.SINGLE
    assert job.config.reference_type is ReferenceType.COMPOSITION
    assert job.config.reference_strength == 0.7


def test_reference_defaults_are_style_and_half_strength() -> None:
    config = parsed(payload(config={"reference_image_url": "https://images.example.test/r.png"})).config
    assert (config.reference_type, config.reference_strength) == (ReferenceType.STYLE, 0.5)


def test_reference_values_are_the_configs_then_the_metadatas() -> None:
    values = {"reference_type": "character", "reference_strength": 1.0}
    assert parsed(payload(metadata=values)).config.reference_strength == 1.0
    config = parsed(payload(config={"reference_strength": 0.1}, metadata=values)).config
    assert (config.reference_type, config.reference_strength) == (ReferenceType.CHARACTER, 0.1)


@pytest.mark.parametrize(
    ("changes", "text", "source"),
    [
        ({"negative_prompt": "fog", "metadata": {"negative_prompt": "rain"}}, "fog", NegativePromptSource.JOB),
        ({"negative_prompt": " ", "metadata": {"negative_prompt": "rain"}}, "rain", NegativePromptSource.METADATA),
        ({}, None, NegativePromptSource.GENERATED),
    ],
)
def test_negative_prompt_is_the_jobs_then_the_metadatas_then_made(
    changes: dict[str, Any], text: str | None, source: NegativePromptSource
) -> None:
    job = parsed(payload(**changes))
    assert (job.negative_prompt, job.config.negative_prompt_source) == (text, source)


def test_what_means_nothing_to_sdxl_is_ignored_and_listed() -> None:
    meaningless = {
        "sample_shift": 5,
        "frame_num": 83,
        "enhance_prompt": True,
        "content_type": "video",
        "file_extension": "mp4",
        "lora": ["x"],
    }
    assert parsed(payload(config=meaningless)).ignored_config == meaningless


def test_what_is_so_anyway_is_not_listed() -> None:
    config = {"frame_num": 1, "enhance_prompt": False, "content_type": "image", "file_extension": "png", "lora": None}
    assert parsed(payload(config=config)).ignored_config == {}


def test_access_token_of_an_ignored_address_stays_out_of_the_callback() -> None:
    job = parsed(payload(config={"first_frame": "https://storage.example.test/sign/a.png?token=secret"}))
    assert job.ignored_config == {"first_frame": "https://storage.example.test/sign/a.png"}


def test_other_bucket_is_recorded_and_not_obeyed() -> None:
    assert parsed(payload(bucket="sdxl_image_high")).facts == {"requested_bucket": "sdxl_image_high"}
    assert parsed(payload(bucket="sdxl_image_fast")).facts == {}


def test_expected_time_is_kept_where_it_is_one() -> None:
    assert parsed(produced("sdxl_image_high")).expected_seconds == 40.0
    assert parsed(payload(config={"expected_time": "soon"})).expected_seconds is None


@pytest.mark.parametrize(
    "name",
    [
        "sdxl_image_fast", "sdxl_image_fast_n3", "sdxl_image_fast_ref_blob_upload", "sdxl_image_fast_ref_style",
        "sdxl_image_fast_regenerate", "sdxl_image_fast_seed0", "sdxl_image_high",
    ],
)  # fmt: skip
def test_every_message_of_the_producer_is_understood(name: str) -> None:
    message = produced(name)
    job = parsed(message)
    assert job.config.num_images == message.config["num_images"]
    assert job.model_variant == "lustify_sdxl"


def test_seed_zero_is_a_seed() -> None:
    assert parsed(produced("sdxl_image_fast_seed0")).seed == 0


@pytest.mark.parametrize("name", list(TYPES))
def test_sample_of_a_job_type_is_a_message_that_it_understands(name: str) -> None:
    job = parsed(payload(name, **TYPES[name].sample))
    assert job.ignored_config == {}
