"""What every source of enhanced prompts has in common, a local model or a server."""

from __future__ import annotations

from typing import Protocol

from attrs import frozen

from ourvidz_wan_enhanced.effort import Effort
from ourvidz_wan_enhanced.instructions import Instruction


@frozen(kw_only=True)
class Task:
    """One prompt to rewrite. The same task makes the same text."""

    prompt: str
    instruction: Instruction
    seed: int
    max_tokens: int
    temperature: float
    top_p: float


@frozen(kw_only=True)
class Draft:
    """What a model wrote, unchecked."""

    text: str
    tokens: int
    #: It came to an end by itself, not at the token budget.
    is_finished: bool
    #: The model's name.
    model: str
    #: How its tokens were made, where that is known.
    decoding: str | None = None


class Writer(Protocol):
    """A language model that can be asked."""

    name: str

    def write(self, task: Task, effort: Effort) -> Draft:
        """Rewrite the prompt of ``task``, looking at ``effort`` as often as possible.

        Whatever it raises is reported under its own name.

        :raises DeadlinePassed: it saw that the time is over.
        """
        ...

    def leave(self) -> None:
        """Free what hangs on weights that are about to leave the device."""
        ...
