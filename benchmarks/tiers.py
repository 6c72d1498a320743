"""What the comparisons of fast tiers share: ways to ask a model less often, and the table of what came of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from attrs import define, field, frozen


@frozen(kw_only=True, eq=False)
class Known:
    """What the model said of an input."""

    level: float
    input: torch.Tensor
    predictions: list[torch.Tensor]


@define
class Reuse:
    """Asks a model in some steps of a job; in the others it makes something of the last answers."""

    #: Whether the step at this place asks, given its input.
    asks: Callable[[int, torch.Tensor], bool]
    #: The predictions from the input, its noise level, and what is known.
    estimate: Callable[[torch.Tensor, float, list[Known]], Sequence[torch.Tensor]]
    #: Told of each step's input and first prediction, and whether it asked.
    learn: Callable[[torch.Tensor, torch.Tensor, bool], None] = lambda *_: None
    known: list[Known] = field(factory=list)
    #: Steps so far.
    taken: int = 0

    @property
    def asked(self) -> int:
        """How often it asked."""
        return len(self.known)

    def predict(
        self, given: torch.Tensor, level: float, ask: Callable[[], Sequence[torch.Tensor]]
    ) -> Sequence[torch.Tensor]:
        """The predictions of the next step from what it is given."""
        is_asked = self.asks(self.taken, given)
        if is_asked:
            predictions = [one.clone() for one in ask()]
            self.known.append(Known(level=level, input=given, predictions=predictions))
        else:
            predictions = list(self.estimate(given, level, self.known))
        self.learn(given, predictions[0], is_asked)
        self.taken += 1
        return predictions


def unchanged(_input: torch.Tensor, _level: float, known: list[Known]) -> Sequence[torch.Tensor]:
    """The last answers once more."""
    return known[-1].predictions


def shifted(given: torch.Tensor, _level: float, known: list[Known]) -> Sequence[torch.Tensor]:
    """The last answers, changed as much as the input did: EasyCache's way."""
    return [one + (given - known[-1].input) for one in known[-1].predictions]


def half_linear(_input: torch.Tensor, level: float, known: list[Known]) -> Sequence[torch.Tensor]:
    """Half of the way from the last answers to where a line through the last two leads."""
    if len(known) == 1:
        return known[-1].predictions
    before, last = known[-2:]
    share = 0.5 * (level - last.level) / (last.level - before.level)
    return [new + share * (new - old) for new, old in zip(last.predictions, before.predictions, strict=True)]


class EasyCache:
    """The criterion of "Less is Enough: Training-Free Video Diffusion Acceleration via Runtime-Adaptive Caching".

    arXiv 2507.02860. Between two steps the output is taken to change by as much of its input's change
    as it last did; once that adds up to ``threshold`` of the output, the model is asked.
    """

    def __init__(self, steps: int, threshold: float, beginning: int) -> None:
        self._steps, self._threshold, self._beginning = steps, threshold, beginning
        self._change = 0.0
        self._rate: float | None = None
        self._input: Any = None
        self._output: Any = None
        self._asked_input: Any = None
        self._asked_output: Any = None

    def asks(self, place: int, given: torch.Tensor) -> bool:
        """The first steps, the last one, and whenever enough has changed."""
        if place < self._beginning or place == self._steps - 1 or self._rate is None:
            return True
        self._change += self._rate * float((given - self._input).abs().mean() / self._output.abs().mean())
        return self._change >= self._threshold

    def learn(self, given: torch.Tensor, output: torch.Tensor, is_asked: bool) -> None:
        """Remember a step."""
        if is_asked:
            if self._asked_input is not None:
                moved = (given - self._asked_input).abs().mean()
                self._rate = float((output - self._asked_output).abs().mean() / moved)
            self._change, self._asked_input, self._asked_output = 0.0, given, output
        self._input, self._output = given, output


@frozen(kw_only=True, eq=False)
class Made:
    """What one way made of one prompt."""

    #: Of all pictures, from 0 to 255.
    pixels: Any
    latents: torch.Tensor
    #: Steps that asked the model.
    asked: int
    #: What it took, as a part of all steps.
    cost: float = 0.0


@frozen(kw_only=True)
class Likeness:
    """How like what all steps make it is."""

    asked: int
    cost: float
    psnr_db: float
    #: The distance of the latents as a part of their length.
    distance: float

    @classmethod
    def of(cls, made: Made, wanted: Made) -> Likeness:
        """Compare two results of the same prompt."""
        error = float(((made.pixels.astype(np.float64) - wanted.pixels) ** 2).mean())
        return cls(
            asked=made.asked,
            cost=made.cost,
            psnr_db=10 * float(np.log10(255**2 / max(error, 1e-9))),
            distance=float((made.latents - wanted.latents).norm() / wanted.latents.norm()),
        )


def spread(steps: int, count: int, first: int) -> list[int]:
    """``count`` of ``steps`` places: the ``first`` ones, the last, and others evenly between."""
    rest = count - first
    return [*range(first), *(first - 1 + round((steps - first) / rest * number) for number in range(1, rest + 1))]


def print_table(
    title: str, results: Mapping[str, Sequence[Likeness]], more: Mapping[str, Mapping[str, str]] | None = None
) -> None:
    """One row for each way, as Markdown; ``more`` are further columns, each by way."""
    more = more or {}
    columns = ["asked", "PSNR, mean", "worst", "latents' error", *more]
    print(_line([title, *columns]))
    print("|---" * (len(columns) + 1) + "|")
    for name, found in results.items():
        decibels = [one.psnr_db for one in found]
        cells = [
            _from_to(one.asked for one in found),
            f"{np.mean(decibels):.1f} dB",
            f"{min(decibels):.1f} dB",
            f"{np.mean([one.distance for one in found]):.3f}",
        ]
        print(_line([name, *cells, *(column[name] for column in more.values())]))


def _from_to(counts: Iterable[int]) -> str:
    counts = sorted(counts)
    return f"{counts[0]}" if counts[0] == counts[-1] else f"{counts[0]} to {counts[-1]}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
