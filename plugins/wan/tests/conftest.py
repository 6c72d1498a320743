"""Small random-weight models, made once, and the pictures that the tests refer to."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from ourvidz_wan.arguments import GenerateArguments, parse_arguments
from ourvidz_wan.checkpoints import WanModels, load_models
from ourvidz_wan.tasks import TASKS
from PIL import Image

REPOSITORY = Path(__file__).parents[3]
T2V = TASKS["t2v-1.3B"]

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_wan() -> ModuleType:
    """The example that makes the models."""
    spec = importlib.util.spec_from_file_location("tiny_wan", REPOSITORY / "examples" / "models" / "tiny_wan.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def model_dir(tiny_wan: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text-to-video model in the diffusers layout."""
    directory = tmp_path_factory.mktemp("wan") / "tiny"
    tiny_wan.save(tiny_wan.make_pipeline("t2v"), directory)
    return directory


@pytest.fixture(scope="session")
def native_dir(tiny_wan: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model in the layout that WAN was published in."""
    directory = tmp_path_factory.mktemp("wan") / "native"
    tiny_wan.save_native(tiny_wan.make_pipeline("t2v"), directory)
    return directory


@pytest.fixture(scope="session")
def models(model_dir: Path) -> WanModels:
    return load_models(model_dir, T2V)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three different pictures, none of the shape of a video."""
    directory = tmp_path_factory.mktemp("pictures")
    down, right = np.mgrid[0:200, 0:300]
    colours = {
        "lake": (down, right // 2, 255 - down),
        "fire": (255 - down // 2, right // 2, down // 4),
        "rings": tuple(127 + 120 * np.sin(np.hypot(down - 100, right - 150) / pace) for pace in (9, 13, 17)),
    }
    paths = {}
    for name, bands in colours.items():
        paths[name] = directory / f"{name}.png"
        Image.fromarray(np.stack(bands, axis=-1).astype(np.uint8)).save(paths[name])
    return paths


@pytest.fixture
def asking(model_dir: Path, tmp_path: Path) -> Callable[..., GenerateArguments]:
    """Checked arguments of a short video, with the options that a test changes."""

    def ask(**options: object) -> GenerateArguments:
        given = {
            "task": "t2v-1.3B",
            "ckpt_dir": model_dir,
            "prompt": "a lighthouse on a rocky coast",
            "save_file": tmp_path / ("made.png" if options.get("frame_num") == 1 else "made.mp4"),
            "frame_num": 9,
            "sample_steps": 4,
            "base_seed": 5,
            **options,
        }
        return parse_arguments([f"--{name}={value}" for name, value in given.items()])

    return ask
