"""What is measured: each row's target and floor, and the sizes of a whole and of a small run."""

from __future__ import annotations

from typing import Any

from attrs import field, frozen

#: An H200's ceilings, measured with PyTorch: bf16 matrix products in TFLOP/s, memory in GB/s.
MATRIX_TFLOPS = 766.0
MEMORY_GBPS = 4180.0

# Floors are arithmetic at those ceilings, as if nothing else took time.
#: WAN 1.3B at 81 frames: a step with guidance is two passes of 276 TFLOP over 32,760 tokens.
WAN_STEP = 2 * 276 / MATRIX_TFLOPS
#: Decoding 81 frames of 480x832 by WAN's autoencoder in bf16.
WAN_DECODE = 0.35
#: WAN at 1 frame: 25 steps that read 2.8 GB of weights twice, and compute on 1,560 tokens.
WAN_FRAME = 0.29
#: SDXL at 1024x1024: a step with guidance is 13.5 TFLOP an image, in 25 steps with the decoding.
SDXL_IMAGE = 25 * 13.5 / MATRIX_TFLOPS
#: Each token reads all of the language model's weights but the table of its words: 14.1 GB.
QWEN_TOKEN = 14.1 / MEMORY_GBPS

#: Device memory that a run is kept to (GiB), the first without any need.
MEMORY_CAPS = (48, 24, 16)


class Skipped(Exception):
    """The row cannot be measured here; the message says why."""


@frozen(kw_only=True)
class Scale:
    """How large everything is."""

    device: str
    is_small: bool
    frames: int = 81
    steps: int = 25
    long_steps: int = 50
    side: int = 1024
    images: int = 6
    tokens: int = 150
    jobs: int = 30
    repeats: int = 3


FULL = Scale(device="cuda", is_small=False)
#: The same ways with models of a few hundred kilobytes on a processor: shows that the benchmark works, and no more.
SMALL = Scale(
    device="cpu", is_small=True, frames=5, steps=2, long_steps=3, side=128, images=3, tokens=8, jobs=3, repeats=1
)


@frozen(kw_only=True)
class Row:
    """One line of the table."""

    name: str
    #: Rows of a group are measured one after another in one process, and share its models.
    group: str
    what: str
    alternative: str = ""
    unit: str = "s"
    target: float | None = None
    #: How many times as fast as the alternative it must be.
    target_ratio: float | None = None
    floor: float | None = None
    is_more_better: bool = False
    #: Seconds after which it is given up, loading the models included.
    limit: float = 150.0


