"""The language model's row: a prompt rewritten by our writer, and as many tokens by plain transformers."""

from __future__ import annotations

import gc
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.clock import GIB, Timed, allocated, timed
from benchmarks.gpu.models import Models
from benchmarks.gpu.rows import Measured, Scale

#: What Qwen2.5 ships as its own way to generate.
SAMPLED = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05}
PROMPT = "a lighthouse on a rocky coast at sunset"
#: A random model may end by chance; then it is asked with another seed.
SEEDS = 8


class Qwen:
    """Our writer, then the plain model."""

    def __init__(self, scale: Scale, models: Models, out: Path) -> None:  # noqa: ARG002 - it writes no files
        self._scale = scale
        self._directory = models.qwen()

    def measure(self, row: str) -> Measured:  # noqa: ARG002 - there is one
        """Both, one after the other, so that each has the memory to itself."""
        scale = self._scale
        ours, read = self._ours()
        gc.collect()
        left = allocated(scale.device)
        plain = self._plain(read)
        facts = {"tokens": ours.value.tokens, "tokens_read": read}
        if (decoding := getattr(ours.value, "decoding", None)) is not None:
            facts["decoding"] = decoding
        return Measured(
            ours=ours.seconds,
            alternative=plain.seconds,
            peak=ours.peak,
            alternative_peak=None if plain.peak is None else plain.peak - left / GIB,
            facts=facts,
        )

    def _ours(self) -> tuple[Timed[Any], int]:
        """The writer's time, and how many tokens it reads. Nothing of the writer is left."""
        from ourvidz_wan_enhanced.local import load_writer

        writer = load_writer(self._directory, device=self._scale.device)
        seed, read = self._seed(writer)
        return timed(partial(self._write, writer, seed), self._scale.device, repeats=self._scale.repeats), read

    def _write(self, writer: Any, seed: int) -> Any:
        from ourvidz_wan_enhanced.effort import Effort
        from ourvidz_wan_enhanced.instructions import read_instructions
        from ourvidz_wan_enhanced.writers import Task

        task = Task(
            prompt=PROMPT,
            instruction=read_instructions().video,
            seed=seed,
            max_tokens=self._scale.tokens,
            temperature=0.7,
            top_p=0.8,
        )
        return writer.write(task, Effort(600.0))

    def _seed(self, writer: Any) -> tuple[int, int]:
        """A seed with which all tokens are said, and how many are read. Warms up on the way."""
        from ourvidz_wan_enhanced.instructions import read_instructions

        read = len(writer.encode(read_instructions().video, PROMPT))
        for seed in range(SEEDS):
            if self._write(writer, seed).tokens == self._scale.tokens:
                return seed, read
        raise RuntimeError(f"the model ends before {self._scale.tokens} tokens with each of {SEEDS} seeds")

    def _plain(self, read: int) -> Any:
        from transformers import AutoModelForCausalLM

        scale = self._scale
        dtype = torch.float32 if scale.device == "cpu" else torch.bfloat16
        model = AutoModelForCausalLM.from_pretrained(self._directory, dtype=dtype, device_map={"": scale.device})
        given = torch.randint(0, 200, (1, read), device=scale.device)

        def generate(tokens: int) -> None:
            torch.manual_seed(0)
            made = model.generate(
                given, attention_mask=torch.ones_like(given), max_new_tokens=tokens, min_new_tokens=tokens, **SAMPLED
            )
            assert made.shape[1] == read + tokens

        generate(4)
        return timed(lambda: generate(scale.tokens), scale.device)
