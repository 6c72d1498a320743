"""Look at model files without loading them: are all there, readable and whole? For plugins' checks.

Reads headers and indexes only, so that 30 GB take a moment; :func:`checksum_faults` reads
everything. Faults are sentences that name the file.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

#: A file of this name beside the weights is what ``sha256sum`` wrote over them.
CHECKSUM_FILE = "SHA256SUMS"
#: No header of a real model comes near it; what claims more is no safetensors file.
_MAX_HEADER_BYTES = 100_000_000
_PIECE_BYTES = 4 * 1024 * 1024
#: What a component has that holds no weights.
_CONFIG_NAMES = (
    "config.json",
    "scheduler_config.json",
    "tokenizer_config.json",
    "preprocessor_config.json",
    "vocab.json",
    "spiece.model",
)


def weights_fault(path: Path) -> str | None:
    """What is wrong with one file of weights, or None. Knows safetensors, and torch's zipped pickles."""
    if not path.is_file():
        return f"{path} is missing"
    try:
        if path.suffix == ".safetensors":
            return _safetensors_fault(path)
        # The directory of a zip is at its end, so a file that is cut has none. Nothing is unpickled.
        if path.suffix in (".pth", ".pt", ".bin") and not zipfile.is_zipfile(path):
            return f"{path} is no file that torch.save wrote, or is cut"
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"
    return None


def folder_faults(folder: Path) -> Iterator[str]:
    """What is wrong with a directory of one model: its configuration, and its weights with their index."""
    if not folder.is_dir():
        yield f"{folder} is missing"
        return
    if (fault := json_fault(folder / "config.json")) is not None:
        yield fault
    indexes = sorted(folder.glob("*.index.json"))
    for index in indexes:
        yield from _index_faults(index)
    weights = [path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".pth")]
    if not weights:
        yield f"{folder} holds no weights (*.safetensors)"
    for path in sorted(weights):
        if (fault := weights_fault(path)) is not None:
            yield fault


def pipeline_faults(directory: Path) -> Iterator[str]:
    """What is wrong with a directory in the diffusers layout, by its ``model_index.json``."""
    index = directory / "model_index.json"
    if (fault := json_fault(index)) is not None:
        yield fault
        return
    for name, kind in json.loads(index.read_bytes()).items():
        if name.startswith("_") or not isinstance(kind, list) or not all(kind):
            continue
        folder = directory / name
        if (folder / "config.json").is_file() and "okenizer" not in name:
            yield from folder_faults(folder)
        elif not any((folder / config).is_file() for config in _CONFIG_NAMES):
            yield f"{folder} lacks its configuration ({_CONFIG_NAMES[0]} or the like)"


def json_fault(path: Path) -> str | None:
    """What is wrong with a JSON file, or None."""
    try:
        if not isinstance(json.loads(path.read_bytes()), dict):
            return f"{path} holds no JSON object"
    except FileNotFoundError:
        return f"{path} is missing"
    except (OSError, ValueError) as error:
        return f"{path} cannot be read ({error})"
    return None


def checksum_faults(directory: Path) -> Iterator[str]:
    """Files that are not what ``SHA256SUMS`` in ``directory`` says; reads all of them."""
    listing = directory / CHECKSUM_FILE
    for line in listing.read_text("utf-8").splitlines() if listing.is_file() else ():
        expected, _, name = line.strip().partition(" ")
        path = directory / name.strip().removeprefix("*")
        if not name:
            continue
        if not path.is_file():
            yield f"{path} is missing, and {listing} lists it"
        elif _sha256(path) != expected.lower():
            yield f"{path} is not what {listing} says"


def size_gb(place: Path) -> float:
    """What a model's files take together, in GB of 10**9 bytes."""
    files = place.rglob("*") if place.is_dir() else [place]
    return sum(file.stat().st_size for file in files if file.is_file()) / 1e9


def _safetensors_fault(path: Path) -> str | None:
    header, end = _safetensors_header(path)
    size = path.stat().st_size
    if header is None:
        return f"{path} has no readable safetensors header; it is cut, or something else"
    if size != end:
        return f"{path} has {size:,} bytes and its header describes {end:,}; it is cut or was changed"
    return None


def _safetensors_header(path: Path) -> tuple[dict[str, Any] | None, int]:
    """The header, and the size that the file should have."""
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            return None, 0
        (length,) = struct.unpack("<Q", prefix)
        if not 2 <= length <= _MAX_HEADER_BYTES:
            return None, 0
        try:
            header = json.loads(file.read(length))
            ends = [int(tensor["data_offsets"][1]) for name, tensor in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            return None, 0
    return header, 8 + length + max(ends, default=0)


def _index_faults(index: Path) -> Iterator[str]:
    if (fault := json_fault(index)) is not None:
        yield fault
        return
    weight_map = json.loads(index.read_bytes()).get("weight_map")
    if not isinstance(weight_map, dict):
        yield f"{index} has no weight_map"
        return
    for shard in sorted(set(map(str, weight_map.values()))):
        path = index.parent / shard
        if not path.is_file():
            yield f"{path} is missing, and {index.name} names it"
            continue
        if path.suffix != ".safetensors":
            continue
        header, _ = _safetensors_header(path)
        wanted = {name for name, file in weight_map.items() if file == shard}
        if header is not None and (absent := wanted - header.keys()):
            yield f"{path} lacks {len(absent)} of the weights that {index.name} says it has, {min(absent)} among them"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()
