"""JSON Schema (2020-12) of the messages, made from the classes that read them.

A schema says what a producer should send, and leaves a few things to the worker:

- Its ``integer`` takes 3.0, as JSON Schema does; the worker takes 3 alone.
- It knows the validators of attrs; a rule that a class or a plugin writes itself it does not know.
- A worker reads an empty string for an optional value as no value, dates in any form of
  ISO 8601, and a value in ``metadata`` only where ``config`` has none. The schema asks for
  null or nothing, a date-time of RFC 3339, and right values in both places.
"""

from __future__ import annotations

import types
from collections.abc import Container, Iterable, Mapping
from datetime import datetime
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import attrs
from cattrs.cols import is_any_set, is_mapping, is_sequence

from ourvidz_core.errors import InvalidJobType
from ourvidz_core.wire.job_types import JobType
from ourvidz_core.wire.keys import DefaultConfigKeys
from ourvidz_core.wire.payloads import Payload, json_of

DIALECT = "https://json-schema.org/draft/2020-12/schema"
Schema = dict[str, Any]

_PLAIN: Mapping[Any, Schema] = {
    str: {"type": "string"},
    int: {"type": "integer"},
    float: {"type": "number"},
    bool: {"type": "boolean"},
    datetime: {"type": "string", "format": "date-time"},
    Path: {"type": "string"},
    type(None): {"type": "null"},
}
_BOUNDS = {">=": "minimum", ">": "exclusiveMinimum", "<=": "maximum", "<": "exclusiveMaximum"}
_ANCHORED = {"fullmatch": "^(?:{})$", "match": "^(?:{})", "search": "{}"}


def messages_schema(job_types: Iterable[JobType]) -> Schema:
    """One schema for the messages of all ``job_types``, each under its name in ``$defs``.

    :raises InvalidJobType: the types of a class's fields cannot be found.
    """
    definitions = {job_type.name: message_schema(job_type) for job_type in job_types}
    return {
        "$schema": DIALECT,
        "title": "A message to OurVidz",
        "description": "One element of a queue's list: a JSON object that asks for one job",
        "oneOf": [{"$ref": f"#/$defs/{name}"} for name in definitions],
        "$defs": definitions,
    }


def message_schema(job_type: JobType) -> Schema:
    """What a message of ``job_type`` may be. Keys that it does not name are welcome."""
    required = _required(Payload)
    properties = _properties(Payload, nullable=set(attrs.fields_dict(Payload)) - set(required))
    del properties["extras"]
    # The type decides which schema applies, so it is no matter of taste.
    properties["type"] = {**properties["type"], "const": job_type.name}
    properties["config"] |= {"properties": config_properties(job_type)}
    properties["metadata"] |= {"properties": metadata_properties(job_type)}
    return {
        "title": job_type.name,
        "description": job_type.description,
        "type": "object",
        "properties": properties,
        "required": required,
    }


def config_properties(job_type: JobType) -> dict[str, Schema]:
    """What each key of a message's ``config`` may hold; the default is that of the job type's preset."""
    classes: list[Any] = [job_type.config_keys] if job_type.config_keys else [type(job_type.preset), DefaultConfigKeys]
    properties: dict[str, Schema] = {}
    for cls in reversed(classes):
        properties |= _optional_properties(cls)
    for name, value in json_of(job_type.preset).items():
        if name in properties and value is not None:
            properties[name] = {**properties[name], "default": value}
    return properties


def metadata_properties(job_type: JobType) -> dict[str, Schema]:
    """What each key of a message's ``metadata`` that is read may hold."""
    return _optional_properties(job_type.metadata_keys)


def schema_of(cls: type[Any]) -> Schema:
    """The schema of an object with the fields of the attrs class ``cls``."""
    return {"type": "object", "properties": _properties(cls), "required": _required(cls)}


