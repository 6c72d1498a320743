"""What an operator can set of the enhancer: ``OURVIDZ_ENHANCER_*`` or the table ``[ourvidz.enhancer]``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import ClassVar

from attrs import frozen, validators
from typed_settings.cls_attrs import option, secret
from typed_settings.types import SecretStr

#: What WAN's text encoder reads of a prompt.
ENCODER_TOKENS = 512


class Policy(StrEnum):
    """What becomes of a job whose prompt could not be enhanced."""

    ORIGINAL = "original"
    FAIL = "fail"


def _nothing() -> SecretStr:
    return SecretStr("")


@frozen(kw_only=True)
class EnhancerSettings:
    """Which language model rewrites prompts, within which limits. Nothing is ever downloaded."""

    SECTION: ClassVar[str] = "enhancer"

    model: Path | None = option(
        default=None,
        help="Directory of a causal language model such as Qwen2.5-7B-Instruct, or an installed model's name",
    )
    url: str | None = option(
        default=None,
        help="Address of an OpenAI-compatible server to ask instead of a local model: http://host:8000/v1",
    )
    served_model: str | None = option(
        default=None, help="What the server calls the model; default: the first that it lists"
    )
    key: SecretStr = secret(factory=_nothing, help="Bearer token of the server")
    policy: Policy = option(
        default=Policy.ORIGINAL,
        help="A prompt that cannot be enhanced is generated as it is (original), or the job fails (fail)",
    )
    deadline_seconds: float = option(
        default=20.0,
        validator=validators.gt(0),
        help="Time limit of one enhancement, its second try included; loading the model does not count",
    )
    max_tokens: int = option(
        default=256,
        # The encoder cuts other tokens than the language model: for rare scripts up to 1.3 times as many.
        validator=[validators.ge(16), validators.le(384)],
        help="Longest enhanced prompt in the model's tokens; WAN's text encoder reads 512 of its own",
    )
    max_prompt_characters: int = option(
        default=2000, validator=validators.ge(16), help="The enhancer reads this much of a prompt; the rest is cut"
    )
    instructions: Path | None = option(
        default=None, help="TOML file that replaces instructions.toml, what the model is told to do"
    )
    temperature: float = option(
        default=0.7, validator=[validators.ge(0), validators.le(2)], help="Freedom of the wording; 0 is greedy"
    )
    top_p: float = option(
        default=0.8, validator=[validators.gt(0), validators.le(1)], help="Share of likely words that is drawn from"
    )
    cache_size: int = option(
        default=256, validator=validators.ge(0), help="Finished enhancements that are kept in memory"
    )
