"""What every plugin must do right: as it is installed, and with a small model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from ourvidz_core.testing import ConformanceSuite


class TestConformance(ConformanceSuite):
    distribution = "ourvidz-sdxl"


@pytest.mark.slow
class TestConformanceWithModels(ConformanceSuite):
    distribution = "ourvidz-sdxl"
    samples = tuple(
        {"type": name, "prompt": "a lighthouse", "config": {"num_inference_steps": 2, "num_images": 3}}
        for name in ("sdxl_image_fast", "sdxl_image_high")
    )

    @pytest.fixture(scope="class")
    @classmethod
    def environ(cls, tiny_model: Path) -> Mapping[str, str]:
        return {"OURVIDZ_SDXL_MODEL": str(tiny_model)}
