"""The tables of the wire reference, from the classes and schemas that read and write the messages."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import attrs
from ourvidz_sdxl.job_types import JOB_TYPES as SDXL
from ourvidz_wan.job_types import JOB_TYPES as WAN
from ourvidz_wan_enhanced.job_types import JOB_TYPES as ENHANCED

from ourvidz_core.cli.common import table
from ourvidz_core.wire.callbacks import Callback
from ourvidz_core.wire.job_types import ContentType, JobType
from ourvidz_core.wire.schemas import config_properties, message_schema, metadata_properties, schema_of

_SLOT = re.compile(r"(<!-- made from the code: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
_BOUNDS = {
    "minimum": "from {:g}",
    "exclusiveMinimum": "above {:g}",
    "maximum": "to {:g}",
    "exclusiveMaximum": "below {:g}",
}


def fill(page: str) -> str:
    """``page`` with the table of each of its slots made anew."""
    return _SLOT.sub(lambda slot: f"{slot[1]}\n{TABLES[slot[2]]()}\n\n{slot[3]}", page)


def message_table() -> str:
    """The top level of a message; the same for all job types."""
    schema = message_schema(SDXL[0])
    # The type of one job type is a constant; here it stands for all.
    properties = {name: {**inner} for name, inner in schema["properties"].items()}
    del properties["type"]["const"]
    rows = []
    for name, inner in properties.items():
        needed = "yes" if name in schema["required"] else "no"
        rows.append((f"`{name}`", _kind(inner), needed, inner["description"]))
    return table(("field", "type", "needed", "meaning"), rows, markdown=True)


def keys_tables() -> str:
    """What ``config`` and ``metadata`` may hold for the job types of this repository."""
    parts = []
    for job_types in (SDXL, *_by_content(WAN)):
        parts += [_heading(job_types), "", _keys_table("config", map(config_properties, job_types)), ""]
        parts += [_keys_table("metadata", map(metadata_properties, job_types)), ""]
    for job_types, plain in zip(_by_content(ENHANCED), _by_content(WAN), strict=True):
        known = config_properties(plain[0])
        own = [
            {
                name: inner
                for name, inner in config_properties(one).items()
                if _rules(inner) != _rules(known.get(name, {}))
            }
            for one in job_types
        ]
        parts += [_heading(job_types), "", f"As `{plain[0].name}` and `{plain[1].name}`, and:", ""]
        parts += [_keys_table("config", own), ""]
    return "\n".join(parts).rstrip()


def callback_table() -> str:
    """The body of a callback."""
    properties = schema_of(Callback)["properties"]
    rows = [
        (f"`{field.metadata.get('key', field.name)}`", _kind(properties[field.name]), field.metadata["description"])
        for field in attrs.fields(Callback)
    ]
    return table(("field", "type", "meaning"), rows, markdown=True)


TABLES = {"message": message_table, "keys": keys_tables, "callback": callback_table}


def _rules(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in schema.items() if key != "default"}


def _heading(job_types: Iterable[JobType]) -> str:
    return "### " + ", ".join(f"`{job_type.name}`" for job_type in job_types)


def _by_content(job_types: Iterable[JobType]) -> list[list[JobType]]:
    found = list(job_types)
    return [[one for one in found if one.content_type is content] for content in ContentType]


def _keys_table(place: str, properties: Iterable[Mapping[str, Any]]) -> str:
    every = list(properties)
    rows = []
    for name, inner in every[0].items():
        defaults = dict.fromkeys(f"`{one[name]['default']}`" for one in every if "default" in one[name])
        rows.append((f"`{name}`", _kind(inner), " or ".join(defaults) or "none", inner["description"]))
    return table((place, "type", "default", "meaning"), rows, markdown=True)


def _kind(schema: Mapping[str, Any]) -> str:
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"] if value is not None)
    kinds = schema.get("type", "any")
    kinds = [kinds] if isinstance(kinds, str) else kinds
    limits = [text.format(schema[name]) for name, text in _BOUNDS.items() if name in schema and abs(schema[name]) < 1e9]
    if "multipleOf" in schema:
        limits.append(f"a multiple of {schema['multipleOf']}")
    return _listed([" or ".join(kind for kind in kinds if kind != "null"), *limits])


def _listed(parts: Sequence[str]) -> str:
    return parts[0] + (f", {' '.join(parts[1:])}" if len(parts) > 1 else "")
