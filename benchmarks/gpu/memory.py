"""All models in turns on a smaller device: how much they take, what the turns cost, and that nothing changes for it.

The allocator is held to the cap for real; the pool's budget is what an operator would set on such a card: a little
less, for the CUDA context and what libraries take past the allocator. On a processor the device is a part of main
memory, the budgets are shares of what the small models take, and weights really move between the two.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import attrs
import numpy as np
import torch
from attrs import define, field, frozen

from benchmarks.gpu.clock import GIB, allocated, relative_error, wait_for
from benchmarks.gpu.models import Models, payload
from benchmarks.gpu.rows import MEMORY_CAPS, Measured, Scale
from ourvidz_core.engine.context import EngineContext
from ourvidz_core.engine.device_memory import release_memory
from ourvidz_core.engine.models import ModelCache
from ourvidz_core.engine.perform import perform
from ourvidz_core.engine.working_memory import FILE_NAME
from ourvidz_core.plugins.loading import load_registry
from ourvidz_core.settings import load
from ourvidz_core.wire.artifacts import FinishedGeneration
from ourvidz_core.wire.payloads import structure_payload

#: For the CUDA context and what libraries take past the allocator (GiB).
BESIDE = 1.0
#: The share of the small models that fits under each cap.
SMALL_SHARES = {48: 2.0, 24: 0.7, 16: 0.5}
ROUND = ("sdxl_image_fast", "image_fast", "image7b_fast_enhanced")
ROUNDS, STEPS, SEED = 2, 4, 7
#: With random weights the writer never ends by itself.
TOKENS = 32
JOB_SECONDS = 120.0
#: Where memory is short: this share of what six images take at once, and no less than one picture's decoding needs.
SHORT_SHARE, DECODE_SHARE = 0.6, 1.1
SPARE = 0.2


@define
class _Made:
    """What came of a run, in the order of its jobs."""

    pictures: list[np.ndarray[Any, Any]] = field(factory=list)
    texts: list[str] = field(factory=list)
    seconds: list[float] = field(factory=list)
    #: The most that was allocated (GiB), None without a GPU.
    allocated: float | None = None
    facts: dict[str, Any] = field(factory=dict)


@frozen
class _Reserved:
    """The most that the allocator held at once (bytes)."""

    seen: list[int] = field(factory=lambda: [0])

    def look(self) -> None:
        if torch.cuda.is_available():
            self.seen.append(torch.cuda.max_memory_reserved())

    @property
    def bytes(self) -> int:
        self.look()
        return max(self.seen)


class Memory:
    """A fresh engine's models for each row, in the same process."""

    def __init__(self, scale: Scale, models: Models, out: Path) -> None:
        self._scale = scale
        self._out = out
        self._environ = {
            "OURVIDZ_SDXL_MODEL": str(models.sdxl()),
            "OURVIDZ_SDXL_UNKNOWN_VARIANT": "default",
            "OURVIDZ_WAN_CKPT_DIR": str(models.wan()),
            "OURVIDZ_ENHANCER_MODEL": str(models.qwen()),
            "OURVIDZ_ENHANCER_MAX_TOKENS": str(TOKENS),
            "OURVIDZ_ENHANCER_DEADLINE_SECONDS": str(JOB_SECONDS / 2),
            "OURVIDZ_ENHANCER_CACHE_SIZE": "0",
            # Compiling says nothing of memory and would take most of the time.
            "OURVIDZ_COMPILE": "off",
        }
        os.environ.update(self._environ)
        self._registry = load_registry(load(self._environ))
        self._numbers = iter(range(1000))
        self._reference: _Made | None = None
        #: What the small models take together (GiB).
        self._weights = 0.0

    def measure(self, row: str) -> Measured:
        """The row of this name."""
        if row == "memory_short":
            return self._short()
        cap = int(row.removeprefix("memory"))
        if self._reference is None and cap != MEMORY_CAPS[0]:
            self._reference, _ = self._rounds(MEMORY_CAPS[0])
        made, reserved = self._rounds(cap)
        if self._reference is None:
            self._reference = made
        facts = {**_compared(made, self._reference), **made.facts}
        if not facts.pop("is_equal"):
            raise RuntimeError(f"not what {MEMORY_CAPS[0]} GiB make: {facts}, {reserved:.2f} GiB reserved")
        return Measured(ours=reserved, peak=made.allocated, facts=facts)

    def _rounds(self, cap: int) -> tuple[_Made, float]:
        """All jobs under a cap, and the GiB that the allocator held at most."""
        made = _Made()
        reserved = _Reserved()
        with self._opened(self._budget(cap)) as cache, _capped(cap * GIB), _written(made.texts), _recorded(reserved):
            for number in range(ROUNDS):
                started = time.perf_counter()
                for place, job_type in enumerate(ROUND):
                    finished = self._perform(cache, job_type, f"wave number {number}-{place}")
                    self._keep(made, finished)
                wait_for(self._scale.device)
                made.seconds.append(time.perf_counter() - started)
            for number, seconds in enumerate(made.seconds, start=1):
                made.facts[f"round_{number}_seconds"] = seconds
            made.facts |= _facts_of(cache)
            made.facts["on_device_at_the_end"] = "+".join(name.rpartition("/")[2] for name in cache.on_device)
            if not self._weights:
                self._weights = sum(cache.on_device.values()) / GIB
            return made, reserved.bytes / GIB

    def _short(self) -> Measured:
        """Six images with the whole device, then as if never measured where six at once do not fit."""
        images, wish = self._scale.images, "where memory is short"
        whole, state = _Made(), self._out / "state-whole"
        with self._opened(None, state) as cache:
            self._keep(whole, self._perform(cache, ROUND[0], wish, num_images=images))
            weights = sum(cache.on_device.values())
        taken = _taken(state / FILE_NAME)
        held = weights + allocated(self._scale.device)
        cap = held + round(max(SHORT_SHARE * taken["denoise"], DECODE_SHARE * taken["decode"] + SPARE * GIB))
        reserved, small, batches, seconds, before = _Reserved(), _Made(), [], [], _times_run_out()
        with self._opened(None) as cache, _capped(cap), _recorded(reserved), self._too_small():
            for _ in range(ROUNDS):
                small.pictures.clear()
                started = time.perf_counter()
                finished = self._perform(cache, ROUND[0], wish, num_images=images)
                seconds.append(f"{time.perf_counter() - started:.2f}")
                self._keep(small, finished)
                batches.append("+".join(map(str, finished.generation.facts["batch_sizes"])))
        difference = np.abs(np.stack(small.pictures).astype(int) - np.stack(whole.pictures))
        facts = {
            "cap_gib": cap / GIB,
            "weights_gib": weights / GIB,
            **{f"{name}_gib": size / GIB for name, size in taken.items()},
            "reserved_gib": reserved.bytes / GIB,
            "ran_out": _times_run_out() - before,
            "batches": " then ".join(batches),
            "seconds": " then ".join(seconds),
            "largest_difference": int(difference.max()),
            # What pictures come to that have nothing to do with each other.
            "of_other_seeds": _error(whole.pictures[:1], whole.pictures[1:2]),
        }
        if not self._scale.is_small and not facts["ran_out"]:
            raise RuntimeError(f"memory did not run out: {facts}")
        return Measured(ours=_error(small.pictures, whole.pictures), peak=small.allocated, facts=facts)

    def _budget(self, cap: int) -> float:
        """GiB, as an operator would set them."""
        if not self._scale.is_small:
            return cap - BESIDE
        return SMALL_SHARES[cap] * self._weights if self._weights else float(cap)

    @contextlib.contextmanager
    def _opened(self, budget_gb: float | None, state: Path | None = None) -> Iterator[ModelCache]:
        """An engine's models, which nothing is known of yet. What an earlier row's failure held goes first."""
        release_memory()
        state = state or self._out / f"state-{next(self._numbers)}"
        if self._scale.is_small:
            cache = ModelCache(budget_gb, find_device=lambda: torch.device("cpu"))
        else:
            cache = ModelCache.of(load(self._environ, vram_budget_gb=budget_gb, state_dir=state))
        try:
            yield cache
        finally:
            cache.clear()
            cache.release()

    def _perform(self, cache: ModelCache, job_type: str, wish: str, **config: int) -> FinishedGeneration:
        work_dir = self._out / f"job-{next(self._numbers)}"
        work_dir.mkdir()
        steps = min(STEPS, self._scale.steps)
        name = "num_inference_steps" if job_type.startswith("sdxl") else "sample_steps"
        config = {name: steps, "seed": SEED, "num_images": 1, **config}
        message = payload(job_type, prompt=f"a lighthouse on a rocky coast, {wish}", config=config)
        job = self._registry.get(job_type).parse_job(structure_payload(message))
        context = EngineContext(
            work_dir=work_dir,
            models=cache,
            timeout_seconds=JOB_SECONDS,
            device=self._scale.device,
            environ=self._environ,
        )
        return perform(self._registry, job, context)

    def _keep(self, made: _Made, finished: FinishedGeneration) -> None:
        from PIL import Image

        made.pictures += [np.asarray(Image.open(artifact.path)) for artifact in finished.generation.artifacts]
        if (gib := finished.device_facts.get("vram_used_gb")) is not None:
            made.allocated = max(made.allocated or 0.0, gib)
        said = str(finished.job.facts.get("enhancement", ""))
        if said:
            made.facts["enhancement"] = said
        if "memory" in said:
            raise RuntimeError(f"the prompt was not enhanced: {said}")

    @contextlib.contextmanager
    def _too_small(self) -> Iterator[None]:
        """A processor never lacks memory for tiny models, so there its lack is made up: two images are too many."""
        if not self._scale.is_small:
            yield
            return
        from ourvidz_sdxl.pipeline import SdxlPipeline

        original = SdxlPipeline._sampled

        def sampled(pipeline: Any, request: Any, conditioning: Any, way: Any, seeds: Any, on_step: Any) -> Any:
            def make() -> torch.Tensor:
                raise torch.OutOfMemoryError("made up")

            if len(seeds) > 1:
                return pipeline._unless_out_of_memory(make)
            return original(pipeline, request, conditioning, way, seeds, on_step)

        with mock.patch.object(SdxlPipeline, "_sampled", sampled):
            yield


