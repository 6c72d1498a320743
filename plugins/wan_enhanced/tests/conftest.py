"""Small models of the production architectures, made once, and writers that misbehave as told."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from ourvidz_wan_enhanced.instructions import read_instructions
from ourvidz_wan_enhanced.writers import Task

from ourvidz_core.engine.context import EngineContext
from ourvidz_core.engine.models import ModelCache

REPOSITORY = Path(__file__).parents[3]

torch.set_num_threads(1)


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "examples" / "models" / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tiny_qwen() -> ModuleType:
    """The example that makes language models."""
    return example("tiny_qwen")


@pytest.fixture(scope="session")
def qwen_dir(tiny_qwen: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that chats: it repeats a prompt and adds a light and a movement."""
    directory = tmp_path_factory.mktemp("qwen") / "tiny-qwen"
    tiny_qwen.save(directory)
    return directory


@pytest.fixture(scope="session")
def base_dir(tiny_qwen: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model that does the same, and would go on with the next idea."""
    directory = tmp_path_factory.mktemp("qwen") / "tiny-qwen-base"
    tiny_qwen.save(directory, "base")
    return directory


@pytest.fixture(scope="session")
def babbling_dir(tiny_qwen: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that was taught nothing."""
    directory = tmp_path_factory.mktemp("qwen") / "babbling"
    tiny_qwen.save(directory, is_random=True)
    return directory


@pytest.fixture(scope="session")
def endless_dir(tiny_qwen: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that says words and never ends a sentence."""
    directory = tmp_path_factory.mktemp("qwen") / "endless"
    tiny_qwen.save(directory, addition=tiny_qwen.ADDITION.rstrip("."), is_endless=True)
    return directory


@pytest.fixture(scope="session")
def wan_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text-to-video model."""
    directory = tmp_path_factory.mktemp("wan") / "tiny-wan"
    tiny_wan = example("tiny_wan")
    tiny_wan.save(tiny_wan.make_pipeline("t2v"), directory)
    return directory


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two different pictures."""
    from PIL import Image

    directory = tmp_path_factory.mktemp("pictures")
    paths = {}
    for name, turn in (("lake", 0), ("fire", 90)):
        paths[name] = directory / f"{name}.png"
        Image.radial_gradient("L").rotate(turn).resize((300, 200 + turn)).convert("RGB").save(paths[name])
    return paths


@pytest.fixture
def context_of(tmp_path: Path, wan_dir: Path) -> Callable[..., EngineContext]:
    """The context of a job with these settings of the enhancer."""
    made: list[EngineContext] = []

    def make(*, timeout_seconds: float = 120.0, models: ModelCache | None = None, **settings: object) -> EngineContext:
        work_dir = tmp_path / f"job-{len(made)}"
        work_dir.mkdir()
        environ = {f"OURVIDZ_ENHANCER_{name.upper()}": str(value) for name, value in settings.items()}
        made.append(
            EngineContext(
                work_dir=work_dir,
                models=models or ModelCache(),
                timeout_seconds=timeout_seconds,
                device="cpu",
                environ={"OURVIDZ_WAN_CKPT_DIR": str(wan_dir), **environ},
            )
        )
        return made[-1]

    return make


@pytest.fixture
def task() -> Callable[..., Task]:
    """A task with what the test says instead."""

    def make(**changes: object) -> Task:
        given = {
            "prompt": "a lighthouse on a rocky coast at sunset",
            "instruction": read_instructions().video,
            "seed": 5,
            "max_tokens": 64,
            "temperature": 0.7,
            "top_p": 0.8,
            **changes,
        }
        return Task(**given)

    return make
