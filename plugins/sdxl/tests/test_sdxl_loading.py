"""Models come from local files: a directory or a checkpoint, and a clear word where one is missing."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from ourvidz_sdxl.generation import choose_model
from ourvidz_sdxl.layout import CONFIG_FILES
from ourvidz_sdxl.pipeline import load_pipeline, parts_of_checkpoint, parts_of_directory
from ourvidz_sdxl.settings import SdxlSettings, UnknownVariant
from ourvidz_sdxl.variants import SdxlVariant
from sdxl_support import job, load_example, made, pixels, warm_model

from ourvidz_core.engine.models import ModelCache
from ourvidz_core.errors import ModelUnavailable, SettingsError
from ourvidz_core.settings import load_section
from ourvidz_core.testing.doubles import RecordingContext

NewContext = Callable[..., RecordingContext]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The tiny model as one file under SDXL's original names, and its configuration."""
    directory = tmp_path_factory.mktemp("checkpoint")
    path, config_dir = directory / "tiny.safetensors", directory / "config"
    example = load_example("tiny_sdxl")
    example.save_checkpoint(example.build_pipeline(), path, config_dir)
    return path, config_dir


def test_checkpoint_holds_every_weight_of_the_directory(tiny_model: Path, checkpoint: tuple[Path, Path]) -> None:
    path, config_dir = checkpoint
    of_file = load_pipeline(path, device="cpu", variant=SdxlVariant(), config_dir=config_dir).base
    of_directory = load_pipeline(tiny_model, device="cpu", variant=SdxlVariant()).base
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        one, other = getattr(of_file, part).state_dict(), getattr(of_directory, part).state_dict()
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one), part


def test_checkpoint_draws_what_its_directory_draws(new_context: NewContext, checkpoint: tuple[Path, Path]) -> None:
    path, config_dir = checkpoint
    of_file = made(job(config={"seed": 1}), new_context(model=path, config_dir=config_dir))
    of_directory = made(job(config={"seed": 1}), new_context())
    assert of_file.facts["model"] == "tiny.safetensors"
    assert of_file.facts["width"] == 128  # its variant.toml lies beside it
    assert np.array_equal(pixels(of_file.artifacts[0]), pixels(of_directory.artifacts[0]))


def test_checkpoint_without_configuration_says_what_to_set(
    new_context: NewContext, checkpoint: tuple[Path, Path]
) -> None:
    with pytest.raises(ModelUnavailable) as missing:
        made(job(), new_context(ModelCache(), model=checkpoint[0]))
    message = str(missing.value)
    assert "OURVIDZ_SDXL_CONFIG_DIR" in message
    assert all(name in message for name in CONFIG_FILES)


def test_incomplete_configuration_is_named_file_by_file(
    new_context: NewContext, checkpoint: tuple[Path, Path], tmp_path: Path
) -> None:
    path, config_dir = checkpoint
    incomplete = tmp_path / "config"
    shutil.copytree(config_dir, incomplete)
    (incomplete / "vae" / "config.json").unlink()
    shutil.rmtree(incomplete / "tokenizer_2")
    with pytest.raises(ModelUnavailable, match=r"lacks vae/config\.json, tokenizer_2 \("):
        made(job(), new_context(ModelCache(), model=path, config_dir=incomplete))


