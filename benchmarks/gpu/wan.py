"""WAN's rows: ``wan_generate``'s arguments to a file, with our models and with plain diffusers."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from benchmarks.gpu.clock import Timed, allocated, relative_error, timed, wait_for
from benchmarks.gpu.models import Models
from benchmarks.gpu.rows import Measured, Scale

TASK = "t2v-1.3B"
GUIDANCE, SHIFT, SEED = 5.0, 5.0, 7
NEGATIVE = "blurry, low quality, static"
#: Steps of a run that only warms up.
WARM_STEPS = 2


class Wan:
    """Both models, loaded when a row first needs them, and the files that were made."""

    def __init__(self, scale: Scale, models: Models, out: Path) -> None:
        self._scale = scale
        self._directory = models.wan()
        self._out = out
        self._prompts = 0
        self._latents: dict[str, torch.Tensor] = {}
        self._warm: set[int] = set()
        self._exact: Path | None = None
        self._exact_prompt = 0
        #: Seconds of our last run from its last decoded frame to its whole file.
        self._tail_seconds = 0.0
        #: Seconds of diffusers' video: until its latents were there, and all of it.
        self._plain_parts: tuple[float, float] | None = None

    def measure(self, row: str) -> Measured:
        """The row of this name."""
        return {
            "wan81": self._video,
            "wan_exact": self._error,
            "wan1": self._image,
            "wan81_fast": self._fast,
            "wan81_fp8": lambda: self._fast("--fp8_attention=true"),
            "wan81_50": self._long,
        }[row]()

    def _video(self) -> Measured:
        scale = self._scale
        self._warm_up(scale.frames)
        ours = self._timed_ours(scale.frames, scale.steps)
        self._exact, self._exact_prompt = Path(ours.value.path), self._prompts
        self._run_plain(scale.frames, WARM_STEPS, ours.value)
        held = allocated(scale.device)
        plain = timed(
            lambda: self._run_plain(scale.frames, scale.steps, ours.value),
            scale.device,
            elsewhere=held - self._plain_bytes,
        )
        self._plain_parts = (plain.value, plain.seconds)
        return Measured(
            ours=ours.seconds,
            alternative=plain.seconds,
            peak=ours.peak,
            alternative_peak=plain.peak,
            facts={"diffusers_denoising_seconds": plain.value, **self._facts(ours.value)},
        )

    def _image(self) -> Measured:
        scale = self._scale
        self._warm_up(1)
        ours = self._timed_ours(1, scale.steps, repeats=scale.repeats)
        self._run_plain(1, WARM_STEPS, ours.value)
        held = allocated(scale.device)
        plain = timed(
            lambda: self._run_plain(1, scale.steps, ours.value),
            scale.device,
            elsewhere=held - self._plain_bytes,
        )
        return Measured(
            ours=ours.seconds,
            alternative=plain.seconds,
            peak=ours.peak,
            alternative_peak=plain.peak,
            facts={"latent_error": self._latent_error(), **self._facts(ours.value)},
        )

    def _long(self) -> Measured:
        self._warm_up(self._scale.frames)
        ours = self._timed_ours(self._scale.frames, self._scale.long_steps)
        calculated = None
        if self._plain_parts is not None:
            denoising, whole = self._plain_parts
            calculated = whole + denoising * (self._scale.long_steps / self._scale.steps - 1)
        return Measured(ours=ours.seconds, alternative=calculated, peak=ours.peak, facts=self._facts(ours.value))

    def _fast(self, *options: str) -> Measured:
        from ourvidz_wan.video import read_video

        scale = self._scale
        self._warm_up(scale.frames)
        if self._exact is None:
            self._exact = self._run_ours(scale.frames, scale.steps, prompt=0).path
        options = ("--tier=fast", *options)
        self._run_ours(scale.frames, WARM_STEPS, *options)
        ours = self._timed_ours(scale.frames, scale.steps, *options, prompt=self._exact_prompt)
        # Of the files, so that what the encoder changes is part of it on both sides.
        error = np.mean((read_video(ours.value.path).astype(np.float32) - read_video(self._exact)) ** 2)
        psnr = float(10 * np.log10(255**2 / max(float(error), 1e-10)))
        return Measured(ours=ours.seconds, peak=ours.peak, facts={"psnr_db": psnr, **self._facts(ours.value)})

    def _error(self) -> Measured:
        """Beside it, of one frame, how far both are from single precision: plain half precision is off as well."""
        if {"ours", "plain"} - self._latents.keys() or self._latents["ours"].shape != self._latents["plain"].shape:
            made = self._run_ours(self._scale.frames, WARM_STEPS + 1, prompt=0)
            self._run_plain(self._scale.frames, WARM_STEPS + 1, made)
        error = self._latent_error()
        made = self._run_ours(1, self._scale.steps, prompt=0)
        ours = self._latents["ours"]
        plain, true = (
            pipeline(**self._asked(1, self._scale.steps, made), output_type="latent").frames
            for pipeline in (self._plain, self._plain_in_single_precision())
        )
        facts = {
            "frame_ours_to_plain": relative_error(ours, plain),
            "frame_ours_to_fp32": relative_error(ours, true),
            "frame_plain_to_fp32": relative_error(plain, true),
        }
        return Measured(ours=error, facts=facts)

    def _plain_in_single_precision(self) -> Any:
        """With the same weights; the texts are those that plain diffusers' encoder makes."""
        parts = {**self._plain.components, "transformer": copy.deepcopy(self._plain.transformer).float()}
        pipeline = type(self._plain)(**parts)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    @cached_property
    def _ours(self) -> Any:
        from ourvidz_wan.checkpoints import load_models
        from ourvidz_wan.tasks import TASKS

        return load_models(self._directory, TASKS[TASK], device=self._scale.device)

    @cached_property
    def _plain(self) -> Any:
        from diffusers import AutoencoderKLWan, WanPipeline

        before = allocated(self._scale.device)
        # As its own page says: the decoder in single precision, the rest in half.
        vae_class: Any = AutoencoderKLWan
        vae = vae_class.from_pretrained(self._directory / "vae", torch_dtype=torch.float32)
        dtype = torch.float32 if self._scale.device == "cpu" else torch.bfloat16
        pipeline = WanPipeline.from_pretrained(self._directory, vae=vae, torch_dtype=dtype).to(self._scale.device)
        pipeline.set_progress_bar_config(disable=True)
        self._plain_bytes = allocated(self._scale.device) - before
        return pipeline

    def _warm_up(self, frames: int) -> None:
        if frames not in self._warm:
            self._run_ours(frames, WARM_STEPS)
            self._warm.add(frames)

    def _timed_ours(
        self, frames: int, steps: int, *options: str, repeats: int = 1, prompt: int | None = None
    ) -> Timed[Any]:
        plain_bytes = self._plain_bytes if "_plain" in self.__dict__ else 0
        return timed(
            lambda: self._run_ours(frames, steps, *options, prompt=prompt),
            self._scale.device,
            repeats=repeats,
            elsewhere=plain_bytes,
        )

    def _run_ours(self, frames: int, steps: int, *options: str, prompt: int | None = None) -> Any:
        """One command line, with a prompt that no run had before unless ``prompt`` says which."""
        from ourvidz_wan.arguments import parse_arguments
        from ourvidz_wan.generate import generate

        self._prompts += 1
        path = self._out / f"ours-{self._prompts}.{'png' if frames == 1 else 'mp4'}"
        given = {
            "task": TASK,
            "ckpt_dir": self._directory,
            "prompt": _prompt(self._prompts if prompt is None else prompt),
            "negative_prompt": NEGATIVE,
            "save_file": path,
            "size": "480*832",
            "frame_num": frames,
            "sample_steps": steps,
            "sample_guide_scale": GUIDANCE,
            "sample_shift": SHIFT,
            "base_seed": SEED,
            "device": self._scale.device,
        }
        models = self._ours
        argv = [f"--{name}={value}" for name, value in given.items()]
        with _recorded(self._latents):
            generated = generate(parse_arguments([*argv, *options]), models, lambda _step, _total: None)
        decoded = time.perf_counter()
        generated.write()
        self._tail_seconds = time.perf_counter() - decoded
        self._last_prompt = given["prompt"]
        return generated.result

    def _run_plain(self, frames: int, steps: int, like: Any) -> float:
        """What diffusers makes of the last prompt, in the size of the result ``like``, written to a file as ours is.

        The seconds until the latents were there.
        """
        from ourvidz_wan.video import write_video
        from PIL import Image

        started = denoised = time.perf_counter()

        def keep(_pipeline: Any, step: int, _time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            nonlocal denoised
            self._latents["plain"] = tensors["latents"]
            if step == steps - 1:
                wait_for(self._scale.device)
                denoised = time.perf_counter()
            return {}

        asked = self._asked(frames, steps, like)
        video = self._plain(**asked, output_type="np", callback_on_step_end=keep).frames[0]
        pictures = (video * 255).round().astype(np.uint8)
        if frames == 1:
            Image.fromarray(pictures[0]).save(self._out / "plain.png")
        else:
            write_video(pictures, self._out / "plain.mp4", {}, fps=16)
        return denoised - started

    def _asked(self, frames: int, steps: int, like: Any) -> dict[str, Any]:
        return {
            "prompt": self._last_prompt,
            "negative_prompt": NEGATIVE,
            "width": like.width,
            "height": like.height,
            "num_frames": frames,
            "num_inference_steps": steps,
            "guidance_scale": GUIDANCE,
            "generator": torch.Generator("cpu").manual_seed(SEED),
        }

    def _latent_error(self) -> float:
        return relative_error(self._latents["ours"], self._latents["plain"])

    def _facts(self, made: Any) -> dict[str, Any]:
        known = ("size", "frame_num", "steps")
        facts = {name: value for name, value in made.facts.items() if name not in known and _is_of_speed(name)}
        return {**facts, "file_mb": made.path.stat().st_size / 1e6, "tail_seconds": self._tail_seconds}


def _prompt(number: int) -> str:
    return f"a lighthouse on a rocky coast, wave number {number}"


def _is_of_speed(name: str) -> bool:
    return any(part in name for part in ("attention", "compil", "tier", "computed", "kernel", "graph", "cache", "gpus"))


@contextlib.contextmanager
def _recorded(latents: dict[str, torch.Tensor]) -> Iterator[None]:
    """Keeps the latents that ``generate`` decodes; a result of it has only the file."""
    from ourvidz_wan import sampling

    original = sampling.make_latents

    def make_latents(*arguments: Any, **options: Any) -> Any:
        made = original(*arguments, **options)
        latents["ours"] = made.latents
        return made

    with mock.patch.object(sampling, "make_latents", make_latents):
        yield
