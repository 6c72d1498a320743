"""What a worker with --preload does for SDXL: the first job finds its model loaded and tried."""

from __future__ import annotations

from pathlib import Path

from ourvidz_sdxl import plugin
from ourvidz_sdxl.job_types import JOB_TYPES

from ourvidz_core.engine.models import ModelCache
from ourvidz_core.testing.doubles import RecordingContext


def test_warming_up_loads_the_model_and_draws_one_step(tmp_path: Path, tiny_model: Path) -> None:
    models = ModelCache()
    context = RecordingContext(tmp_path, environ={"OURVIDZ_SDXL_MODEL": str(tiny_model)}, models=models)

    plugin.warm_up(context=context, job_types=JOB_TYPES)

    assert models.keys == (f"sdxl:{tiny_model}",)
    assert context.steps == [("generate", 1, 1)]
    assert not list(tmp_path.iterdir())
