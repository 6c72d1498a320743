"""Weights that are read by several threads: the bytes of the file, whatever its form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import UMT5Config, UMT5EncoderModel, modeling_utils

from ourvidz_core.engine import weight_files
from ourvidz_core.engine.weight_files import read_module, read_weights, tensor_by_tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(weight_files, "_CHUNK_BYTES", 64)


def tensor_of(shape, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 3).to(dtype)


@settings(max_examples=40, deadline=None)
@given(
    forms=st.lists(st.tuples(st.lists(st.integers(0, 9), max_size=3), st.sampled_from(DTYPES)), max_size=12),
    threads=st.integers(1, 3),
)
def test_every_tensor_is_read_to_the_bit(forms, threads, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    written = {f"t{number}": tensor_of(*form, number) for number, form in enumerate(forms)}
    save_file(written, path)
    found = read_weights([path], threads=threads)
    assert found.keys() == written.keys()
    for name, tensor in written.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_another_precision_is_the_one_that_torch_makes_and_integers_stay(tmp_path):
    written = {"a": tensor_of((7, 31), torch.float16, 1), "kept": tensor_of((5,), torch.float16, 2)}
    written["places"] = torch.arange(40)
    save_file(written, tmp_path / "m.safetensors")
    found = read_weights(
        [tmp_path / "m.safetensors"], dtype_of=lambda name: None if name == "kept" else torch.bfloat16, threads=2
    )
    assert torch.equal(found["a"], written["a"].to(torch.bfloat16))
    assert found["kept"].dtype == torch.float16
    assert torch.equal(found["places"], written["places"])


def test_how_far_it_has_come_is_told_and_may_end_it(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(weight_files, "_SAY_SECONDS", 0.0)
    save_file({"a": torch.zeros(1000)}, tmp_path / "m.safetensors")
    told = []
    read_weights([tmp_path / "m.safetensors"], on_progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (4000, 4000)
    assert sorted(told) == told
    assert f"reading {tmp_path.name}/m.safetensors: 0.0 of 0.0 GB" in caplog.text

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read_weights([tmp_path / "m.safetensors"], on_progress=stop)


@pytest.mark.parametrize("damage", ["cut", "empty", "no header", "unknown type"])
def test_a_damaged_file_is_named(damage, tmp_path):
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.zeros(100)}, path)
    whole = path.read_bytes()
    damaged = {
        "cut": whole[:-8],
        "empty": b"",
        "no header": b"\xff" * 100,
        "unknown type": whole.replace(b'"F32"', b'"X32"'),
    }
    path.write_bytes(damaged[damage])
    with pytest.raises(ValueError, match=r"m\.safetensors"):
        read_weights([path])


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    torch.manual_seed(1)
    return AutoencoderKL(block_out_channels=(32,), norm_num_groups=8, layers_per_block=1)


@pytest.mark.parametrize("shard_size", ["10GB", "100KB"], ids=["one file", "shards"])
def test_a_model_is_the_one_that_diffusers_loads(shard_size, vae, tmp_path):
    vae.save_pretrained(tmp_path, max_shard_size=shard_size)
    ours = read_module(AutoencoderKL, tmp_path, device="cpu", dtype=torch.bfloat16, kept_in_float32=("conv_in",))
    theirs = AutoencoderKL.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert ours is not None
    assert not ours.training
    assert {**ours.config, "_name_or_path": None} == {**theirs.config, "_name_or_path": None}
    mine, other = ours.state_dict(), theirs.state_dict()
    assert mine.keys() == other.keys()
    for name, tensor in mine.items():
        assert tensor.dtype == (torch.float32 if "conv_in" in name else torch.bfloat16)
        assert torch.equal(tensor.bfloat16(), other[name])


def test_weights_under_other_names_are_left_to_diffusers(vae, tmp_path):
    vae.save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["old.name"] = weights.pop("quant_conv.weight")
    save_file(weights, path)
    assert read_module(AutoencoderKL, tmp_path, device="cpu", dtype=torch.float32) is None
    (tmp_path / "second.fp16.safetensors").write_bytes(path.read_bytes())
    assert read_module(AutoencoderKL, tmp_path, device="cpu", dtype=torch.float32) is None
    assert json.loads((Path(tmp_path) / "config.json").read_text())["_class_name"] == "AutoencoderKL"


def test_transformers_takes_no_block_for_all_weights_before_it_reads_them(tmp_path, monkeypatch):
    blocks = []
    monkeypatch.setattr(modeling_utils, "caching_allocator_warmup", lambda *_: blocks.append(1))
    small = UMT5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    UMT5EncoderModel(small).save_pretrained(tmp_path)
    read = {"device_map": {"": "cpu"}, "local_files_only": True}

    with tensor_by_tensor():
        UMT5EncoderModel.from_pretrained(tmp_path, **read)
    assert blocks == []

    UMT5EncoderModel.from_pretrained(tmp_path, **read)
    assert blocks == [1]