@contextlib.contextmanager
def _capped(cap_bytes: int) -> Iterator[None]:
    """Hold torch's allocator to so many bytes of the device, weights, graphs and gaps included."""
    if not torch.cuda.is_available():
        yield
        return
    torch.cuda.empty_cache()
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction(min(cap_bytes / total, 1.0))
    torch.cuda.reset_peak_memory_stats()
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@contextlib.contextmanager
def _recorded(reserved: _Reserved) -> Iterator[None]:
    """See every peak before the engine, which measures each operation, begins its figures anew."""
    original = torch.cuda.reset_peak_memory_stats

    def reset(*arguments: Any, **options: Any) -> None:
        reserved.look()
        original(*arguments, **options)

    with mock.patch.object(torch.cuda, "reset_peak_memory_stats", reset):
        yield


@contextlib.contextmanager
def _written(texts: list[str]) -> Iterator[None]:
    """Keeps what the language model says, whatever becomes of it."""
    from ourvidz_wan_enhanced.local import LocalWriter

    original = LocalWriter.write

    def write(writer: Any, task: Any, effort: Any) -> Any:
        draft = original(writer, task, effort)
        texts.append(draft.text)
        return draft

    with mock.patch.object(LocalWriter, "write", write):
        yield


def _facts_of(cache: ModelCache) -> dict[str, Any]:
    traffic = cache.traffic
    facts: dict[str, Any] = attrs.asdict(
        traffic, filter=lambda of, _value: not of.name.endswith(("_bytes", "_seconds"))
    )
    if traffic.to_host_bytes:
        facts["to_host_gib"] = traffic.to_host_bytes / GIB
        facts["pinned_gib"] = traffic.pinned_bytes / GIB
        # The time to pin it included; weights whose copy was kept take next to none.
        facts["to_host_gib_per_second"] = facts["to_host_gib"] / traffic.to_host_seconds
    if traffic.to_device_bytes:
        facts["to_device_gib"] = traffic.to_device_bytes / GIB
        facts["to_device_gib_per_second"] = facts["to_device_gib"] / traffic.to_device_seconds
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        # Other processes of the same GPU included.
        facts["past_the_allocator_gib"] = (total - free - torch.cuda.memory_reserved()) / GIB
    return facts


