"""The schemas say what the worker takes: the two are held together, and where they differ it is written here."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import jsonschema
import pytest
from attrs import field, frozen, validators
from hypothesis import given, settings
from hypothesis import strategies as st

from ourvidz_core.errors import InvalidJobType, PayloadError
from ourvidz_core.plugins.loading import load_registry
from ourvidz_core.plugins.registry import Registry
from ourvidz_core.settings import Settings
from ourvidz_core.testing.host import plugin_module
from ourvidz_core.wire.job_types import JobType
from ourvidz_core.wire.payloads import structure_payload
from ourvidz_core.wire.schemas import message_schema, messages_schema

pytest.importorskip("ourvidz_sdxl")
pytest.importorskip("ourvidz_wan_enhanced")

import ourvidz_sdxl.plugin
import ourvidz_wan.plugin
import ourvidz_wan_enhanced.plugin

ROOT = Path(__file__).parent.parent
MESSAGES = sorted([*ROOT.glob("examples/payloads/*.json"), *ROOT.glob("examples/demo/*.json")])
URL = "https://a.example/x.png"


class Tint(StrEnum):
    RED = "red"
    BLUE = "blue"


@frozen(kw_only=True)
class Corner:
    x: int
    y: int = 0


@frozen(kw_only=True)
class Config:
    """One field for each thing that a schema can say."""

    count: int
    scale: float = 1.0
    tint: Tint = Tint.RED
    is_tiled: bool = False
    name: str | None = None
    moment: datetime | None = None
    corner: Corner = Corner(x=0)
    corners: tuple[Corner, ...] = ()
    names: list[str] = field(factory=list)
    tags: set[str] = field(factory=set)
    weights: dict[str, float] = field(factory=dict)
    anything: Any = None
    steps: int = field(default=1, validator=[validators.ge(1), validators.le(25)])
    strength: float = field(default=0.5, validator=[validators.gt(0), validators.lt(1)])
    mode: str = field(default="a", validator=validators.in_(["a", "b"]))
    code: str = field(default="ab", validator=[validators.min_len(2), validators.max_len(3)])
    word: str = field(default="aa", validator=validators.matches_re("a+"))
    limit: int | None = field(default=None, validator=validators.optional(validators.ge(3)))


@frozen(kw_only=True)
class OddConfig:
    """What a schema can say and the worker's converter takes from others."""

    noted: Annotated[int, "a note"] = 0
    literal: Literal["a", "b"] = "a"
    free: str = field(default="", metadata={"description": "Said of it", "json_schema": {"maxLength": 3}})


class Acme:
    """A plugin whose one job type has a field for each kind of value."""

    from ourvidz_core import hookimpl

    @hookimpl
    def register_job_types(self) -> list[JobType]:
        return [
            JobType(name="acme", queue="q", content_type="image", preset=Config(count=4), description="all kinds"),
        ]


@pytest.fixture(scope="module")
def registry() -> Registry:
    """Our own three plugins, and one more."""
    modules = {
        "ourvidz-sdxl": ourvidz_sdxl.plugin,
        "ourvidz-wan": ourvidz_wan.plugin,
        "ourvidz-wan-enhanced": ourvidz_wan_enhanced.plugin,
        "acme": Acme(),
    }
    return load_registry(Settings(), [plugin_module(module, distribution=name) for name, module in modules.items()])


def _whole_pattern(validator: object, pattern: str, instance: object, schema: object) -> object:
    """As ECMA-262 has it, where $ is the end of the text; to Python it is also before a last line feed."""
    if isinstance(instance, str) and not re.search(re.sub(r"\$$", r"\\Z", pattern), instance):
        yield jsonschema.ValidationError(f"{instance!r} does not match {pattern!r}")


Validator = jsonschema.validators.extend(jsonschema.Draft202012Validator, {"pattern": _whole_pattern})


@pytest.fixture(scope="module")
def whole(registry: Registry) -> Validator:
    return Validator(messages_schema(registry.job_types))


