"""How like the exact tier SDXL's fast tier is, beside other ways to take as little time.

Prints a table: how many steps asked the UNet, what that costs of all steps' arithmetic at full size, and
the PSNR of the pictures against those of all steps, the mean over some prompts and the worst. With a
model of the shapes that ``examples/models`` draws it also says what share of the shapes and colours that
were asked for are seen::

    python -m benchmarks.sdxl_tiers                                   # the demo model, on a processor
    python -m benchmarks.sdxl_tiers --model DIR --device cuda --prompts 8
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import torch
from attrs import define, frozen
from diffusers import EulerDiscreteScheduler
from ourvidz_sdxl.config import Solver
from ourvidz_sdxl.pipeline import ImageRequest, SdxlPipeline, load_pipeline
from ourvidz_sdxl.references import Samplings
from ourvidz_sdxl.schedulers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from ourvidz_sdxl.settings import SdxlSettings
from ourvidz_sdxl.tiers import FAST
from ourvidz_sdxl.variants import SdxlVariant
from ourvidz_wan.tiers import FAST as WAN_FAST
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu.models import sdxl_unet
from benchmarks.tiers import EasyCache, Likeness, Made, Reuse, half_linear, print_table, shifted, spread, unchanged
from examples.models import measure, scenes
from ourvidz_core.engine.tiers import Tier, TieredScheduler
from ourvidz_core.engine.variants import find_model, read_variant

NEGATIVE = "worst quality, low quality, blurry, text, watermark, logo, signature"
TRAINING_STEPS = 1000


class Euler(TieredScheduler, EulerDiscreteScheduler):  # type: ignore[misc]
    """Euler's method, of some steps."""


@frozen(kw_only=True)
class Costs:
    """The arithmetic of a UNet's forward, as a part of one for both branches of the guidance."""

    both: float = 1.0
    one: float = 0.5
    #: Only the outermost blocks.
    shallow: float

    @classmethod
    def of_full_size(cls) -> Costs:
        """SDXL's at 1024 x 1024."""
        unet = sdxl_unet("meta")
        with torch.device("meta"), torch.no_grad(), FlopCounterMode(unet, display=False, depth=2) as counter:
            options: dict[str, Any] = {"dtype": unet.dtype}
            unet(
                torch.empty(1, 4, 128, 128, **options),
                torch.empty((), **options),
                torch.empty(1, 77, 2048, **options),
                added_cond_kwargs={"text_embeds": torch.empty(1, 1280, **options), "time_ids": torch.empty(1, 6)},
            )
        counts = {name: sum(of.values()) for name, of in counter.get_flop_counts().items()}
        outermost = [counts[f"{type(unet).__name__}.{name}"] for name in ("down_blocks.0", "up_blocks.2")]
        return cls(shallow=sum(outermost) / counter.get_total_flops())


@define
class Call:
    """One forward of the UNet as the pipeline asks for it, and the ways to answer."""

    unet: Any
    costs: Costs
    forward: Callable[..., Any]
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    #: What it has cost.
    cost: float = 0.0

    @property
    def given(self) -> torch.Tensor:
        """The noisy input."""
        given: torch.Tensor = self.arguments[0]
        return given

    @property
    def level(self) -> float:
        """How noisy it is, from 1 to 0."""
        return float(self.arguments[1]) / TRAINING_STEPS

    def ask(self) -> tuple[torch.Tensor]:
        """All of the UNet."""
        self.cost = self.costs.both
        answer: tuple[torch.Tensor] = self.forward(*self.arguments, **self.options)
        return answer

    def ask_without_guidance(self) -> tuple[torch.Tensor]:
        """For the prompt alone."""
        self.cost = self.costs.one

        def half(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: half(one) for name, one in value.items()}
            return value.chunk(2)[1] if isinstance(value, torch.Tensor) and value.dim() else value

        arguments = [half(value) for value in self.arguments]
        options = {name: half(value) for name, value in self.options.items()}
        (answer,) = self.forward(*arguments, **options)
        return (torch.cat([answer, answer]),)

    def ask_shallow(self) -> tuple[torch.Tensor]:
        """The outermost blocks, around what the others made when they last ran."""
        with _kept(self.unet):
            answer = self.ask()
        self.cost = self.costs.shallow
        return answer


@contextmanager
def _kept(unet: Any) -> Iterator[None]:
    """While it is open all blocks but the outermost answer what they last answered."""
    inner = _inner(unet)
    own = [block.forward for block in inner]
    for block in inner:
        block.forward = lambda *_, block=block, **__: block.last_answer
    try:
        yield
    finally:
        for block, forward in zip(inner, own, strict=True):
            block.forward = forward


