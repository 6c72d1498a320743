"""Both layouts of the weights, offline, whole and in the right precision."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import WanTransformer3DModel
from ourvidz_wan.checkpoints import load_models
from ourvidz_wan.cli import wan
from ourvidz_wan.sampling import sample
from ourvidz_wan.tasks import TASKS
from safetensors.torch import load_file

from ourvidz_core.engine.weight_files import read_module
from ourvidz_core.errors import ModelUnavailable

T2V = TASKS["t2v-1.3B"]
KEPT = {"time_embedder", "scale_shift_table", "norm1", "norm2", "norm3"}


def quietly(step, total):
    """Nobody watches."""


def test_the_native_layout_makes_the_same_video(native_dir, models, asking, pictures):
    native = load_models(native_dir, T2V)
    for options in ({}, {"first_frame": pictures["lake"]}):
        from_native, from_diffusers = (sample(asking(**options), either, quietly) for either in (native, models))
        assert torch.equal(from_native.latents, from_diffusers.latents)
        assert np.array_equal(from_native.frames, from_diffusers.frames)


def test_the_published_names_are_the_published_names(native_dir):
    """A few of each file, as WAN's own code has them."""
    transformer = load_file(native_dir / "diffusion_pytorch_model.safetensors")
    assert {
        "patch_embedding.weight",
        "text_embedding.0.weight",
        "time_projection.1.weight",
        "blocks.0.modulation",
        "blocks.0.self_attn.norm_q.weight",
        "blocks.1.cross_attn.o.bias",
        "blocks.1.norm3.weight",
        "blocks.1.ffn.2.weight",
        "head.head.weight",
        "head.modulation",
    } <= set(transformer)
    text = torch.load(native_dir / "models_t5_umt5-xxl-enc-bf16.pth", weights_only=True)
    assert {"token_embedding.weight", "blocks.1.pos_embedding.embedding.weight", "blocks.0.ffn.gate.0.weight"} <= set(
        text
    )
    vae = torch.load(native_dir / "Wan2.1_VAE.pth", weights_only=True)
    assert {
        "conv1.weight",
        "encoder.conv1.weight",
        "encoder.downsamples.0.residual.2.weight",
        "decoder.middle.1.to_qkv.weight",
        "decoder.upsamples.3.time_conv.weight",
        "decoder.upsamples.4.shortcut.weight",
        "decoder.head.2.bias",
    } <= set(vae)


@pytest.mark.parametrize("layout", ["diffusers", "native"])
def test_what_must_stay_in_float32_does(layout, model_dir, native_dir):
    directory = {"diffusers": model_dir, "native": native_dir}[layout]
    loaded = load_models(directory, T2V, dtype=torch.bfloat16).pipeline
    for name, parameter in loaded.transformer.named_parameters():
        expected = torch.float32 if KEPT & set(name.split(".")) else torch.bfloat16
        assert parameter.dtype is expected, name
    assert loaded.transformer.dtype is torch.bfloat16
    assert {parameter.dtype for parameter in loaded.vae.parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in loaded.text_encoder.parameters()} == {torch.bfloat16}


def test_a_transformer_that_is_read_straight_to_a_device_is_what_diffusers_loads(model_dir):
    directory, cls = model_dir / "transformer", WanTransformer3DModel
    theirs = cls.from_pretrained(directory, torch_dtype=torch.bfloat16, local_files_only=True)
    kept = cls._keep_in_fp32_modules
    ours = read_module(cls, directory, device="cpu", dtype=torch.bfloat16, kept_in_float32=kept)
    assert ours is not None
    assert ours.dtype is theirs.dtype
    for state_of in (lambda module: module.state_dict(), lambda module: dict(module.named_buffers())):
        mine, other = state_of(ours), state_of(theirs)
        assert mine.keys() == other.keys()
        for name, tensor in mine.items():
            assert tensor.dtype is other[name].dtype, name
            assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("layout", ["diffusers", "native"])
