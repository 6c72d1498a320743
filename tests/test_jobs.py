"""Seeds, references and the default way from a payload to a job."""

from __future__ import annotations

import attrs
import pytest
from attrs import frozen
from hypothesis import given
from hypothesis import strategies as st

from ourvidz_core import (
    Command,
    JobType,
    Payload,
    PayloadError,
    ReferenceMode,
    References,
    default_config,
    default_job,
    expected_seconds_of,
    seed_of,
)
from ourvidz_core.wire.job_types import ContentType


@frozen(kw_only=True)
class Brush:
    width: int = 1
    shape: str = "round"


@frozen(kw_only=True)
class Config:
    steps: int = 10
    brush: Brush = Brush()
    quality: ContentType = ContentType.IMAGE
    tags: tuple[str, ...] = ("a",)
    note: str | None = None


ACME = JobType(name="acme", queue="acme_queue", content_type="image", preset=Config(steps=25, brush=Brush(width=3)))


def payload_with(payload: Payload, config: object = None, metadata: object = None) -> Payload:
    return attrs.evolve(payload, config=config or {}, metadata=metadata or {})


# -- seeds


@pytest.mark.parametrize(
    ("config", "metadata", "seed"),
    [
        pytest.param({"seed": 5}, {}, 5, id="config"),
        pytest.param({}, {"seed": 6}, 6, id="metadata"),
        pytest.param({"seed": 5}, {"seed": 6}, 5, id="config before metadata"),
        pytest.param({"seed": 0}, {"seed": 6}, 0, id="zero is a seed"),
        pytest.param({"seed": None}, {"seed": 0}, 0, id="null is none"),
        pytest.param({"seed": 2**63 - 1}, {}, 2**63 - 1, id="the largest"),
    ],
)
def test_a_seed_is_taken_where_it_is(a_payload: Payload, config: dict, metadata: dict, seed: int) -> None:
    assert seed_of(payload_with(a_payload, config, metadata)) == seed


@pytest.mark.parametrize("seed", [-1, 2**63, 1.0, "7", True, [], ""], ids=repr)
@pytest.mark.parametrize("place", ["config", "metadata"])
def test_a_wrong_seed_is_named(a_payload: Payload, place: str, seed: object) -> None:
    with pytest.raises(PayloadError, match=rf"\$\.{place}\.seed: expected an integer from 0"):
        seed_of(attrs.evolve(a_payload, **{place: {"seed": seed}}))


@given(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,40}", fullmatch=True))
def test_a_seed_that_is_drawn_is_the_same_for_the_same_id(job_id: str) -> None:
    payload = Payload(id=job_id, type="acme", prompt="", user_id="u")

    assert 0 <= seed_of(payload) < 2**31
    assert seed_of(payload) == seed_of(attrs.evolve(payload, prompt="another"))


def test_two_ids_draw_two_seeds(a_payload: Payload) -> None:
    assert seed_of(a_payload) != seed_of(attrs.evolve(a_payload, id="job-2"))


# -- references


@pytest.mark.parametrize(
    ("given_urls", "mode"),
    [
        pytest.param({}, ReferenceMode.NONE, id="none"),
        pytest.param({"single": "s"}, ReferenceMode.SINGLE, id="single"),
        pytest.param({"start": "a"}, ReferenceMode.START, id="start"),
        pytest.param({"end": "b"}, ReferenceMode.END, id="end"),
        pytest.param({"start": "a", "end": "b"}, ReferenceMode.BOTH, id="both"),
        pytest.param({"single": "s", "start": "a"}, ReferenceMode.START, id="a start beats a single one"),
        pytest.param({"single": "s", "end": "b"}, ReferenceMode.END, id="an end beats a single one"),
        pytest.param({"single": "s", "start": "a", "end": "b"}, ReferenceMode.BOTH, id="both beat a single one"),
        pytest.param({"single": "s", "start": "", "end": None}, ReferenceMode.SINGLE, id="empty is absent"),
    ],
)
def test_references_make_their_mode(given_urls: dict, mode: ReferenceMode) -> None:
    references = References.choose(**given_urls)

    assert references.mode is mode
    assert (references.single is not None) == (mode is ReferenceMode.SINGLE)


def test_a_references_token_is_not_shown() -> None:
    assert "token" not in repr(References.choose(single="https://a.example/x.png?token=secret"))


