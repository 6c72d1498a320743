"""Turn the bytes of a message into a typed payload.

Strict about the types of the keys we know, lenient about keys we do not: those
are kept, at every level, and never make a message fail.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Set
from datetime import UTC, datetime
from enum import Enum
from types import UnionType
from typing import Any, TypeVar, cast

import attrs
from attrs import field, frozen
from cattrs import Converter
from cattrs.cols import is_any_set, is_mapping, is_sequence
from cattrs.errors import BaseValidationError, ClassValidationError, IterableValidationError
from cattrs.v import format_exception

from ourvidz_core.errors import Fault, PayloadError

#: A producer's message is about 2 kB; one far above that is a mistake or an attack.
MAX_MESSAGE_BYTES = 1_000_000
#: Ids become parts of paths, so they are made of nothing that a path could trip over.
ID_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}")
#: A producer's message is 4 levels deep; each level costs every later reader a call.
MAX_NESTING = 64
_SHOWN_CHARACTERS = 80
#: An envelope around the job, and two layers of text around those.
_ENVELOPES = 3

T = TypeVar("T")


@frozen(kw_only=True)
class Payload:
    """A message as the producer meant it, before any plugin has looked at it.

    ``config`` and ``metadata`` are the producer's own objects; the plugin that owns
    ``type`` decides what they mean. ``extras`` keeps top-level keys we do not know.
    """

    id: str = field(
        metadata={
            "description": "1 to 128 letters, digits, `-` and `_`. Names the job in callbacks and the files in storage",
            "json_schema": {"pattern": f"^{ID_PATTERN.pattern}$"},
        }
    )
    type: str = field(metadata={"description": "The job type; the plugin that owns it decides everything else"})
    prompt: str = field(metadata={"description": "May be empty where the job type allows it"})
    user_id: str = field(
        metadata={
            "description": "Like `id`; the first part of every stored path",
            "json_schema": {"pattern": f"^{ID_PATTERN.pattern}$"},
        }
    )
    config: Mapping[str, Any] = field(
        factory=dict, metadata={"description": "What to make, in the job type's own terms"}
    )
    metadata: Mapping[str, Any] = field(
        factory=dict,
        metadata={
            "description": "What the producer knows besides; some job types look here where `config` has nothing"
        },
    )
    created_at: datetime | None = field(
        default=None,
        metadata={
            "description": "ISO 8601, UTC where it names no offset; no terminal callback goes out sooner than"
            " `OURVIDZ_CALLBACK_MIN_AGE_SECONDS` after it"
        },
    )
    negative_prompt: str | None = field(default=None, metadata={"description": "What shall not be seen"})
    model_variant: str | None = field(
        default=None, metadata={"description": "Which of several models, where the job type has more than one"}
    )
    bucket: str | None = field(
        default=None, metadata={"description": "The producer's own note; results go to the job type's bucket"}
    )
    extras: Mapping[str, Any] = field(factory=dict)

    def first(self, *paths: str) -> Any:
        """The first of the dotted ``paths`` that holds a value; None where none does.

        Nulls and empty strings are absent, as the contract says; 0 and False are values.

        >>> payload = Payload(id="a", type="t", prompt="", user_id="u", config={"seed": 0})
        >>> payload.first("config.seed", "metadata.seed")
        0
        """
        for path in paths:
            value = self.get(path)
            if value is not None and value != "":
                return value
        return None

    def get(self, path: str) -> Any:
        """The value at ``config.key``, ``metadata.key`` or ``key``; None where there is none."""
        parent, _, key = path.rpartition(".")
        if parent:
            return cast(Mapping[str, Any], getattr(self, parent)).get(key)
        if key in attrs.fields_dict(Payload):
            return getattr(self, key)
        return self.extras.get(key)


def decode_message(raw: bytes) -> dict[str, Any]:
    """Decode one element of a producer's list into a JSON object.

    Three envelopes are accepted: the job object itself, ``{"data": "<json>"}`` and
    ``["<json>"]``.

    :raises PayloadError: the bytes are not such a message.
    """
    if len(raw) > MAX_MESSAGE_BYTES:
        raise PayloadError(f"the message has {len(raw)} bytes; at most {MAX_MESSAGE_BYTES} are read")
    value = _parse_json(raw)
    # Redis finds the id in the same way, in delivery/lua/common.lua; a test holds the two together.
    for _ in range(_ENVELOPES):
        if isinstance(value, str):
            value = _parse_json(value.encode())
        elif isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
            value = _parse_json(value[0].encode())
        elif isinstance(value, dict) and isinstance(value.get("data"), str) and not {"id", "type"} & value.keys():
            value = _parse_json(value["data"].encode())
        else:
            break
    if not isinstance(value, dict):
        raise PayloadError(f"the message is a JSON {_json_kind(value)}, not an object that describes a job")
    return value


def job_id_of(message: Mapping[str, Any]) -> str | None:
    """The id that a failure of this message can be reported under, if it has a usable one."""
    job_id = message.get("id")
    return job_id if isinstance(job_id, str) and ID_PATTERN.fullmatch(job_id) else None


def structure_payload(message: Mapping[str, Any]) -> Payload:
    """Check a decoded message and give it its types.

    :raises PayloadError: with every fault at once, each with its path.
    """
    faults: list[Fault] = []
    for key in ("id", "user_id"):
        value = message.get(key)
        if isinstance(value, str) and not ID_PATTERN.fullmatch(value):
            faults.append(
                Fault(f"$.{key}", "1 to 128 letters, digits, - and _, beginning with a letter or digit", shown(value))
            )
    known = attrs.fields_dict(Payload)
    # A null means absent, so the field's own default answers for it.
    fields = {key: value for key, value in message.items() if key in known and value is not None and key != "extras"}
    extras = {key: value for key, value in message.items() if key not in known or key == "extras"}
    try:
        payload = converter.structure({**fields, "extras": extras}, Payload)
    except BaseValidationError as error:
        faults.extend(faults_of(error))
    if faults:
        raise PayloadError.from_faults(faults)
    return payload


def structure(values: Mapping[str, Any], cls: type[T], *, path: str = "$") -> T:
    """Structure ``values`` as the attrs class ``cls``, strictly.

    Keys that ``cls`` does not have are ignored; use :attr:`Payload.extras` or the
    payload's own mappings to see them.

    :raises PayloadError: with every fault at once; paths begin with ``path``.
    """
    try:
        return converter.structure(values, cls)
    except BaseValidationError as error:
        raise PayloadError.from_faults(faults_of(error, path=path)) from error


def shown(value: object) -> str:
    """``value`` as an error message shows it: repr, short, on one line."""
    text = ascii(value)
    if len(text) > _SHOWN_CHARACTERS:
        text = f"{text[:_SHOWN_CHARACTERS]}... ({len(text)} characters)"
    return text


def without_token(value: Any) -> Any:
    """``value``, and if it is an address without its query, which carries an access token in production.

    >>> without_token("https://a.test/ref.png?token=t")
    'https://a.test/ref.png'
    """
    if isinstance(value, str) and "://" in value:
        return value.partition("?")[0]
    return value


def json_of(value: object) -> Any:
    """``value`` as JSON holds it: a set as an array, and what JSON does not know as text."""
    plain = json.dumps(
        converter.unstructure(value), default=lambda odd: list(odd) if isinstance(odd, Set) else str(odd)
    )
    return json.loads(plain)


def faults_of(error: BaseException, *, path: str = "$") -> list[Fault]:
    """Flatten the tree of a cattrs error into faults with JSON paths."""
    if isinstance(error, ClassValidationError):
        faults = []
        with_notes, without = error.group_exceptions()
        for inner, note in with_notes:
            faults.extend(faults_of(inner, path=f"{path}.{note.name}"))
        for inner in without:
            faults.extend(faults_of(inner, path=path))
        return faults
    if isinstance(error, IterableValidationError):
        faults = []
        with_index, others = error.group_exceptions()
        for inner, index in with_index:
            place = f".{index.index}" if isinstance(index.index, str) else f"[{index.index}]"
            faults.extend(faults_of(inner, path=path + place))
        for inner in others:
            faults.extend(faults_of(inner, path=path))
        return faults
    if isinstance(error, WrongType):
        return [Fault(path, error.expected, error.got)]
    if isinstance(error, KeyError):
        key = str(error.args[0])
        return [Fault(path if path.endswith(f".{key}") else f"{path}.{key}", "a value", "nothing")]
    if isinstance(error, ValueError | TypeError) and error.args:
        return [_refusal(error, path)]
    return [Fault(path, format_exception(error, None), "")]


def _refusal(error: ValueError | TypeError, path: str) -> Fault:
    """What a validator of an attrs class raised. It says no path, but most name their attribute."""
    sentence = str(error.args[0])
    named = next((argument.name for argument in error.args[1:] if isinstance(argument, attrs.Attribute)), None)
    if named is None and (quoted := re.match(r"'(\w+)' ", sentence)):
        named = quoted[1]
    return Fault(f"{path}.{named}" if named else path, sentence, "")


class WrongType(ValueError):
    """A value on the wire is not of the type its place has."""

    def __init__(self, expected: str, value: object) -> None:
        super().__init__(f"expected {expected}, got {shown(value)}")
        self.expected = expected
        self.got = shown(value)


def _parse_json(raw: bytes) -> Any:
    try:
        value = json.loads(raw, parse_constant=_refuse_constant, parse_float=_finite)
        _refuse_half_characters(value)
    except RecursionError:
        raise PayloadError("the message is nested too deeply to be a job") from None
    except ValueError as error:
        raise PayloadError(f"the message is not JSON: {error}; it begins with {shown(raw[:40])}") from None
    if _is_deeper(value, MAX_NESTING):
        raise PayloadError(f"the message is nested too deeply to be a job: more than {MAX_NESTING} levels")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    """JSON can write 1e999; Python reads an infinity, which JSON cannot write again."""
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{shown(text)} is more than a double can hold")
    return number


def _refuse_half_characters(value: Any) -> None:
    """Half of a surrogate pair is no character: nothing that quotes it could be sent as UTF-8."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{shown(error.object[error.start])} is half a character") from None