def test_the_text_encoder_reads_its_embedding(layout, model_dir, native_dir):
    encoder = load_models({"diffusers": model_dir, "native": native_dir}[layout], T2V).pipeline.text_encoder
    assert encoder.encoder.embed_tokens.weight.data_ptr() == encoder.shared.weight.data_ptr()
    assert encoder.shared.weight.any()


def test_native_vace_weights_load_as_well(tiny_wan, tmp_path):
    pipeline = tiny_wan.make_pipeline("vace")
    tiny_wan.save_native(pipeline, tmp_path / "vace")
    loaded = load_models(tmp_path / "vace", TASKS["vace-1.3B"]).pipeline.transformer
    wanted = pipeline.transformer.state_dict()
    assert loaded.state_dict().keys() == wanted.keys()
    assert all(torch.equal(weight, wanted[name]) for name, weight in loaded.state_dict().items())


def copied(source, target):
    shutil.copytree(source, target)
    return target


def test_an_embedding_of_zeros_is_refused(native_dir, tmp_path):
    directory = copied(native_dir, tmp_path / "grey")
    path = directory / "models_t5_umt5-xxl-enc-bf16.pth"
    weights = torch.load(path, weights_only=True)
    weights["token_embedding.weight"] = torch.zeros_like(weights["token_embedding.weight"])
    torch.save(weights, path)
    with pytest.raises(ModelUnavailable, match="embedding of zeros"):
        load_models(directory, T2V)


def test_a_pickle_that_runs_code_is_refused(native_dir, tmp_path):
    class Runs:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))

    directory = copied(native_dir, tmp_path / "evil")
    torch.save({"conv1.weight": Runs()}, directory / "Wan2.1_VAE.pth")
    with pytest.raises(ModelUnavailable):
        load_models(directory, T2V)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "name",
    ["diffusion_pytorch_model.safetensors", "models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth", "google/umt5-xxl"],
)
def test_a_missing_file_is_named(name, native_dir, tmp_path):
    directory = copied(native_dir, tmp_path / "partial")
    missing = directory / name
    shutil.rmtree(missing) if missing.is_dir() else missing.unlink()
    with pytest.raises(ModelUnavailable, match=name):
        load_models(directory, T2V)


@pytest.mark.parametrize(
    "name", ["diffusion_pytorch_model.safetensors", "models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth"]
)
def test_a_damaged_file_is_no_traceback(name, native_dir, tmp_path):
    directory = copied(native_dir, tmp_path / "damaged")
    (directory / name).write_bytes((directory / name).read_bytes()[:1000])
    with pytest.raises(ModelUnavailable, match="cannot be used"):
        load_models(directory, T2V)


def test_an_empty_directory_says_what_it_should_hold(tmp_path):
    with pytest.raises(ModelUnavailable, match=r"model_index\.json is missing"):
        load_models(tmp_path, T2V)


def test_sharded_weights_are_joined(native_dir, models, tmp_path, asking):
    from safetensors.torch import save_file

    directory = copied(native_dir, tmp_path / "shards")
    whole = directory / "diffusion_pytorch_model.safetensors"
    weights = sorted(load_file(whole).items())
    whole.unlink()
    for number, part in enumerate((weights[::2], weights[1::2]), start=1):
        save_file(dict(part), directory / f"diffusion_pytorch_model-0000{number}-of-00002.safetensors")
    joined = sample(asking(), load_models(directory, T2V), quietly)
    assert torch.equal(joined.latents, sample(asking(), models, quietly).latents)


def test_convert_writes_the_diffusers_layout_once(native_dir, models, tmp_path, asking):
    target = tmp_path / "converted"
    runner = CliRunner()
    done = runner.invoke(wan, ["convert", str(native_dir), str(target), "--dtype", "float32"])
    assert done.exit_code == 0, done.output
    assert (target / "model_index.json").is_file()
    assert (target / "variant.toml").read_text() == (native_dir / "variant.toml").read_text()
    converted = sample(asking(), load_models(target, T2V), quietly)
    assert torch.equal(converted.latents, sample(asking(), models, quietly).latents)

    again = runner.invoke(wan, ["convert", str(native_dir), str(target)])
    assert again.exit_code == 1
    assert "is there already" in again.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["converted"]