def test_missing_model_is_named(new_context: NewContext, tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match=r"no SDXL model at .*nothing\.safetensors"):
        made(job(), new_context(model=tmp_path / "nothing.safetensors"))


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"\x08\x00\x00\x00\x00\x00\x00\x00{}      "])
def test_broken_checkpoint_is_unavailable(
    new_context: NewContext, checkpoint: tuple[Path, Path], tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "broken.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelUnavailable, match=r"broken\.safetensors"):
        made(job(), new_context(model=path, config_dir=checkpoint[1]))


def test_directory_that_is_no_model_is_unavailable(new_context: NewContext, tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match="cannot be loaded"):
        made(job(), new_context(model=tmp_path))


def test_wrong_description_of_a_model_is_unavailable(new_context: NewContext, tmp_path: Path) -> None:
    (tmp_path / "variant.toml").write_text('family = "wan"\n', "utf-8")
    with pytest.raises(ModelUnavailable, match=r"variant\.toml"):
        made(job(), new_context(model=tmp_path))


def test_model_is_loaded_once(new_context: NewContext) -> None:
    context = new_context()
    made(job(config={"num_inference_steps": 1}), context)
    loaded = warm_model(context)
    again = new_context()
    made(job(config={"num_inference_steps": 1}), again)
    assert warm_model(again) is loaded


@pytest.mark.parametrize(
    ("settings", "variant", "chosen"),
    [
        ({"model": Path("a")}, None, "a"),
        ({"model": Path("a")}, "lustify_sdxl", "a"),
        ({"model": Path("a"), "models": {"lustify_sdxl": Path("b")}}, "lustify_sdxl", "b"),
        ({"model": Path("a"), "models": {"lustify_sdxl": Path("b")}}, "other", "a"),
    ],
)
def test_model_variant_of_the_message_picks_the_model(
    settings: dict[str, Any], variant: str | None, chosen: str
) -> None:
    assert choose_model(SdxlSettings(**settings), variant) == Path(chosen)


def test_unknown_variant_fails_where_it_shall() -> None:
    settings = SdxlSettings(model=Path("a"), models={"lustify_sdxl": Path("b")}, unknown_variant=UnknownVariant.FAIL)
    with pytest.raises(ModelUnavailable, match=r"'other' .*configured: lustify_sdxl"):
        choose_model(settings, "other")


def test_no_model_at_all_says_what_to_set() -> None:
    with pytest.raises(ModelUnavailable, match="OURVIDZ_SDXL_MODEL"):
        choose_model(SdxlSettings(), None)


def test_settings_come_from_the_environment() -> None:
    settings = load_section(
        SdxlSettings,
        {
            "OURVIDZ_SDXL_MODEL": "/m/a.safetensors",
            "OURVIDZ_SDXL_MODELS": '{"x": "/m/x"}',
            "OURVIDZ_SDXL_UNKNOWN_VARIANT": "fail",
        },
    )
    assert settings.model == Path("/m/a.safetensors")
    assert settings.models == {"x": Path("/m/x")}
    assert settings.unknown_variant is UnknownVariant.FAIL
    with pytest.raises(SettingsError, match="OURVIDZ_SDXL_UNKNOWN_VARIANT"):
        load_section(SdxlSettings, {"OURVIDZ_SDXL_UNKNOWN_VARIANT": "maybe"})


def test_model_is_built_the_same_from_the_same_seed() -> None:
    example = load_example("tiny_sdxl")
    one, other, third = example.build_pipeline(1), example.build_pipeline(1), example.build_pipeline(2)
    name = "conv_in.weight"
    assert torch.equal(one.unet.state_dict()[name], other.unet.state_dict()[name])
    assert not torch.equal(one.unet.state_dict()[name], third.unet.state_dict()[name])


def test_what_is_read_straight_to_a_device_is_what_diffusers_loads(
    tiny_model: Path, checkpoint: tuple[Path, Path]
) -> None:
    path, config_dir = checkpoint
    expected = StableDiffusionXLPipeline.from_pretrained(str(tiny_model), dtype=torch.bfloat16, add_watermarker=False)
    for parts in (
        parts_of_directory(tiny_model, "cpu", torch.bfloat16),
        parts_of_checkpoint(path, "cpu", torch.bfloat16, config_dir),
    ):
        assert parts.keys() == {"unet", "vae"}
        for name, part in parts.items():
            theirs = getattr(expected, name).state_dict()
            ours = part.state_dict()
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    # And the pipeline takes them.
    taken = StableDiffusionXLPipeline.from_pretrained(str(tiny_model), dtype=torch.bfloat16, **parts)
    assert taken.unet is parts["unet"]
