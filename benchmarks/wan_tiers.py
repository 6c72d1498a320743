"""How like the exact tier WAN's fast tier is, beside other ways to ask the model as seldom.

Prints a table: how many steps asked the model, and the PSNR of the frames against those of all
steps, the mean over some prompts and the worst. Each way gets about as many steps as the fast tier. Where
FlashAttention 3 is not at hand, what it does in fp8 is calculated in plain numbers::

    python -m benchmarks.wan_tiers                                    # the demo model, on a processor
    python -m benchmarks.wan_tiers --ckpt-dir DIR --device cuda --frames 81
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest import mock

import attrs
import torch
from attrs import define, field
from ourvidz_wan import checkpoints, fp8
from ourvidz_wan.acceleration import attending_in_fp8, use_kernel
from ourvidz_wan.arguments import GenerateArguments, parse_arguments
from ourvidz_wan.attention import Kernel
from ourvidz_wan.checkpoints import WanModels, load_models
from ourvidz_wan.prediction import Branch, Predict, Predictor
from ourvidz_wan.sampling import decode, make_latents
from ourvidz_wan.tasks import TASKS
from ourvidz_wan.tiers import steps_taken

from benchmarks.tiers import EasyCache, Likeness, Made, Reuse, half_linear, print_table, shifted, spread, unchanged
from ourvidz_core.engine.tiers import Tier
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
#: FlashAttention 3 multiplies what is left of a softmax with this before it is rounded to eight bits.
SOFTMAX_SCALE = 256.0


@define
class Reusing:
    """A predictor whose model is asked in some steps of a job alone."""

    inner: Predictor
    reuse: Reuse
    facts: Mapping[str, Any] = field(factory=dict)

    @contextmanager
    def job(self, branches: Sequence[Branch]) -> Iterator[Predict]:
        """See the plugin's ``Predictor``."""
        with self.inner.job(branches) as ask:

            def predict(hidden_states: torch.Tensor, timestep: torch.Tensor) -> Sequence[torch.Tensor]:
                level = float(timestep) / TRAINING_STEPS
                return self.reuse.predict(hidden_states, level, lambda: ask(hidden_states, timestep))

            yield predict


def exact(arguments: GenerateArguments, models: WanModels) -> Made:
    """All steps."""
    latents = make_latents(arguments, models, lambda _step, _total: None).latents
    return Made(pixels=decode(models, latents), latents=latents, asked=arguments.sample_steps)


def fast(arguments: GenerateArguments, models: WanModels, places: Sequence[int] | None = None) -> Made:
    """The fast tier, or the same with other places."""
    chosen = list(places or steps_taken(Tier.FAST, arguments.sample_steps))
    with mock.patch.object(checkpoints, "steps_taken", return_value=chosen):
        made = exact(attrs.evolve(arguments, tier=Tier.FAST), models)
    return attrs.evolve(made, asked=len(chosen))


def fast_in_fp8(arguments: GenerateArguments, models: WanModels, *, as_given: bool = False) -> Made:
    """The fast tier with fp8 attention, or with inputs ``as_given`` rounded to it: neither turned nor around a mean."""
    with ExitStack() as stack:
        if as_given:
            stack.enter_context(
                mock.patch.object(fp8, "round_inputs", lambda *inputs: [fp8._rounded(x) for x in inputs])
            )
        if models.acceleration is not None:
            return fast(attrs.evolve(arguments, fp8_attention=True), models)
        prepared = _prepared(arguments.ckpt_dir)
        stack.enter_context(mock.patch.object(fp8, "flash_3_fp8", attention_of_rounded))
        stack.enter_context(attending_in_fp8(prepared.pipeline.transformer))
        return fast(arguments, prepared)


