"""Keep SDXL models warm in a process, the same way in the engine and in the ranks beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ourvidz_core.engine.variants import read_variant
from ourvidz_core.plugins.context import Models
from ourvidz_sdxl.pipeline import SdxlPipeline, load_pipeline
from ourvidz_sdxl.settings import SdxlSettings
from ourvidz_sdxl.variants import SdxlVariant


def warm_pipeline(
    models: Models,
    path: Path,
    settings: SdxlSettings,
    device: str,
    *,
    on_leave: Callable[[], None] = lambda: None,
) -> SdxlPipeline:
    """The model at ``path`` on ``device``, loaded where it is not warm; ``on_leave`` is called when it has to leave.

    :raises ModelUnavailable: it cannot be loaded.
    """

    def load() -> SdxlPipeline:
        variant = read_variant(path, SdxlVariant)
        return load_pipeline(path, device=device, variant=variant, config_dir=settings.config_dir)

    def leave(leaving: SdxlPipeline, _part: str) -> None:
        leaving.forget_graphs()
        on_leave()

    key = f"sdxl:{path}"
    model = models.get(key, load, vram_gb=_size_gb(path), on_leave=leave)
    model.residence = models.residence(key)
    return model


def _size_gb(path: Path) -> float:
    files = path.rglob("*.safetensors") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file()) / 2**30
