"""The tiny model, built once for all tests, and contexts that use it."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# Other suites have modules of their own beside their conftest, so ours has a name of its own.
sys.path.insert(0, str(Path(__file__).parent))

from sdxl_support import load_example

from ourvidz_core.engine.models import ModelCache
from ourvidz_core.settings import variable_of
from ourvidz_core.testing.doubles import RecordingContext


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """The machines that run the tests are small and shared."""
    import torch

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning, module="diffusers")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as a directory."""
    directory = tmp_path_factory.mktemp("models") / "tiny-sdxl"
    example = load_example("tiny_sdxl")
    example.save_directory(example.build_pipeline(), directory)
    return directory


@pytest.fixture(scope="session")
def warm_models() -> ModelCache:
    return ModelCache()


@pytest.fixture
def new_context(tmp_path: Path, tiny_model: Path, warm_models: ModelCache) -> Callable[..., RecordingContext]:
    """Makes a context whose settings name the tiny model; keywords are further settings."""
    made = 0

    def make(
        models: ModelCache = warm_models,
        kind: type[RecordingContext] = RecordingContext,
        device: str = "cpu",
        **settings: Any,
    ) -> RecordingContext:
        nonlocal made
        made += 1
        work_dir = tmp_path / f"work-{made}"
        work_dir.mkdir()
        environ = {variable_of(name, "sdxl"): str(value) for name, value in {"model": tiny_model, **settings}.items()}
        return kind(work_dir, environ=environ, models=models, device=device, timeout_seconds=600.0)

    return make


@pytest.fixture(scope="session")
def reference_png(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture wider than high, with a bright disc in its middle."""
    import numpy as np
    from PIL import Image

    y, x = np.mgrid[0:200, 0:320]
    disc = np.hypot(x - 160, y - 100) < 60
    pixels = np.stack([x * 255 / 319, y * 255 / 199, np.where(disc, 255, 40)], axis=-1)
    path = tmp_path_factory.mktemp("references") / "reference.png"
    Image.fromarray(pixels.astype("uint8")).save(path)
    return path