# -- the default job


def test_a_config_lies_over_the_preset(a_payload: Payload) -> None:
    config = default_config(
        ACME, {"steps": 30, "tags": ["b", "c"], "quality": "video", "note": None, "size": "480*832"}
    )

    assert config == Config(steps=30, brush=Brush(width=3), tags=("b", "c"), quality=ContentType.VIDEO)
    assert config.quality is ContentType.VIDEO


def test_an_object_inside_a_config_is_taken_as_a_whole() -> None:
    assert default_config(ACME, {"brush": {"shape": "flat"}}).brush == Brush(width=1, shape="flat")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"steps": "30"}, "$.config.steps: expected an integer, got '30'"),
        ({"brush": "flat"}, "$.config.brush: expected an object, got 'flat'"),
        ({"brush": {"width": "1"}}, "$.config.brush.width: expected an integer, got '1'"),
        ({"quality": "sound"}, "$.config.quality: expected one of image, video, got 'sound'"),
        ({"tags": "b"}, "$.config.tags: expected an array, got 'b'"),
    ],
)
def test_a_wrong_config_is_named_by_its_path(values: dict, said: str) -> None:
    with pytest.raises(PayloadError) as caught:
        default_config(ACME, values)

    assert caught.value.message == said


def test_a_default_job_says_what_it_ignores(a_payload: Payload) -> None:
    job = default_job(
        ACME,
        payload_with(
            a_payload,
            {"steps": 30, "size": "480*832", "seed": 4, "expected_time": 12, "unused": None},
            {"reference_image_url": "https://a.example/x.png"},
        ),
    )

    assert job.ignored_config == {"size": "480*832"}
    assert (job.seed, job.expected_seconds, job.reference_mode) == (4, 12.0, ReferenceMode.SINGLE)


@pytest.mark.parametrize(
    ("expected_time", "seconds"),
    [
        (12, 12.0),
        (0.5, 0.5),
        (0, None),
        (-3, None),
        ("12", None),
        (True, None),
        (None, None),
        (10**400, None),
        ([], None),
    ],
    ids=lambda value: repr(value)[:12],
)
def test_an_expectation_counts_where_it_is_a_number_above_0(
    a_payload: Payload, expected_time: object, seconds: float | None
) -> None:
    assert expected_seconds_of(payload_with(a_payload, {"expected_time": expected_time})) == seconds


# -- declarations


def test_a_job_type_is_described_by_what_it_makes() -> None:
    made = JobType(name="acme_clip", queue="acme_queue", content_type="video")

    assert (made.bucket, made.file_extension, made.media_type) == ("acme_clip", "mp4", "video/mp4")


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": "Acme"},
        {"name": ""},
        {"name": "../acme"},
        {"name": 5},
        {"queue": "a b"},
        {"bucket": "x" * 65},
        {"content_type": "sound"},
        {"file_extension": "../png"},
        {"media_type": "png"},
        {"preset": {"steps": 3}},
        {"preset": Config},
        {"vram_gb": -1},
        {"timeout_seconds": 0},
        {"max_asset_mb": 0},
    ],
    ids=repr,
)
def test_a_job_type_that_cannot_work_cannot_be_made(wrong: dict) -> None:
    with pytest.raises((ValueError, TypeError)):
        JobType(**{"name": "acme", "queue": "acme_queue", "content_type": "image", **wrong})


def test_a_command_takes_paths_for_arguments(tmp_path: object) -> None:
    command = Command(argv=["tool", tmp_path / "a.png"], outputs=[tmp_path / "a.png"])

    assert command.argv == ("tool", f"{tmp_path}/a.png")
    assert command.outputs == (tmp_path / "a.png",)


@pytest.mark.parametrize(
    "wrong",
    [
        {"argv": "tool --flag"},
        {"argv": ()},
        {"argv": ("tool", 3)},
        {"argv": ("tool", "a\0b")},
        {"argv": ("tool",), "outputs": "a.png"},
        {"argv": ("tool",), "progress_pattern": "("},
        {"argv": ("tool",), "progress_pattern": "no groups"},
    ],
    ids=repr,
)
def test_a_command_that_cannot_work_cannot_be_made(wrong: dict) -> None:
    with pytest.raises((ValueError, TypeError)):
        Command(**wrong)