def _inner(unet: Any) -> list[Any]:
    return [*unet.down_blocks[1:], unet.mid_block, *unet.up_blocks[:-1]]


def _keep_answer(block: Any, _given: Any, answer: Any) -> None:
    block.last_answer = answer


#: Answers a forward at a place, counted from 0.
Answer = Callable[[int, Call], Any]


@define
class Painter:
    """Draws pictures of one model in any way."""

    model: SdxlPipeline
    costs: Costs

    def __attrs_post_init__(self) -> None:
        for block in _inner(self.model.base.unet):
            block.register_forward_hook(_keep_answer)

    def draw(
        self, request: ImageRequest, *, scheduler: Any = None, answer: Answer = lambda _place, call: call.ask()
    ) -> Made:
        """One picture."""
        unet = self.model.base.unet
        forward = unet.forward
        calls: list[Call] = []
        latents = torch.empty(0)

        def watched(*arguments: Any, **options: Any) -> Any:
            call = Call(unet, self.costs, forward, arguments, options)
            calls.append(call)
            return answer(len(calls) - 1, call)

        def sampling(model: SdxlPipeline, request: ImageRequest, own: Any) -> Any:
            return Samplings(SdxlSettings())(model, request, own if scheduler is None else scheduler)

        def keep(_step: int, _total: int, shown: torch.Tensor) -> None:
            nonlocal latents
            latents = shown.clone()

        unet.forward = watched
        try:
            # Recorded on a GPU it would run whole whatever is asked of it.
            with self.model._unet.as_it_came():
                (picture,) = self.model.draw(request, sampling=sampling, on_step=keep).pictures
        finally:
            unet.forward = forward
        cost = sum(call.cost for call in calls)
        asked = sum(call.cost > self.costs.shallow for call in calls)
        return Made(pixels=np.asarray(picture.image()), latents=latents, asked=asked, cost=cost)


Way = Callable[[Painter, ImageRequest], Made]


def exact(painter: Painter, request: ImageRequest) -> Made:
    """All steps."""
    return painter.draw(request)


def fast(painter: Painter, request: ImageRequest) -> Made:
    """The fast tier."""
    return painter.draw(attrs.evolve(request, tier=Tier.FAST))


def taking(choose: Callable[[int], Sequence[int]], kind: Any = UniPCMultistepScheduler) -> Way:
    """Some places of the whole schedule, by a solver."""

    def way(painter: Painter, request: ImageRequest) -> Made:
        scheduler = kind.from_config(painter.model._own_scheduler.config)
        scheduler.places = choose
        return painter.draw(request, scheduler=scheduler)

    return way


def scheduled(count: int, solver: Solver | None = None) -> Way:
    """A schedule of so many steps."""
    return lambda painter, request: painter.draw(
        attrs.evolve(request, num_inference_steps=count, solver=solver or request.solver)
    )


def reusing(places: Callable[[int], Sequence[int]], estimate: Any) -> Way:
    """All steps of the solver, of which others than some reuse what the UNet said before."""

    def way(painter: Painter, request: ImageRequest) -> Made:
        chosen = set(places(request.num_inference_steps))
        reuse = Reuse(asks=lambda place, _: place in chosen, estimate=estimate)
        return painter.draw(request, answer=lambda _, call: reuse.predict(call.given, call.level, call.ask))

    return way


