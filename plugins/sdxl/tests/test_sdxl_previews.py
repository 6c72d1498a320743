"""Previews of a running job: what they look like, and that they change nothing of its picture."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from ourvidz_sdxl.pipeline import SdxlPipeline
from PIL import Image
from sdxl_support import job, made, pixels

from ourvidz_core.engine.models import ModelCache
from ourvidz_core.engine.variants import find_model
from ourvidz_core.testing.doubles import RecordingContext


def colours(image: Image.Image) -> NDArray[np.int16]:
    return np.asarray(image.convert("RGB")).astype(np.int16)


def test_the_last_preview_shows_the_picture_which_is_the_same_without(tmp_path: Path) -> None:
    pytest.importorskip("ourvidz_demo_models", reason="ourvidz-demo-models is not installed")
    models = ModelCache()
    a_job = job(prompt="a red fox in the snow", config={"seed": 5, "num_inference_steps": 4, "num_images": 1})
    pictures = []
    for previews in (True, False):
        work_dir = tmp_path / str(previews)
        work_dir.mkdir()
        context = RecordingContext(work_dir, environ={"OURVIDZ_SDXL_MODEL": "demo"}, models=models, previews=previews)
        (artifact,) = made(a_job, context).artifacts
        pictures.append(artifact.path.read_bytes())
        assert (work_dir / "preview.jpg").exists() == previews
    assert pictures[0] == pictures[1]
    final = pixels(artifact)
    last = colours(Image.open(tmp_path / "True" / "preview.jpg"))
    assert final.std() > 10
    assert np.abs(last - final).mean() < 8

    model: SdxlPipeline = models.get(f"sdxl:{find_model(Path('demo'), 'sdxl')}", lambda: pytest.fail("it is cold"))
    latents = model.encode_image(Image.open(io.BytesIO(pictures[0])))
    large = latents.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    sketch = model.sketch(torch.cat([large, torch.randn_like(large)]))
    assert sketch.size == (128, 128)  # no larger, however large the picture will be
    assert np.abs(colours(sketch) - final).mean() < 8