@pytest.fixture(scope="module")
def takes(registry: Registry) -> tuple[Callable[[Mapping[str, Any]], bool], Callable[[Mapping[str, Any]], bool]]:
    """Whether the schema takes a message, and whether a worker does."""
    of_type = {job_type.name: Validator(message_schema(job_type)) for job_type in registry.job_types}

    def worker_takes(message: Mapping[str, Any]) -> bool:
        try:
            payload = structure_payload(message)
            registry.get(payload.type).parse_job(payload)
        except PayloadError:
            return False
        return True

    return lambda message: of_type[message["type"]].is_valid(message), worker_takes


def message(job_type: str = "acme", **changes: object) -> dict[str, Any]:
    return {"id": "job-1", "type": job_type, "prompt": "a toy", "user_id": "user-1", **changes}


# -- the document


def test_the_schema_is_one_and_its_types_are_those_of_the_plugins(registry: Registry) -> None:
    schema = messages_schema(registry.job_types)

    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert set(schema["$defs"]) == {job_type.name for job_type in registry.job_types}
    assert len(schema["$defs"]) == 11
    assert json.loads(json.dumps(schema)) == schema


@pytest.mark.parametrize("path", MESSAGES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_producers_own_messages_are_valid(whole: Validator, path: Path) -> None:
    assert list(whole.iter_errors(json.loads(path.read_text("utf-8")))) == []


def test_what_is_of_no_type_or_wrong_is_not_valid(whole: Validator) -> None:
    assert whole.is_valid(message())
    assert not whole.is_valid(message("nobody"))
    assert not whole.is_valid(message(config={"count": "4"}))
    assert not whole.is_valid([])


def test_a_job_types_own_sample_is_valid(registry: Registry, takes: tuple) -> None:
    schema_takes, _ = takes
    samples = [message(job_type.name, **job_type.sample) for job_type in registry.job_types]

    assert [sample["type"] for sample in samples if not schema_takes(sample)] == []


def test_a_preset_is_the_default_of_its_type(registry: Registry) -> None:
    config = {
        name: message_schema(registry.get(name).job_type)["properties"]["config"]["properties"]
        for name in ("sdxl_image_fast", "sdxl_image_high", "video_high", "acme")
    }

    assert config["sdxl_image_fast"]["num_inference_steps"]["default"] == 15
    assert config["sdxl_image_high"]["num_inference_steps"]["default"] == 25
    assert config["video_high"]["sample_guide_scale"]["default"] == 7.5
    assert config["acme"]["tint"] == {"enum": ["red", "blue", None], "default": "red"}
    assert config["acme"]["limit"] == {"type": ["integer", "null"], "minimum": 3}
    assert config["sdxl_image_fast"]["num_images"]["enum"] == [1, 3, 6, None]
    assert all("description" in schema for schema in config["sdxl_image_fast"].values())


def test_a_field_may_say_what_its_type_cannot() -> None:
    job_type = JobType(name="odd", queue="q", content_type="image", preset=OddConfig())
    properties = message_schema(job_type)["properties"]["config"]["properties"]

    assert properties["noted"] == {"type": ["integer", "null"], "default": 0}
    assert properties["literal"] == {"enum": ["a", "b", None], "default": "a"}
    assert properties["free"] == {
        "description": "Said of it", "type": ["string", "null"], "maxLength": 3, "default": "",
    }  # fmt: skip


def test_a_field_whose_type_is_known_to_type_checkers_alone_is_told_with_the_cure() -> None:
    @frozen(kw_only=True)
    class Odd:
        moment: NotImportedHere = None  # type: ignore[name-defined]  # noqa: F821

    job_type = JobType(name="odd", queue="q", content_type="image", preset=Odd())

    with pytest.raises(InvalidJobType, match=r"Odd in tests\.test_schemas cannot be found: .*NotImportedHere"):
        messages_schema([job_type])


@pytest.mark.parametrize("keys", ["config_keys", "metadata_keys"])
def test_keys_are_declared_by_a_class(keys: str) -> None:
    with pytest.raises(TypeError, match=f"{keys} must be an attrs class"):
        JobType(name="odd", queue="q", content_type="image", **{keys: Config(count=1)})


# -- the schema and the worker

#: Values of every kind, some of which fit some place. No whole floats, and no empty text: see below.
VALUES = st.sampled_from(
    [
        None, True, False, 0, 1, 3, 4, 5, 6, 15, 20, 21, 25, 26, 83, 100, 101, 121, 122, 511, 512, 520, 1030, 2048,
        2056, -1, 10**6, 2**63 - 1, 2**63, 0.05, 0.1, 0.5, 0.85, 2.5, 6.5, -0.5, "a", "b", "ab", "aa", "aab", "abcd",
        "red", "x", "unipc", "dpm++", "style", "480*832", "1024*1024", URL, "2025-07-19T19:00:00Z", [], ["a"], ["a", 1],
        [{"x": 1}], [{"y": 1}], {}, {"x": 1}, {"x": "1"}, {"a": 0.5}, {"x": None}, [None],
    ]
)  # fmt: skip


def keys_of(registry: Registry, job_type: str, place: str) -> list[str]:
    return sorted(message_schema(registry.get(job_type).job_type)["properties"][place]["properties"])


#: Text that is no moment is no fault of the schema, whose formats are notes.
UNCHECKED = {"moment"}
TYPES = ("acme", "sdxl_image_fast", "image_fast", "video_fast", "image7b_high_enhanced", "video7b_fast_enhanced")


@pytest.mark.parametrize("job_type", TYPES)
@pytest.mark.parametrize("place", ["config", "metadata"])
def test_the_schema_takes_what_the_worker_takes_and_nothing_else(
    registry: Registry, takes: tuple, job_type: str, place: str
) -> None:
    schema_takes, worker_takes = takes
    keys = [key for key in keys_of(registry, job_type, place) if key not in UNCHECKED]
    # WAN looks at a strength where there is a reference. A second key of metadata may hide the first.
    reference = {"config": {"image": URL}, "metadata": {"reference_image_url": URL}}[place]
    always = {} if job_type in ("acme", "sdxl_image_fast") else reference

    @settings(max_examples=60, deadline=None)
    @given(st.dictionaries(st.sampled_from([*keys, "unknown"]), VALUES, max_size=2 if place == "config" else 1))
    def hold_together(values: dict[str, Any]) -> None:
        if always and not isinstance(values.get(next(iter(always)), URL), str):
            values = {key: value for key, value in values.items() if key != "reference_strength"}
        sent = message(job_type, **{place: {**always, **values}})
        assert schema_takes(sent) is worker_takes(sent), sent

    hold_together()


@settings(max_examples=80, deadline=None)
@given(
    values=st.dictionaries(
        st.sampled_from(
            ["id", "prompt", "user_id", "config", "metadata", "negative_prompt", "model_variant", "bucket"]
        ),
        VALUES | st.text(max_size=3),
        max_size=2,
    ),
    left_out=st.sampled_from([None, "id", "prompt", "user_id"]),
)
def test_at_the_top_the_two_agree_as_well(takes: tuple, values: dict[str, Any], left_out: str | None) -> None:
    schema_takes, worker_takes = takes
    sent = {key: value for key, value in message("acme", **values).items() if key != left_out}
    assert schema_takes(sent) is worker_takes(sent), sent


@pytest.mark.parametrize(
    ("sent", "schema", "worker"),
    [
        pytest.param(message(config={"count": 3.0}), True, False, id="JSON Schema takes 3.0 for an integer"),
        pytest.param(message(created_at="yesterday"), True, False, id="a format is a note"),
        pytest.param(message("sdxl_image_fast", config={"size": "512*9999"}), True, False, id="a rule of SDXL's own"),
        pytest.param(message("sdxl_image_fast", prompt=" "), True, False, id="SDXL needs a prompt"),
        pytest.param(message("video_fast", config={"frame_num": ""}), False, True, id="empty text is absent to WAN"),
        pytest.param(
            message("video_fast", config={"reference_strength": 7}), False, True, id="a strength without a reference"
        ),
        pytest.param(
            message("sdxl_image_fast", config={"num_images": 3}, metadata={"num_images": 2}),
            False, True, id="metadata is not looked at where config has a value",
        ),
    ],
)  # fmt: skip
def test_where_the_two_differ(takes: tuple, sent: dict[str, Any], schema: bool, worker: bool) -> None:
    schema_takes, worker_takes = takes
    assert (schema_takes(sent), worker_takes(sent)) == (schema, worker)
