"""How like the exact tier WAN's fast tier is, beside other ways to ask the model as seldom.

Prints a table: how many steps asked the model, and the PSNR of the frames against those of all
steps, the mean over some prompts and the worst. Each way gets about as many steps as the fast tier::

    python benchmarks/wan_tiers.py                                    # the demo model, on a processor
    python benchmarks/wan_tiers.py --ckpt-dir DIR --device cuda --frames 81
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import attrs
import numpy as np
import torch
from attrs import define, field, frozen
from ourvidz_wan import schedulers
from ourvidz_wan.arguments import GenerateArguments, parse_arguments
from ourvidz_wan.checkpoints import WanModels, load_models
from ourvidz_wan.config import Tier
from ourvidz_wan.prediction import Branch, Predict, Predictor
from ourvidz_wan.sampling import decode, make_latents
from ourvidz_wan.tasks import TASKS
from ourvidz_wan.tiers import steps_taken

from ourvidz_core.engine.variants import find_model

#: What the demo model knows; another model makes something of them, too.
PROMPTS = (
    "a red circle moves right",
    "a large purple triangle moves up on a white background",
    "a yellow square grows",
    "a small white star moves left on a black background",
    "a cyan square moves down",
    "a large orange heart shrinks on a blue background",
)
TRAINING_STEPS = 1000


@define
class Reusing:
    """Asks a predictor in some steps of a job; in the others it makes something of the last answers."""

    inner: Predictor
    steps: int
    #: Whether the step at this place asks, given its input.
    asks: Callable[[int, torch.Tensor], bool]
    #: The predictions from the input, its noise level, and what is known.
    estimate: Callable[[torch.Tensor, float, list[Known]], Sequence[torch.Tensor]]
    #: Told of each step's input and first prediction, and whether it asked.
    learn: Callable[[torch.Tensor, torch.Tensor, bool], None] = lambda *_: None
    asked: int = 0
    facts: Mapping[str, Any] = field(factory=dict)

    @contextmanager
    def job(self, branches: Sequence[Branch]) -> Iterator[Predict]:
        """See the plugin's ``Predictor``."""
        known: list[Known] = []
        places = iter(range(self.steps))
        self.asked = 0
        with self.inner.job(branches) as ask:

            def predict(hidden_states: torch.Tensor, timestep: torch.Tensor) -> Sequence[torch.Tensor]:
                place, level = next(places), float(timestep) / TRAINING_STEPS
                is_asked = self.asks(place, hidden_states)
                if is_asked:
                    predictions = [one.clone() for one in ask(hidden_states, timestep)]
                    known.append(Known(level=level, input=hidden_states, predictions=predictions))
                    self.asked += 1
                else:
                    predictions = list(self.estimate(hidden_states, level, known))
                self.learn(hidden_states, predictions[0], is_asked)
                return predictions

            yield predict


@frozen(kw_only=True, eq=False)
class Known:
    """What the model said of an input."""

    level: float
    input: torch.Tensor
    predictions: list[torch.Tensor]


def unchanged(_input: torch.Tensor, _level: float, known: list[Known]) -> Sequence[torch.Tensor]:
    """The last answers once more."""
    return known[-1].predictions


def shifted(hidden_states: torch.Tensor, _level: float, known: list[Known]) -> Sequence[torch.Tensor]:
    """The last answers, changed as much as the input did: EasyCache's way."""
    return [one + (hidden_states - known[-1].input) for one in known[-1].predictions]


def half_linear(_input: torch.Tensor, level: float, known: list[Known]) -> Sequence[torch.Tensor]:
    """Half of the way from the last answers to where a line through the last two leads."""
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

    def asks(self, place: int, hidden_states: torch.Tensor) -> bool:
        """The first steps, the last one, and whenever enough has changed."""
        if place < self._beginning or place == self._steps - 1 or self._rate is None:
            return True
        self._change += self._rate * float((hidden_states - self._input).abs().mean() / self._output.abs().mean())
        return self._change >= self._threshold

    def learn(self, hidden_states: torch.Tensor, output: torch.Tensor, is_asked: bool) -> None:
        """Remember a step."""
        if is_asked:
            if self._asked_input is not None:
                moved = (hidden_states - self._asked_input).abs().mean()
                self._rate = float((output - self._asked_output).abs().mean() / moved)
            self._change, self._asked_input, self._asked_output = 0.0, hidden_states, output
        self._input, self._output = hidden_states, output


@frozen(kw_only=True, eq=False)
class Made:
    """One video."""

    frames: Any
    latents: torch.Tensor
    asked: int


def exact(arguments: GenerateArguments, models: WanModels) -> Made:
    """All steps."""
    latents = make_latents(arguments, models, lambda _step, _total: None).latents
    return Made(frames=decode(models, latents).astype(np.float64), latents=latents, asked=arguments.sample_steps)


def fast(arguments: GenerateArguments, models: WanModels, places: Sequence[int] | None = None) -> Made:
    """The fast tier, or the same with other places."""
    chosen = list(places or steps_taken(Tier.FAST, arguments.sample_steps))
    with mock.patch.object(schedulers, "steps_taken", return_value=chosen):
        made = exact(attrs.evolve(arguments, tier=Tier.FAST), models)
    return attrs.evolve(made, asked=len(chosen))