def known_keys(job_type: JobType) -> dict[str, frozenset[str]]:
    """The keys that something reads, at the top (``""``), in ``config`` and in ``metadata``."""
    return {
        "": frozenset(attrs.fields_dict(Payload)) - {"extras"},
        "config": frozenset(config_properties(job_type)),
        "metadata": frozenset(attrs.fields_dict(job_type.metadata_keys)),
    }


def _required(cls: type[Any]) -> list[str]:
    return [field.name for field in attrs.fields(cls) if field.default is attrs.NOTHING]


def _optional_properties(cls: type[Any]) -> dict[str, Schema]:
    """The properties of an object that has a value for whatever is left out."""
    return _properties(cls, nullable=attrs.fields_dict(cls))


def _properties(cls: type[Any], *, nullable: Container[str] = ()) -> dict[str, Schema]:
    """A schema for each field. A null is as good as nothing where a field is ``nullable``."""
    try:
        hints = get_type_hints(cls, include_extras=True)
    except (NameError, TypeError, AttributeError) as error:
        raise InvalidJobType(
            f"the types of the fields of {cls.__qualname__} in {cls.__module__} cannot be found: {error};"
            " import what they name where the class is, not only for type checkers"
        ) from error
    properties: dict[str, Schema] = {}
    for field in attrs.fields(cls):
        schema = {**_type_schema(hints[field.name]), **_rules_of(field.validator)}
        if field.name in nullable:
            schema = _or_null(schema)
        if description := field.metadata.get("description"):
            schema = {"description": description, **schema}
        properties[field.name] = {**schema, **field.metadata.get("json_schema", {})}
    return properties


def _type_schema(hint: Any) -> Schema:
    if get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    if hint in _PLAIN:
        return dict(_PLAIN[hint])
    if isinstance(hint, type) and issubclass(hint, Enum):
        return {"enum": [member.value for member in hint]}
    if get_origin(hint) is Literal:
        return {"enum": list(get_args(hint))}
    if get_origin(hint) in (Union, types.UnionType):
        return _union_schema(get_args(hint))
    if attrs.has(hint):
        return schema_of(hint)
    if is_sequence(hint) or is_any_set(hint):
        return {"type": "array", "items": _type_schema((get_args(hint) or (Any,))[0])}
    if is_mapping(hint):
        values = _type_schema((*get_args(hint), Any, Any)[1])
        return {"type": "object", **({"additionalProperties": values} if values else {})}
    # Any, and what only the plugin's own converter knows.
    return {}


def _union_schema(members: tuple[Any, ...]) -> Schema:
    schemas = [_type_schema(member) for member in members if member is not type(None)]
    schema = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
    return _or_null(schema) if type(None) in members else schema


def _or_null(schema: Schema) -> Schema:
    if isinstance(schema.get("type"), str):
        schema = {**schema, "type": [schema["type"], "null"]} if schema["type"] != "null" else schema
    if "enum" in schema and None not in schema["enum"]:
        schema = {**schema, "enum": [*schema["enum"], None]}
    if "anyOf" in schema and {"type": "null"} not in schema["anyOf"]:
        schema = {**schema, "anyOf": [*schema["anyOf"], {"type": "null"}]}
    return schema


def _rules_of(validator: Any) -> Schema:
    """The keywords for a validator of attrs; none for others."""
    # attrs keeps the classes of its validators private, so they are told by name; a test tries each.
    match type(validator).__name__:
        case "_OptionalValidator":
            return _rules_of(validator.validator)
        case "_AndValidator":
            return {key: value for inner in validator._validators for key, value in _rules_of(inner).items()}
        case "_NumberValidator":
            return {_BOUNDS[validator.compare_op]: validator.bound}
        case "_InValidator":
            return {"enum": json_of(list(validator.options))}
        case "_MinLengthValidator":
            return {"minLength": validator.min_length}
        case "_MaxLengthValidator":
            return {"maxLength": validator.max_length}
        case "_MatchesReValidator":
            return {"pattern": _ANCHORED[validator.match_func.__name__].format(validator.pattern.pattern)}
    return {}
