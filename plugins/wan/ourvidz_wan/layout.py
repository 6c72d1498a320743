"""The files that WAN was published as. Light: checks read it without torch."""

from __future__ import annotations

from pathlib import Path

NATIVE_TRANSFORMER = "diffusion_pytorch_model"
NATIVE_TEXT_ENCODER = "models_t5_umt5-xxl-enc-bf16.pth"
NATIVE_VAE = "Wan2.1_VAE.pth"
NATIVE_TOKENIZER = "google/umt5-xxl"


def is_diffusers(ckpt_dir: Path) -> bool:
    """Whether a directory is in the diffusers layout; else it is taken for WAN's own."""
    return (ckpt_dir / "model_index.json").is_file()


def transformer_files(ckpt_dir: Path) -> list[Path]:
    """The transformer of the native layout: one file, or its shards."""
    return sorted(ckpt_dir.glob(f"{NATIVE_TRANSFORMER}*.safetensors"))


def missing_native_files(ckpt_dir: Path) -> list[str]:
    """What of WAN's own files is not there."""
    wanted = {
        f"{NATIVE_TRANSFORMER}.safetensors": bool(transformer_files(ckpt_dir)),
        NATIVE_TEXT_ENCODER: (ckpt_dir / NATIVE_TEXT_ENCODER).is_file(),
        NATIVE_VAE: (ckpt_dir / NATIVE_VAE).is_file(),
        f"{NATIVE_TOKENIZER}/": (ckpt_dir / NATIVE_TOKENIZER).is_dir(),
    }
    return [name for name, is_there in wanted.items() if not is_there]
