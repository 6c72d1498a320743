"""Small models in single precision: our latents against plain diffusers', on the same device."""

from __future__ import annotations

from pathlib import Path

import attrs
import torch

from benchmarks.gpu.models import Models
from benchmarks.gpu.rows import SMALL, Measured, Scale
from benchmarks.gpu.sdxl import SdxlExact
from benchmarks.gpu.wan import Wan


class Exact:
    """The larger error of both models."""

    def __init__(self, scale: Scale, models: Models, out: Path) -> None:  # noqa: ARG002 - small models fit everywhere
        self._models = attrs.evolve(models, is_small=True)
        self._out = out

    def measure(self, row: str) -> Measured:  # noqa: ARG002 - there is one
        """On a processor, where everything is in single precision."""
        with torch.no_grad():
            wan = Wan(SMALL, self._models, self._out).measure("wan_exact").ours
            sdxl = SdxlExact(SMALL, self._models, self._out).measure("sdxl_exact").ours
        return Measured(ours=max(wan, sdxl), facts={"wan": wan, "sdxl": sdxl})
