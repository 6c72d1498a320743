"""A message becomes typed values, or a PayloadError that says everything that is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from enum import IntEnum, StrEnum
from typing import Any

import pytest
from attrs import field, frozen, validators
from hypothesis import given, settings
from hypothesis import strategies as st

from ourvidz_core.errors import PayloadError
from ourvidz_core.wire.callbacks import Callback, JobStatus
from ourvidz_core.wire.payloads import (
    MAX_MESSAGE_BYTES,
    Payload,
    decode_message,
    job_id_of,
    shown,
    structure,
    structure_payload,
)

JOB = {"id": "job-1", "type": "acme", "prompt": "a toy", "user_id": "user-1"}
TEXT = json.dumps(JOB)


def job(**changes: object) -> dict[str, Any]:
    return {**JOB, **changes}


def faults_in(message: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    with pytest.raises(PayloadError) as caught:
        structure_payload(message)
    return {fault.path: (fault.expected, fault.got) for fault in caught.value.faults}


# -- bytes


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(TEXT.encode(), id="the job itself"),
        pytest.param(json.dumps({"data": TEXT}).encode(), id="data holds the text"),
        pytest.param(json.dumps([TEXT]).encode(), id="an array holds the text"),
        pytest.param(json.dumps(TEXT).encode(), id="the text as a string"),
        pytest.param(json.dumps(json.dumps({"data": TEXT})).encode(), id="a string holds an envelope"),
        pytest.param(b" \n" + TEXT.encode() + b"\n", id="white space around it"),
        pytest.param(b"\xef\xbb\xbf" + TEXT.encode(), id="a byte order mark"),
        pytest.param(TEXT.encode("utf-16"), id="utf-16"),
        pytest.param(TEXT[:-1].encode() + b', "id": "job-1"}', id="a key twice"),
    ],
)
def test_a_job_is_found_in_its_envelope(raw: bytes) -> None:
    assert decode_message(raw) == JOB


def test_of_a_key_that_comes_twice_the_last_counts() -> None:
    assert decode_message(b'{"id": "a", "id": "b"}') == {"id": "b"}


def test_a_job_with_a_type_and_data_of_its_own_is_no_envelope() -> None:
    message = job(data="not JSON at all")

    assert decode_message(json.dumps(message).encode()) == message


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        pytest.param(b"", "not JSON", id="nothing"),
        pytest.param(b"{", "not JSON", id="cut off"),
        pytest.param(b"\xff\xfe\xfd", "not JSON", id="no utf-8"),
        pytest.param(b'{"id": "\xc3\x28"}', "not JSON", id="utf-8 broken inside"),
        pytest.param(b'{"seed": NaN}', "NaN is not a JSON number", id="NaN"),
        pytest.param(b'{"seed": -Infinity}', "-Infinity is not a JSON number", id="infinity"),
        pytest.param(b'{"seed": 1e999}', "more than a double can hold", id="a number beyond doubles"),
        pytest.param(b'{"seed": ' + b"9" * 5000 + b"}", "not JSON", id="5000 digits"),
        pytest.param(b'"\\ud800"', "half a character", id="half a character alone"),
        pytest.param(b'{"prompt": "\\ud83d"}', "half a character", id="half a character inside"),
        pytest.param(b'{"data": "\\ud800"}', "half a character", id="half a character in an envelope"),
        pytest.param(b'"\xed\xa0\x80"', "half a character", id="half a character as bytes"),
        pytest.param(b"[" * 100_000, "nested too deeply", id="100 000 brackets"),
        pytest.param(b'{"a":' * 65 + b"1" + b"}" * 65, "nested too deeply", id="65 objects"),
        pytest.param(b"[]", "a JSON array", id="an empty array"),
        pytest.param(json.dumps([TEXT, TEXT]).encode(), "a JSON array", id="an array of two"),
        pytest.param(b"null", "a JSON null", id="null"),
        pytest.param(b"true", "a JSON boolean", id="true"),
        pytest.param(b"12", "a JSON number", id="a number"),
        pytest.param(b'{"data": "nonsense"}', "not JSON", id="an envelope of nonsense"),
        pytest.param(b'{"data": "[1, 2]"}', "a JSON array", id="an envelope of an array"),
        pytest.param(b" " * (MAX_MESSAGE_BYTES + 1), "1000001 bytes", id="too long"),
    ],
)
def test_what_is_no_message_is_refused_with_the_reason(raw: bytes, reason: str) -> None:
    with pytest.raises(PayloadError, match=reason) as caught:
        decode_message(raw)

    assert len(caught.value.message) < 400


def test_half_characters_that_make_a_whole_one_are_welcome() -> None:
    assert decode_message(b'{"prompt": "\\ud83d\\ude00"}') == {"prompt": "\N{GRINNING FACE}"}


def test_sixty_objects_inside_each_other_are_not_too_deep() -> None:
    assert decode_message(b'{"a":' * 60 + b"1" + b"}" * 60)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=12,
)
MESSAGES = st.dictionaries(
    st.sampled_from(["id", "type", "prompt", "user_id", "config", "metadata", "created_at", "bucket", "new", "extras"]),
    JSON,
)


@given(
    st.binary() | JSON.map(lambda value: json.dumps(value).encode()) | MESSAGES.map(lambda m: json.dumps(m).encode())
)
@settings(max_examples=150, deadline=None)
def test_any_bytes_are_an_object_or_a_payload_error(raw: bytes) -> None:
    try:
        message = decode_message(raw)
    except PayloadError:
        return

    assert isinstance(message, dict)
    callback = Callback(job_id="a", status=JobStatus.FAILED, metadata=message)
    assert json.loads(callback.to_bytes())["metadata"] == message  # it can be reported


@given(MESSAGES)
@settings(max_examples=150, deadline=None)
def test_any_object_is_a_payload_or_a_payload_error(message: dict[str, Any]) -> None:
    try:
        payload = structure_payload(message)
    except PayloadError:
        return

    assert payload.id == message["id"]


@given(
    extras=st.dictionaries(st.text(), JSON),
    config=st.dictionaries(st.text(), JSON),
    metadata=st.dictionaries(st.text(), JSON),
)
@settings(max_examples=100, deadline=None)
def test_keys_that_nobody_knows_are_kept_at_every_level(
    extras: dict[str, Any], config: dict[str, Any], metadata: dict[str, Any]
) -> None:
    known = {
        "id",
        "type",
        "prompt",
        "user_id",
        "config",
        "metadata",
        "created_at",
        "negative_prompt",
        "model_variant",
        "bucket",
    }
    extras = {key: value for key, value in extras.items() if key not in known}

    payload = structure_payload({**extras, **job(config=config, metadata=metadata)})

    assert payload.config is config
    assert payload.metadata is metadata
    assert repr(payload.extras) == repr(extras)  # NaN is not equal to itself


# -- fields


@pytest.mark.parametrize("key", ["id", "type", "prompt", "user_id"])
@pytest.mark.parametrize("absent", ["missing", "null"])
def test_a_key_that_must_be_there_is_named(key: str, absent: str) -> None:
    message = job(**{key: None}) if absent == "null" else {name: value for name, value in JOB.items() if name != key}

    assert faults_in(message) == {f"$.{key}": ("a value", "nothing")}


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        pytest.param("prompt", 3, "a string", id="prompt a number"),
        pytest.param("prompt", ["a"], "a string", id="prompt an array"),
        pytest.param("type", True, "a string", id="type true"),
        pytest.param("config", "fast", "an object", id="config text"),
        pytest.param("config", [], "an object", id="config an array"),
        pytest.param("metadata", 1, "an object", id="metadata a number"),
        pytest.param("created_at", 1752951600, "a date and time as ISO 8601 writes it", id="created_at a number"),
        pytest.param("created_at", "yesterday", "a date and time as ISO 8601 writes it", id="created_at a word"),
        pytest.param("negative_prompt", {}, "a string", id="negative_prompt an object"),
        pytest.param("bucket", 5, "a string", id="bucket a number"),
    ],
)
def test_a_field_of_the_wrong_type_is_named_with_what_it_was(key: str, value: object, expected: str) -> None:
    assert faults_in(job(**{key: value})) == {f"$.{key}": (expected, shown(value))}


def test_all_faults_are_told_at_once() -> None:
    message = job(id="../x", prompt=1, config=[], created_at="soon")

    assert sorted(faults_in(message)) == ["$.config", "$.created_at", "$.id", "$.prompt"]


@pytest.mark.parametrize(
    "wrong",
    [
        "../x",
        "..",
        "a/b",
        "a\0b",
        "",
        " ",
        "a b",
        "x" * 129,
        "x" * 10_000,
        "a\u2215b",
        "-rf",
        "_a",
        "a.b",
        "a\n",
        "\u0661",
    ],
    ids=ascii,
)
@pytest.mark.parametrize("key", ["id", "user_id"])
def test_an_id_that_a_path_could_trip_over_is_refused(key: str, wrong: str) -> None:
    faults = faults_in(job(**{key: wrong}))

    assert list(faults) == [f"$.{key}"]
    assert len(faults[f"$.{key}"][1]) < 120
    assert job_id_of({"id": wrong}) is None


@pytest.mark.parametrize("value", [None, 7, ["a"], {}], ids=repr)
def test_what_is_no_text_is_no_id_to_report_under(value: object) -> None:
    assert job_id_of({"id": value}) is None
    assert job_id_of({}) is None


def test_a_uuid_is_an_id() -> None:
    uuid = "0a1b2c3d-4e5f-4a6b-8c7d-9e0f1a2b3c4d"

    assert structure_payload(job(id=uuid)).id == job_id_of({"id": uuid}) == uuid


def test_nulls_are_absent() -> None:
    payload = structure_payload(job(config=None, metadata=None, created_at=None, bucket=None))

    assert (payload.config, payload.metadata, payload.created_at, payload.bucket) == ({}, {}, None, None)


@pytest.mark.parametrize(
    "written", ["2025-07-19T19:00:00Z", "2025-07-19T19:00:00.000Z", "2025-07-19T21:00:00+02:00", "2025-07-19T19:00:00"]
)
def test_a_moment_is_read_as_utc_unless_it_says_otherwise(written: str) -> None:
    assert structure_payload(job(created_at=written)).created_at == datetime(2025, 7, 19, 19, tzinfo=UTC)


def test_a_key_called_extras_is_a_key_like_any_other() -> None:
    payload = structure_payload(job(extras={"a": 1}, new=[2]))

    assert payload.extras == {"extras": {"a": 1}, "new": [2]}


@pytest.mark.parametrize(
    ("config", "metadata", "found"),
    [
        pytest.param({"seed": 0}, {"seed": 5}, 0, id="zero is a value"),
        pytest.param({"seed": False}, {"seed": 5}, False, id="false is a value"),
        pytest.param({"seed": None}, {"seed": 5}, 5, id="null is absent"),
        pytest.param({"seed": ""}, {"seed": 5}, 5, id="empty text is absent"),
        pytest.param({}, {}, None, id="nowhere"),
    ],
)
def test_the_first_value_that_is_there_counts(config: dict, metadata: dict, found: object) -> None:
    payload = structure_payload(job(config=config, metadata=metadata))

    assert (
        payload.first("config.seed", "metadata.seed") is found or payload.first("config.seed", "metadata.seed") == found
    )


def test_a_path_without_a_dot_is_a_key_of_the_message() -> None:
    payload = structure_payload(job(new="x"))

    assert (payload.get("prompt"), payload.get("new"), payload.get("other")) == ("a toy", "x", None)


# -- classes of plugins


class Tint(StrEnum):
    RED = "red"
    BLUE = "blue"


class Level(IntEnum):
    LOW = 1


@frozen(kw_only=True)
class Corner:
    x: int = 0


@frozen(kw_only=True)
class Config:
    count: int = 1
    scale: float = 1.0
    is_tiled: bool = False
    tint: Tint = Tint.RED
    level: Level = Level.LOW
    corner: Corner = Corner()
    corners: tuple[Corner, ...] = ()
    names: list[str] = field(factory=list)
    weights: dict[str, float] = field(factory=dict)
    mode: str = field(default="a", validator=validators.in_(["a", "b"]))
    steps: int = field(default=1, validator=validators.ge(1))
    even: int = field(default=0)

    @even.validator
    def _is_even(self, _: object, value: int) -> None:
        if value % 2:
            raise ValueError(f"even must be even, not {value}")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        pytest.param({"count": "25"}, "$.c.count: expected an integer, got '25'", id="text for an integer"),
        pytest.param({"count": 3.0}, "$.c.count: expected an integer, got 3.0", id="a float for an integer"),
        pytest.param({"count": True}, "$.c.count: expected an integer, got True", id="true for an integer"),
        pytest.param({"scale": "1"}, "$.c.scale: expected a number, got '1'", id="text for a number"),
        pytest.param({"scale": True}, "$.c.scale: expected a number, got True", id="true for a number"),
        pytest.param({"scale": 10**400}, "$.c.scale: expected a number that a double can hold", id="400 digits"),
        pytest.param({"is_tiled": 1}, "$.c.is_tiled: expected true or false, got 1", id="1 for true"),
        pytest.param({"tint": "green"}, "$.c.tint: expected one of red, blue, got 'green'", id="an unknown word"),
        pytest.param({"tint": []}, "$.c.tint: expected one of red, blue, got []", id="an array for a word"),
        pytest.param({"level": 3}, "$.c.level: expected one of 1, got 3", id="an unknown number"),
        pytest.param({"corner": "x"}, "$.c.corner: expected an object, got 'x'", id="text for an object"),
        pytest.param({"corner": []}, "$.c.corner: expected an object, got []", id="an array for an object"),
        pytest.param({"corner": {"x": "1"}}, "$.c.corner.x: expected an integer, got '1'", id="inside an object"),
        pytest.param({"corners": [{}, {"x": "1"}]}, "$.c.corners[1].x: expected an integer", id="inside an array"),
        pytest.param({"corners": ["x"]}, "$.c.corners[0]: expected an object, got 'x'", id="text in an array"),
        pytest.param({"names": "abc"}, "$.c.names: expected an array, got 'abc'", id="text for an array"),
        pytest.param({"names": {"a": 1}}, "$.c.names: expected an array", id="an object for an array"),
        pytest.param({"weights": [1]}, "$.c.weights: expected an object, got [1]", id="an array for a mapping"),
        pytest.param({"weights": {"a": "b"}}, "$.c.weights.a: expected a number, got 'b'", id="inside a mapping"),
        pytest.param({"mode": "c"}, "$.c.mode: 'mode' must be in ['a', 'b'] (got 'c')", id="a validator's refusal"),
        pytest.param({"steps": 0}, "$.c.steps: 'steps' must be >= 1: 0", id="a bound"),
        pytest.param({"even": 3}, "$.c: even must be even, not 3", id="a plugin's own validator"),
    ],
)
def test_nothing_is_coerced_into_a_plugins_class(values: dict[str, Any], said: str) -> None:
    with pytest.raises(PayloadError) as caught:
        structure(values, Config, path="$.c")

    assert said in caught.value.message
    assert "Attribute(" not in caught.value.message


def test_right_values_are_taken_as_they_are() -> None:
    values = {
        "scale": 2, "tint": "blue", "level": 1, "corner": {"x": 3}, "corners": [{"x": 1}],
        "names": ["a"], "weights": {"a": 1}, "unknown": object(),
    }  # fmt: skip

    config = structure(values, Config)

    assert (config.scale, config.tint, config.level) == (2.0, Tint.BLUE, Level.LOW)
    assert isinstance(config.tint, Tint)
    assert (config.corner, config.corners) == (Corner(x=3), (Corner(x=1),))
    assert (config.names, config.weights) == (["a"], {"a": 1.0})


def test_what_is_shown_of_a_value_is_short_and_on_one_line() -> None:
    assert shown("a\nb\x1b[31m\u202e") == r"'a\nb\x1b[31m\u202e'"
    assert len(shown("x" * 10**6)) < 120


def test_a_payload_can_be_made_by_hand() -> None:
    payload = Payload(id="a", type="t", prompt="", user_id="u", config={"seed": 0})

    assert payload.first("config.seed") == 0
