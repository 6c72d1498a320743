"""What every plugin must do right: as it is installed, and with small models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from ourvidz_core.testing import ConformanceSuite


class TestConformance(ConformanceSuite):
    distribution = "ourvidz-wan-enhanced"


@pytest.mark.slow
class TestConformanceWithModels(ConformanceSuite):
    distribution = "ourvidz-wan-enhanced"
    samples = tuple(
        {"type": name, "prompt": "a lighthouse", "config": {"sample_steps": 2, "frame_num": frames}}
        for name, frames in (
            ("image7b_fast_enhanced", 1),
            ("image7b_high_enhanced", 1),
            ("video7b_fast_enhanced", 5),
            ("video7b_high_enhanced", 5),
        )
    )

    @pytest.fixture(scope="class")
    @classmethod
    def environ(cls, wan_dir: Path, qwen_dir: Path) -> Mapping[str, str]:
        return {"OURVIDZ_WAN_CKPT_DIR": str(wan_dir), "OURVIDZ_ENHANCER_MODEL": str(qwen_dir)}