ROWS = (
    Row(
        name="wan81",
        group="wan",
        what="WAN 81 frames, 25 steps, to MP4",
        alternative="diffusers",
        target=25.0,
        target_ratio=1.35,
        floor=25 * WAN_STEP + WAN_DECODE,
        limit=300.0,
    ),
    Row(name="wan_exact", group="wan", what="its latents, relative error", unit="", target=2e-2),
    Row(
        name="wan1",
        group="wan",
        what="WAN 1 frame, 25 steps, to PNG",
        alternative="diffusers",
        target=0.7,
        floor=WAN_FRAME,
    ),
    Row(
        name="wan81_fast",
        group="wan",
        what="WAN 81 frames, 25 steps, fast tier",
        target=12.0,
    ),
    Row(
        name="wan81_fp8",
        group="wan",
        what="WAN 81 frames, 25 steps, fast tier, fp8 attention",
    ),
    Row(
        name="wan81_50",
        group="wan",
        what="WAN 81 frames, 50 steps, to MP4",
        alternative="diffusers (calculated)",
        target=48.0,
        floor=50 * WAN_STEP + WAN_DECODE,
    ),
    Row(
        name="sdxl1",
        group="sdxl",
        what="SDXL 1024, 25 steps, 1 image to PNG",
        alternative="diffusers",
        target=0.8,
        floor=SDXL_IMAGE,
        limit=240.0,
    ),
    Row(
        name="sdxl6",
        group="sdxl",
        what="SDXL 1024, 25 steps, 6 images to PNG",
        alternative="diffusers",
        target=4.0,
        floor=6 * SDXL_IMAGE,
    ),
    Row(
        name="sdxl6_fast",
        group="sdxl",
        what="SDXL 1024, 25 steps, 6 images, fast tier",
    ),
    Row(name="sdxl_exact", group="sdxl_exact", what="its latents, relative error", unit="", target=2e-2),
    Row(
        name="qwen150",
        group="qwen",
        what="Qwen2.5-7B, 150 new tokens",
        alternative="transformers",
        target=1.0,
        floor=150 * QWEN_TOKEN,
    ),
    Row(
        name="exact_small",
        group="exact",
        what="small models in fp32, latents, relative error",
        unit="",
        target=1e-4,
        limit=120.0,
    ),
    *(
        Row(
            name=f"memory{cap}",
            group="memory",
            what=f"SDXL, WAN and Qwen in turns on {cap} GiB, equal to the bit",
            unit="GiB",
            target=float(cap),
        )
        for cap in MEMORY_CAPS
    ),
    Row(
        name="memory_short",
        group="memory",
        what="SDXL 6 images where they do not fit, relative error",
        unit="",
        target=2e-2,
    ),
    Row(
        name="start",
        group="service",
        what="worker start to first SDXL image, warm caches",
        target=30.0,
        limit=400.0,
    ),
    Row(
        name="mixed30",
        group="service",
        what="30 mixed SDXL jobs: GPU busy",
        unit="%",
        target=95.0,
        floor=100.0,
        is_more_better=True,
        limit=300.0,
    ),
    Row(
        name="gpus2",
        group="gpus",
        what="WAN 81 frames on 2 GPUs, times as fast",
        unit="x",
        target=1.9,
        floor=2.0,
        is_more_better=True,
        limit=600.0,
    ),
    Row(
        name="gpus4",
        group="gpus",
        what="WAN 81 frames on 4 GPUs, times as fast",
        unit="x",
        target=3.3,
        floor=4.0,
        is_more_better=True,
        limit=600.0,
    ),
    Row(
        name="sdxl6_gpus2",
        group="sdxl_gpus",
        what="SDXL 6 images on 2 GPUs, times as fast",
        unit="x",
        floor=2.0,
        is_more_better=True,
        limit=600.0,
    ),
)
BY_NAME = {row.name: row for row in ROWS}


@frozen(kw_only=True)
class Measured:
    """What a row came to. Times in seconds, memory in GiB."""

    ours: float
    alternative: float | None = None
    peak: float | None = None
    alternative_peak: float | None = None
    #: What else is worth knowing of how it was measured.
    facts: dict[str, Any] = field(factory=dict)


@frozen(kw_only=True)
class Outcome:
    """A row and what became of it: measured, skipped or failed."""

    row: str
    status: str
    measured: Measured | None = None
    reason: str = ""

    @property
    def ratio(self) -> float | None:
        """How many times as fast as the alternative."""
        made = self.measured
        return made.alternative / made.ours if made is not None and made.alternative and made.ours else None

    @property
    def is_met(self) -> bool | None:
        """Whether the row's targets are met; None where nothing was measured."""
        row, made = BY_NAME[self.row], self.measured
        if made is None:
            return None
        is_met = True
        if row.target is not None:
            is_met = made.ours >= row.target if row.is_more_better else made.ours <= row.target
        if row.target_ratio is not None and self.ratio is not None:
            is_met = is_met and self.ratio >= row.target_ratio
        return is_met


def choose(names: str | None) -> list[Row]:
    """The rows of a comma-separated list, in the order of the table; all of them without one.

    :raises ValueError: a name is unknown.
    """
    if names is None:
        return list(ROWS)
    wanted = {name.strip() for name in names.split(",") if name.strip()}
    if unknown := wanted - set(BY_NAME):
        raise ValueError(f"no row is called {', '.join(sorted(unknown))}; there are {', '.join(BY_NAME)}")
    return [row for row in ROWS if row.name in wanted]
