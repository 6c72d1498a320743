"""Which files an SDXL model has beside its weights. Light: checks read it without torch."""

from __future__ import annotations

from pathlib import Path

CONFIG_DIR_VARIABLE = "OURVIDZ_SDXL_CONFIG_DIR"
#: What a checkpoint does not carry itself; all of it together is about 3 MB.
CONFIG_FILES = (
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder_2/config.json",
    "unet/config.json",
    "vae/config.json",
)
TOKENIZER_FOLDERS = ("tokenizer", "tokenizer_2")
TOKENIZER_FILES = "tokenizer.json, or vocab.json and merges.txt"
#: All of it, in words.
CONFIG_IN_WORDS = f"{', '.join(CONFIG_FILES)}, and in {' and '.join(TOKENIZER_FOLDERS)} each {TOKENIZER_FILES}"


def missing_config(config_dir: Path) -> list[str]:
    """What a checkpoint's configuration directory lacks."""
    missing = [name for name in CONFIG_FILES if not (config_dir / name).is_file()]
    return missing + [
        f"{name} ({TOKENIZER_FILES})" for name in TOKENIZER_FOLDERS if not _has_tokenizer(config_dir / name)
    ]


def _has_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer.json").is_file() or all(
        (folder / name).is_file() for name in ("vocab.json", "merges.txt")
    )
