"""The small file beside a model's weights that says what the model can do.

Sizes, schedules and limits belong to the model and not to the code, so a demo model
and a production model take the same path.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import TypeVar

from ourvidz_core.errors import ModelUnavailable, PayloadError
from ourvidz_core.wire.payloads import structure

Variant = TypeVar("Variant")

FILE_NAME = "variant.toml"


def read_variant(model: Path, cls: type[Variant]) -> Variant:
    """What ``variant.toml`` says of the model at ``model``, over the defaults of ``cls``.

    The file lies in a model's directory, or beside a single-file checkpoint under the
    checkpoint's name: ``lustify.safetensors`` has ``lustify.variant.toml``. A model
    without one is what the defaults of ``cls`` describe.

    :raises ModelUnavailable: the file cannot be read, or says something it may not.
    """
    path = model / FILE_NAME if model.is_dir() else model.with_suffix(f".{FILE_NAME}")
    if not path.is_file():
        return cls()
    try:
        values = tomllib.loads(path.read_text("utf-8"))
        return structure(values, cls, path=path.name)
    except (OSError, ValueError, PayloadError) as error:
        raise ModelUnavailable(f"the model's description {path} cannot be used: {error}") from error