def fewer(arguments: GenerateArguments, models: WanModels) -> Made:
    """A schedule of as many steps as the fast tier takes."""
    return exact(attrs.evolve(arguments, sample_steps=len(steps_taken(Tier.FAST, arguments.sample_steps))), models)


def reusing(arguments: GenerateArguments, models: WanModels, **options: Any) -> Made:
    """All steps of the solver, of which some reuse what the model said before."""
    steps = arguments.sample_steps
    places = set(steps_taken(Tier.FAST, steps))
    options = {"asks": lambda place, _input: place in places, **options}
    predictor = Reusing(inner=models.predictor, steps=steps, **options)
    made = exact(arguments, attrs.evolve(models, predictor=predictor))
    return attrs.evolve(made, asked=predictor.asked)


def easy_cache(arguments: GenerateArguments, models: WanModels, threshold: float, estimate: Any = shifted) -> Made:
    """EasyCache; its authors compute the first fifth of the steps of WAN 2.1."""
    steps = arguments.sample_steps
    criterion = EasyCache(steps, threshold, steps // 5)
    return reusing(arguments, models, asks=criterion.asks, learn=criterion.learn, estimate=estimate)


def spread(steps: int, count: int, first: int) -> list[int]:
    """``count`` of ``steps`` places: the ``first`` ones, the last, and others evenly between."""
    rest = count - first
    return [*range(first), *(first - 1 + round((steps - first) / rest * number) for number in range(1, rest + 1))]


WAYS: Mapping[str, Callable[[GenerateArguments, WanModels], Made]] = {
    "fast tier": fast,
    "a schedule of fewer steps": fewer,
    "EasyCache, threshold 0.05": lambda arguments, models: easy_cache(arguments, models, 0.05),
    "EasyCache, threshold 0.1": lambda arguments, models: easy_cache(arguments, models, 0.1),
    "its criterion at 0.1, outputs unchanged": lambda arguments, models: easy_cache(arguments, models, 0.1, unchanged),
    "fast tier's places, outputs as EasyCache": lambda arguments, models: reusing(arguments, models, estimate=shifted),
    "fast tier's places, outputs unchanged": lambda arguments, models: reusing(arguments, models, estimate=unchanged),
    "fast tier's places, outputs led on by half": lambda arguments, models: reusing(
        arguments, models, estimate=half_linear
    ),
    **{
        f"{count} places, the first {first} together": (
            lambda arguments, models, count=count, first=first: fast(
                arguments, models, spread(arguments.sample_steps, count, first)
            )
        )
        for count, first in ((11, 1), (11, 2), (11, 3), (11, 5), (11, 6), (12, 4), (12, 5), (10, 4), (8, 3))
    },
}


def main() -> None:
    """Measure all ways and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt-dir", type=Path, default=Path("demo"), help="a t2v-1.3B model (default: demo)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--frames", type=int, default=17, help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=25, help="(default: %(default)s)")
    parser.add_argument("--guidance", type=float, default=6.5, help="(default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=len(PROMPTS), help="how many (default: %(default)s)")
    parser.add_argument("--only", default="", help="ways whose name contains this")
    given = parser.parse_args()
    directory = find_model(given.ckpt_dir, "wan")
    models = load_models(directory, TASKS["t2v-1.3B"], device=given.device)
    ways = {name: way for name, way in WAYS.items() if given.only in name}
    results: dict[str, list[tuple[int, float, float]]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory() as place:
        for seed, prompt in enumerate(PROMPTS[: given.prompts]):
            options = {
                "task": "t2v-1.3B",
                "ckpt_dir": directory,
                "prompt": prompt,
                "save_file": Path(place) / ("x.png" if given.frames == 1 else "x.mp4"),
                "frame_num": given.frames,
                "sample_steps": given.steps,
                "sample_guide_scale": given.guidance,
                "base_seed": seed,
            }
            arguments = parse_arguments([f"--{name}={value}" for name, value in options.items()])
            wanted = exact(arguments, models)
            for name, way in ways.items():
                made = way(arguments, models)
                error = float(((made.frames - wanted.frames) ** 2).mean())
                psnr = 10 * float(np.log10(255**2 / max(error, 1e-9)))
                distance = float((made.latents - wanted.latents).norm() / wanted.latents.norm())
                results[name].append((made.asked, psnr, distance))
                print(f"{prompt}: {name}: {made.asked} steps, {psnr:.1f} dB", file=sys.stderr, flush=True)
    print(f"| of {given.steps} steps, {given.frames} frames | asked | PSNR, mean | worst | latents' error |")
    print("|---|---|---|---|---|")
    for name, rows in results.items():
        asked, psnr, distance = (np.array(column) for column in zip(*rows, strict=True))
        count = f"{asked.min()}" if asked.min() == asked.max() else f"{asked.min()} to {asked.max()}"
        print(f"| {name} | {count} | {psnr.mean():.1f} dB | {psnr.min():.1f} dB | {distance.mean():.3f} |")


if __name__ == "__main__":
    main()
