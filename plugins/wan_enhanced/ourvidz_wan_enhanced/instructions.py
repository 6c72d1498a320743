"""What the language model is told to do with a prompt: data, ours or the operator's own."""

from __future__ import annotations

import hashlib
import tomllib
from importlib.resources import files
from pathlib import Path

from attrs import Attribute, field, frozen, validators

from ourvidz_core.errors import PayloadError, SettingsError
from ourvidz_core.wire.job_types import ContentType
from ourvidz_core.wire.payloads import structure

PROMPT_FIELD = "{prompt}"


def _stripped(text: str) -> str:
    return text.strip()


def _holds_the_prompt(_: object, attribute: Attribute[str], text: str) -> None:
    if text.count(PROMPT_FIELD) != 1:
        raise ValueError(f"{attribute.name} must hold {PROMPT_FIELD} exactly once", attribute)


@frozen(kw_only=True)
class Instruction:
    """What a model is told for one kind of content."""

    #: The system message for a model that chats.
    system: str = field(converter=_stripped, validator=validators.min_len(1))
    #: What a base model continues.
    completion: str = field(converter=_stripped, validator=_holds_the_prompt)

    @property
    def digest(self) -> str:
        """Changes with every letter of the instruction."""
        return hashlib.sha256(f"{self.system}\0{self.completion}".encode()).hexdigest()


@frozen(kw_only=True)
class Instructions:
    """The instructions of one file."""

    image: Instruction
    video: Instruction

    def of(self, content_type: ContentType) -> Instruction:
        """The instruction for images or for videos."""
        return self.video if content_type is ContentType.VIDEO else self.image


def read_instructions(path: Path | None = None) -> Instructions:
    """The instructions of ``path``, or our own.

    :raises SettingsError: the file cannot be read, or lacks something.
    """
    source = files("ourvidz_wan_enhanced").joinpath("instructions.toml") if path is None else path
    try:
        return structure(tomllib.loads(source.read_text("utf-8")), Instructions, path=path.name if path else "$")
    except (OSError, ValueError, PayloadError) as error:
        raise SettingsError(f"OURVIDZ_ENHANCER_INSTRUCTIONS: {path} cannot be used: {error}") from error