def _is_deeper(value: Any, levels: int) -> bool:
    level = [value]
    for _ in range(levels):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return False
    return True


def _json_kind(value: object) -> str:
    kinds = {list: "array", str: "string", int: "number", float: "number", bool: "boolean", type(None): "null"}
    return kinds.get(type(value), "value")


def _exactly(kind: type, expected: str) -> Callable[[Any, Any], Any]:
    def structure_exactly(value: Any, cls: Any) -> Any:
        # cattrs asks the hook of str for a StrEnum, before any hook that looks closer.
        if _is_enum(cls):
            return _member(value, cls)
        # bool is an int to Python; on the wire true is no number.
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise WrongType(expected, value)
        return value

    return structure_exactly


def _number(value: Any, _: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise WrongType("a number", value)
    try:
        return float(value)
    except OverflowError:
        raise WrongType("a number that a double can hold", value) from None


def _moment(value: Any, _: Any) -> datetime:
    if isinstance(value, str):
        try:
            moment = datetime.fromisoformat(value)
        except ValueError:
            raise WrongType("a date and time as ISO 8601 writes it", value) from None
        return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    raise WrongType("a date and time as ISO 8601 writes it", value)


def _is_enum(cls: Any) -> bool:
    return isinstance(cls, type) and issubclass(cls, Enum)


def _is_class_of_something(cls: Any) -> bool:
    return cls is type or getattr(cls, "__origin__", None) is type


def _member(value: Any, cls: type[Enum]) -> Enum:
    try:
        return cls(value)
    except (ValueError, TypeError):
        raise WrongType("one of " + ", ".join(str(member.value) for member in cls), value) from None


def _object(value: Any, _: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise WrongType("an object", value)
    return value


def make_converter() -> Converter:
    """A converter with the wire's strictness: nothing is coerced but an integer to a float."""
    made = Converter()
    made.register_structure_hook(str, _exactly(str, "a string"))
    made.register_structure_hook(int, _exactly(int, "an integer"))
    made.register_structure_hook(bool, _exactly(bool, "true or false"))
    made.register_structure_hook(float, _number)
    made.register_structure_hook(datetime, _moment)
    made.register_unstructure_hook(datetime, lambda moment: moment.isoformat())
    # A class that a value names is known to its readers by its name.
    made.register_unstructure_hook_func(_is_class_of_something, lambda named: named.__name__)
    made.register_structure_hook_func(_is_enum, _member)
    made.register_structure_hook_factory(attrs.has, lambda cls: _attrs_object(made, cls))
    # cattrs iterates over whatever it is given, so "abc" would be a list of three strings.
    lenient = made.copy()
    made.register_structure_hook_factory(is_sequence, lambda cls: _only(list | tuple, "an array", lenient, cls))
    made.register_structure_hook_factory(is_any_set, lambda cls: _only(list | Set, "an array", lenient, cls))
    made.register_structure_hook_factory(is_mapping, lambda cls: _only(dict, "an object", lenient, cls))
    made.register_structure_hook_func(lambda cls: cls == Mapping[str, Any], _object)
    return made


def _only(kinds: UnionType | type, expected: str, lenient: Converter, cls: Any) -> Callable[[Any, Any], Any]:
    inner = lenient.get_structure_hook(cls)

    def structure_only(value: Any, target: Any) -> Any:
        if not isinstance(value, kinds):
            raise WrongType(expected, value)
        return inner(value, target)

    return structure_only


def _attrs_object(made: Converter, cls: type[Any]) -> Callable[[Any, Any], Any]:
    inner = made.gen_structure_attrs_fromdict(cls)

    def structure_attrs_object(value: Any, target: Any) -> Any:
        return inner(_object(value, target), target)

    return structure_attrs_object


converter = make_converter()
