"""The small file beside a model's weights that says what the model can do.

Sizes, schedules and limits belong to the model and not to the code, so a demo model
and a production model take the same path.
"""

from __future__ import annotations

import tomllib
from importlib.metadata import entry_points
from pathlib import Path
from typing import TypeVar

from attrs import frozen

from ourvidz_core.errors import ModelUnavailable, PayloadError
from ourvidz_core.plugins.trust import refusal_of
from ourvidz_core.settings import load
from ourvidz_core.wire.payloads import structure

Variant = TypeVar("Variant")

FILE_NAME = "variant.toml"
#: Distributions offer models under this entry-point group: the name is a family, the value a directory.
MODEL_GROUP = "ourvidz.models"


def find_model(named: Path, family: str) -> Path:
    """Where the model lies that an operator named: a path, or the name of an installed model.

    With ``ourvidz-demo-models`` installed, ``demo`` names a small model of each family it has.
    A distribution that the operator blocks is not imported for its models either.
    What is neither is answered as it is, so that the loader can say what is missing.

    :raises ModelUnavailable: an installed model's description cannot be read.
    """
    if named.exists():
        return named
    for entry_point in entry_points(group=MODEL_GROUP, name=family):
        if entry_point.dist is not None and refusal_of(entry_point.dist.name, load()) is not None:
            continue
        directory: Path = entry_point.load()
        if read_variant(directory, _Named).name == str(named):
            return directory
    return named


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


@frozen(kw_only=True)
class _Named:
    """What every model's description may say; the rest is its family's own."""

    name: str = ""
