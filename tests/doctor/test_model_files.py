"""Model files that are missing, cut or mixed up, seen without loading them."""

from __future__ import annotations

import json
import shutil
import struct
import zipfile
from hashlib import sha256
from pathlib import Path

import ourvidz_demo_models
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ourvidz_core.doctor.model_files import checksum_faults, folder_faults, pipeline_faults, weights_fault

UNET = "diffusion_pytorch_model"


@pytest.fixture
def sdxl(tmp_path: Path) -> Path:
    """The demo model, to be broken."""
    return shutil.copytree(ourvidz_demo_models.SDXL, tmp_path / "sdxl")


def test_whole_models_have_no_faults() -> None:
    assert list(pipeline_faults(ourvidz_demo_models.SDXL)) == []
    assert list(folder_faults(ourvidz_demo_models.QWEN)) == []


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model_index.json", "model_index.json is missing"),
        ("vae/config.json", "vae lacks its configuration"),
        ("scheduler/scheduler_config.json", "scheduler lacks its configuration"),
        ("text_encoder/model.safetensors", "text_encoder holds no weights"),
        (f"unet/{UNET}-00002-of-00002.safetensors", f"{UNET}-00002-of-00002.safetensors is missing, and"),
    ],
)
def test_a_missing_file_is_named(sdxl: Path, name: str, said: str) -> None:
    (sdxl / name).unlink()
    (fault,) = pipeline_faults(sdxl)
    assert said in fault


def test_a_shard_of_another_model_is_named(sdxl: Path) -> None:
    first, second = (sdxl / f"unet/{UNET}-0000{number}-of-00002.safetensors" for number in (1, 2))
    shutil.copy(first, second)
    (fault,) = pipeline_faults(sdxl)
    assert f"{second} lacks " in fault


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(part=st.floats(0.0, 1.0, exclude_max=True))
def test_weights_that_are_cut_anywhere_are_named(part: float, tmp_path: Path) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}, "__metadata__": {}}).encode()
    whole = struct.pack("<Q", len(header)) + header + bytes(32)
    path = tmp_path / "model.safetensors"
    path.write_bytes(whole)
    assert weights_fault(path) is None
    path.write_bytes(whole[: int(part * len(whole))])
    assert str(path) in (weights_fault(path) or "")


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=200))
def test_any_other_bytes_are_a_fault_and_never_an_error(content: bytes, tmp_path: Path) -> None:
    for name in ("model.safetensors", "model.pth"):
        (tmp_path / name).write_bytes(content)
        assert weights_fault(tmp_path / name) is not None


def test_a_cut_pickle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "vae.pth"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data/0", bytes(10_000))
    assert weights_fault(path) is None
    path.write_bytes(path.read_bytes()[:5000])
    assert "is cut" in (weights_fault(path) or "")


def test_checksums_are_compared_where_a_list_of_them_lies_beside_the_files(tmp_path: Path) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        (tmp_path / name).write_bytes(name.encode())
    digest = sha256(b"a.safetensors").hexdigest()
    assert list(checksum_faults(tmp_path)) == []
    (tmp_path / "SHA256SUMS").write_text(f"{digest}  a.safetensors\n{digest} *b.safetensors\n{digest}  c.safetensors\n")
    faults = list(checksum_faults(tmp_path))
    assert len(faults) == 2
    assert "b.safetensors is not what" in faults[0]
    assert "c.safetensors is missing" in faults[1]