def _taken(file: Path) -> dict[str, int]:
    """What SDXL's operations took beside the weights (bytes), as the pool remembers it; 0 where it measures nothing."""
    found = {"denoise": 0, "decode": 0}
    for record in json.loads(file.read_text("utf-8")) if file.exists() else ():
        if record["name"] in found:
            found[record["name"]] = max(found[record["name"]], record["peak_bytes"])
    return found


def _times_run_out() -> int:
    """How often torch's allocator had nothing left to give."""
    return int(torch.cuda.memory_stats().get("num_ooms", 0)) if torch.cuda.is_available() else 0


def _compared(made: _Made, reference: _Made) -> Mapping[str, Any]:
    """Which pictures and texts differ."""
    different = [
        f"{number} by {_error([ours], [theirs]):.1e}"
        for number, (ours, theirs) in enumerate(zip(made.pictures, reference.pictures, strict=True), start=1)
        if not np.array_equal(ours, theirs)
    ]
    is_same_text = made.texts == reference.texts and bool(made.texts)
    return {
        "is_equal": is_same_text and not different,
        "pictures": f"{len(made.pictures)} equal" if not different else f"different: {', '.join(different)}",
        "texts": f"{len(made.texts)} equal" if is_same_text else "different",
    }


def _error(ours: list[np.ndarray[Any, Any]], theirs: list[np.ndarray[Any, Any]]) -> float:
    return relative_error(*(torch.from_numpy(np.stack(pictures)) for pictures in (ours, theirs)))