def attention_of_rounded(values: list[torch.Tensor], scales: list[torch.Tensor]) -> torch.Tensor:
    """What FlashAttention 3 answers in fp8, which rounds its softmax as well."""
    query, key, value = (one.float() * scale[:, None, :, None] for one, scale in zip(values, scales, strict=True))
    scores = torch.einsum("bqhc,bkhc->bhqk", query, key) / query.shape[-1] ** 0.5
    shares = (scores - scores.amax(-1, keepdim=True)).exp()
    rounded = (shares * SOFTMAX_SCALE).to(fp8.EIGHT_BITS).float() / SOFTMAX_SCALE
    attended = torch.einsum("bhqk,bkhc->bhqc", rounded, value) / shares.sum(-1, keepdim=True)
    return attended.transpose(1, 2)


@lru_cache(maxsize=1)
def _prepared(ckpt_dir: Path) -> WanModels:
    models = load_models(ckpt_dir, TASKS["t2v-1.3B"])
    use_kernel(models.pipeline.transformer, Kernel.TORCH)
    return models


def in_bfloat16(arguments: GenerateArguments, models: WanModels, way: Callable[..., Made] = exact) -> Made:
    """The same in bfloat16, as every GPU has it."""
    return way(arguments, _in_bfloat16(arguments.ckpt_dir, str(models.device)))


@lru_cache(maxsize=1)
def _in_bfloat16(ckpt_dir: Path, device: str) -> WanModels:
    return load_models(ckpt_dir, TASKS["t2v-1.3B"], device=device, dtype=torch.bfloat16)


def fewer(arguments: GenerateArguments, models: WanModels) -> Made:
    """A schedule of as many steps as the fast tier takes."""
    return exact(attrs.evolve(arguments, sample_steps=len(steps_taken(Tier.FAST, arguments.sample_steps))), models)


def reusing(arguments: GenerateArguments, models: WanModels, **options: Any) -> Made:
    """All steps of the solver, of which some reuse what the model said before."""
    places = set(steps_taken(Tier.FAST, arguments.sample_steps))
    reuse = Reuse(**{"asks": lambda place, _input: place in places, **options})
    made = exact(arguments, attrs.evolve(models, predictor=Reusing(inner=models.predictor, reuse=reuse)))
    return attrs.evolve(made, asked=reuse.asked)


def easy_cache(arguments: GenerateArguments, models: WanModels, threshold: float, estimate: Any = shifted) -> Made:
    """EasyCache; its authors compute the first fifth of the steps of WAN 2.1."""
    steps = arguments.sample_steps
    criterion = EasyCache(steps, threshold, steps // 5)
    return reusing(arguments, models, asks=criterion.asks, learn=criterion.learn, estimate=estimate)


WAYS: Mapping[str, Callable[[GenerateArguments, WanModels], Made]] = {
    "fast tier": fast,
    "all steps in bfloat16": in_bfloat16,
    "fast tier in bfloat16": lambda arguments, models: in_bfloat16(arguments, models, fast),
    "fast tier with fp8 attention": fast_in_fp8,
    "fast tier, inputs as given in fp8": lambda arguments, models: fast_in_fp8(arguments, models, as_given=True),
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
    parser.add_argument("--seeds", type=int, default=1, help="of each prompt (default: %(default)s)")
    parser.add_argument("--only", default="", help="ways whose name contains this")
    given = parser.parse_args()
    directory = find_model(given.ckpt_dir, "wan")
    models = load_models(directory, TASKS["t2v-1.3B"], device=given.device)
    ways = {name: way for name, way in WAYS.items() if given.only in name}
    results: dict[str, list[Likeness]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory() as place:
        for seed, prompt in enumerate(PROMPTS[: given.prompts] * given.seeds):
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
                likeness = Likeness.of(made, wanted)
                results[name].append(likeness)
                print(f"{prompt}: {name}: {made.asked} steps, {likeness.psnr_db:.1f} dB", file=sys.stderr, flush=True)
    print_table(f"of {given.steps} steps, {given.frames} frames", results)


if __name__ == "__main__":
    main()