def easy_cache(threshold: float) -> Way:
    """EasyCache; its authors compute the first fifth of the steps."""

    def way(painter: Painter, request: ImageRequest) -> Made:
        criterion = EasyCache(request.num_inference_steps, threshold, request.num_inference_steps // 5)
        reuse = Reuse(asks=criterion.asks, estimate=shifted, learn=criterion.learn)
        return painter.draw(request, answer=lambda _, call: reuse.predict(call.given, call.level, call.ask))

    return way


def deep_cache(interval: int) -> Way:
    """DeepCache (arXiv 2312.00858): in all steps but every ``interval``th only the outermost blocks run."""
    return lambda painter, request: painter.draw(
        request, answer=lambda place, call: call.ask_shallow() if place % interval else call.ask()
    )


def guided(first: float, end: float, way: Callable[[Painter, ImageRequest, Answer], Made]) -> Way:
    """Guidance in a part of the noise levels alone (arXiv 2404.07724)."""

    def answer(_place: int, call: Call) -> Any:
        return call.ask() if end < call.level <= first else call.ask_without_guidance()

    return lambda painter, request: way(painter, request, answer)


def _every_step(painter: Painter, request: ImageRequest, answer: Answer) -> Made:
    return painter.draw(request, answer=answer)


def _fast_steps(painter: Painter, request: ImageRequest, answer: Answer) -> Made:
    return painter.draw(attrs.evolve(request, tier=Tier.FAST), answer=answer)


def ways_for(steps: int) -> Mapping[str, Way]:
    """All ways, by what they are called in the table."""
    count = len(FAST.places(steps))
    return {
        "fast tier": fast,
        "its steps, by DPM-Solver++": taking(FAST.places, DPMSolverMultistepScheduler),
        "its steps, by Euler's method": taking(FAST.places, Euler),
        "all steps, by UniPC": scheduled(steps, Solver.UNIPC),
        f"a schedule of {count} steps": scheduled(count),
        f"a schedule of {count} steps, by UniPC": scheduled(count, Solver.UNIPC),
        f"a schedule of {count} steps, by DPM-Solver++": scheduled(count, Solver.DPM),
        "WAN's fast tier": taking(WAN_FAST.places, Euler),
        "WAN's fast tier, by UniPC": taking(WAN_FAST.places),
        "DeepCache, every 2nd": deep_cache(2),
        "DeepCache, every 3rd": deep_cache(3),
        "DeepCache, every 5th": deep_cache(5),
        **{f"EasyCache, threshold {threshold}": easy_cache(threshold) for threshold in (0.1, 0.2, 0.3)},
        "its steps, in others the last output unchanged": reusing(FAST.places, unchanged),
        "its steps, in others outputs led on by half": reusing(FAST.places, half_linear),
        "no guidance in the last 40%": guided(1.0, 0.4, _every_step),
        "no guidance in the last 20%": guided(1.0, 0.2, _every_step),
        "fast tier, no guidance in the last 20%": guided(1.0, 0.2, _fast_steps),
        **{
            f"{number} steps, the first {first} together": taking(partial(spread, count=number, first=first))
            for number, first in ((8, 1), (10, 1), (11, 1), (12, 1), (14, 1), (count, 2), (count, 3), (count, 4))
        },
    }


@define
class Shown:
    """What the pictures of one way show, of what was asked for."""

    pictures: int = 0
    colours: int = 0
    shapes: int = 0

    def look(self, made: Made, scene: scenes.Scene) -> None:
        """At one more."""
        seen = measure.see_picture(made.pixels)
        self.pictures += 1
        self.colours += seen.colour == scene.colour
        self.shapes += seen.shape == scene.shape

    def __str__(self) -> str:
        return f"{self.colours}, {self.shapes} of {self.pictures}"


def main() -> None:
    """Measure all ways and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("demo"), help="an SDXL model (default: demo)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=25, help="(default: %(default)s)")
    parser.add_argument("--guidance", type=float, default=7.5, help="(default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=16, help="how many (default: %(default)s)")
    parser.add_argument("--solver", type=Solver, help="of the exact tier: unipc or dpm++ (default: the model's own)")
    parser.add_argument("--spacing", help="of the timesteps: leading or trailing (default: the model's own)")
    parser.add_argument("--only", default="", help="ways whose name contains this")
    given = parser.parse_args()
    directory = find_model(given.model, "sdxl")
    variant = read_variant(directory, SdxlVariant)
    model = load_pipeline(directory, device=given.device, variant=variant)
    if given.spacing:
        model._own_scheduler.register_to_config(timestep_spacing=given.spacing)
    painter = Painter(model, Costs.of_full_size())
    ways = {"exact tier": exact, **{n: way for n, way in ways_for(given.steps).items() if given.only in n}}
    results: dict[str, list[Likeness]] = {name: [] for name in ways}
    shown = {name: Shown() for name in ways}
    width, height = variant.size_for(1024, 1024)
    for seed, scene in enumerate(scenes.draw_scenes(given.prompts, 7, video=False, held_out=True)):
        request = ImageRequest(
            prompt=scenes.describe(scene) if seed % 2 else f"a {scene.colour} {scene.shape}",
            negative_prompt=NEGATIVE,
            seeds=(seed,),
            width=width,
            height=height,
            num_inference_steps=given.steps,
            guidance_scale=given.guidance,
            solver=given.solver,
        )
        wanted = exact(painter, request)
        for name, way in ways.items():
            made = wanted if way is exact else way(painter, request)
            likeness = Likeness.of(attrs.evolve(made, cost=made.cost / wanted.cost), wanted)
            results[name].append(likeness)
            shown[name].look(made, scene)
            print(f"{request.prompt}: {name}: {made.asked} steps, {likeness.psnr_db:.1f} dB", file=sys.stderr)
    print_table(
        f"of {given.steps} steps",
        results,
        {
            "cost": {name: f"{np.mean([one.cost for one in found]):.2f}" for name, found in results.items()},
            "colours, shapes": {name: str(one) for name, one in shown.items()},
        },
    )


if __name__ == "__main__":
    main()
