"""What every plugin must do right: as it is installed, and with a small model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from ourvidz_core.testing import ConformanceSuite


class TestConformance(ConformanceSuite):
    distribution = "ourvidz-wan"


@pytest.mark.slow
class TestConformanceWithModels(ConformanceSuite):
    distribution = "ourvidz-wan"
    samples = tuple(
        {"type": name, "prompt": "a lighthouse", "config": {"sample_steps": 2, "frame_num": frames}}
        for name, frames in (("image_fast", 1), ("image_high", 1), ("video_fast", 5), ("video_high", 5))
    )

    @pytest.fixture(scope="class")
    @classmethod
    def environ(cls, model_dir: Path) -> Mapping[str, str]:
        return {"OURVIDZ_WAN_CKPT_DIR": str(model_dir)}


@pytest.mark.slow
class TestConformanceAsSubprocess(TestConformanceWithModels):
    @pytest.fixture(scope="class")
    @classmethod
    def environ(cls, model_dir: Path) -> Mapping[str, str]:
        return {"OURVIDZ_WAN_CKPT_DIR": str(model_dir), "OURVIDZ_WAN_RUN_AS": "subprocess"}
