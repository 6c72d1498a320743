"""A reference image has an effect, and the callback names the method that had it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, ControlNetUnionModel, StableDiffusionXLPipeline
from ourvidz_sdxl.edges import edge_map
from ourvidz_sdxl.parallel import ranks
from ourvidz_sdxl.references import fit_reference, steps_for_strength
from ourvidz_sdxl.speed import fuse_projections
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from sdxl_support import job, load_example, made, pixels, warm_model
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from ourvidz_core.engine.models import ModelCache
from ourvidz_core.engine.pictures import read_facts
from ourvidz_core.errors import ModelUnavailable
from ourvidz_core.settings import variable_of
from ourvidz_core.testing.doubles import RecordingContext
from ourvidz_core.wire.jobs import Job

NewContext = Callable[..., RecordingContext]
TYPES = ("style", "composition", "character")


#: Enough to see an effect.
FEW_STEPS = {"seed": 30, "num_inference_steps": 2}


def with_reference(reference: Path, **config: Any) -> Job:
    return job(config={"seed": 30, **config}, reference=reference)


def in_few_steps(reference: Path, **config: Any) -> Job:
    return with_reference(reference, **{**FEW_STEPS, **config})


@pytest.fixture(scope="session")
def example() -> Any:
    return load_example("tiny_sdxl")


@pytest.fixture(scope="session")
def base(example: Any) -> StableDiffusionXLPipeline:
    return example.build_pipeline()


@pytest.fixture(scope="session")
def ip_adapter(base: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random IP-Adapter weights in the layout of the published ones."""
    torch.manual_seed(1)
    weights = {
        "image_proj.proj.weight": torch.randn(4 * 96, 16) / 4,
        "image_proj.proj.bias": torch.zeros(4 * 96),
        "image_proj.norm.weight": torch.ones(96),
        "image_proj.norm.bias": torch.zeros(96),
    }
    crossing = [name for name in base.unet.attn_processors if "attn2" in name]
    for index, name in enumerate(crossing):
        width = base.unet.get_submodule(name.removesuffix(".processor")).to_k.weight.shape[0]
        for part in ("to_k_ip", "to_v_ip"):
            weights[f"ip_adapter.{2 * index + 1}.{part}.weight"] = torch.randn(width, 96) / 5
    path = tmp_path_factory.mktemp("ip-adapter") / "ip-adapter.safetensors"
    save_file(weights, path)
    return path


@pytest.fixture(scope="session")
def image_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(2)
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8,
        projection_dim=16,
    )  # fmt: skip
    directory = tmp_path_factory.mktemp("image-encoder")
    CLIPVisionModelWithProjection(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session", params=[ControlNetModel, ControlNetUnionModel], ids=["canny", "union"])
def controlnet(request: pytest.FixtureRequest, base: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ControlNet as one begins, but with last layers that are not zero, so that it has an effect."""
    torch.manual_seed(3)
    union = {"num_trans_channel": 32, "num_proj_channel": 32} if request.param is ControlNetUnionModel else {}
    shared = {
        key: value for key, value in base.unet.config.items() if key in inspect.signature(request.param).parameters
    }
    net = request.param(**shared, **union)
    with torch.no_grad():
        for layer in [*net.controlnet_down_blocks, net.controlnet_mid_block, net.controlnet_cond_embedding.conv_out]:
            layer.weight.normal_(std=0.2)
    directory = tmp_path_factory.mktemp("controlnet")
    net.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("reference_type", TYPES)
def test_base_weights_alone_serve_every_type(new_context: NewContext, reference_png: Path, reference_type: str) -> None:
    with_it = made(with_reference(reference_png, reference_type=reference_type, reference_strength=0.7), new_context())
    without = made(job(config={"seed": 30}), new_context())
    assert (
        with_it.facts.items()
        >= {
            "reference_applied": True,
            "reference_method": "img2img",
            "reference_type": reference_type,
            "reference_strength": 0.7,
            "steps": 5,
            "num_inference_steps": 15,
        }.items()
    )
    assert without.facts["reference_applied"] is False
    assert np.abs(pixels(with_it.artifacts[0]) - pixels(without.artifacts[0])).mean() > 5
    assert read_facts(with_it.artifacts[0].path)["reference_method"] == "img2img"


@pytest.mark.parametrize("solver", [None, "unipc", "dpm++"])
def test_more_strength_is_closer_to_the_reference(
    new_context: NewContext, reference_png: Path, solver: str | None
) -> None:
    distances = []
    for strength in (0.3, 0.9, 1.0):
        context = new_context()
        generation = made(with_reference(reference_png, reference_strength=strength, sample_solver=solver), context)
        model = warm_model(context)
        # What the autoencoder keeps of the reference is the closest that any picture can come.
        kept = model.decode_latents(model.encode_image(fit_reference(reference_png, 128, 128)))
        distances.append(np.abs(pixels(generation.artifacts[0]) - np.asarray(kept).astype(np.int16)).mean())
    assert distances[0] > distances[1] > distances[2]


@pytest.mark.parametrize(
    ("steps", "strength", "run"),
    [(15, 1.0, 1), (15, 0.9, 2), (25, 0.8, 5), (25, 0.3, 18), (15, 0.1, 14), (1, 0.1, 1), (100, 0.5, 50)],
)
def test_denoise_is_one_minus_strength_and_at_least_one_step(steps: int, strength: float, run: int) -> None:
    assert steps_for_strength(steps, strength) == run


@pytest.mark.parametrize("strength", [0.55, 1.0])
@pytest.mark.parametrize("solver", [None, "unipc", "dpm++"])
def test_steps_that_are_told_are_the_steps_that_run(
    new_context: NewContext, reference_png: Path, strength: float, solver: str | None
) -> None:
    context = new_context()
    calls: list[int] = []
    made(job(config={"num_inference_steps": 1}), new_context())
    hook = warm_model(context).base.unet.register_forward_hook(lambda *_: calls.append(1))
    try:
        facts = made(with_reference(reference_png, reference_strength=strength, sample_solver=solver), context).facts
    finally:
        hook.remove()
    assert len(calls) == facts["steps"] == steps_for_strength(15, strength)
    assert context.steps[-1] == ("denoise", facts["steps"], facts["steps"])


def test_reference_is_cropped_and_never_stretched(tmp_path: Path) -> None:
    image = Image.new("RGB", (400, 200), "white")
    ImageDraw.Draw(image).ellipse((150, 50, 250, 150), fill="black")
    image.save(tmp_path / "disc.png")
    fitted = np.asarray(fit_reference(tmp_path / "disc.png", 128, 128).convert("L")) < 128
    height, width = (int(fitted.any(axis=axis).sum()) for axis in (1, 0))
    assert abs(height - width) <= 1  # a circle stays a circle
    assert abs(height - 64) <= 2
    assert not fitted[0].any()
    assert not fitted[:, 0].any()  # and no black bar was added


@pytest.mark.parametrize(
    ("reference_type", "setting", "method"),
    [
        ("style", "ip_adapter_style", "ip_adapter_instantstyle"),
        ("character", "ip_adapter_face", "ip_adapter_face"),
    ],
)
def test_ip_adapter_acts_where_it_is_configured(
    new_context: NewContext,
    reference_png: Path,
    ip_adapter: Path,
    image_encoder: Path,
    reference_type: str,
    setting: str,
    method: str,
) -> None:
    settings = {setting: ip_adapter, "ip_adapter_image_encoder": image_encoder}
    without = made(job(config=FEW_STEPS), new_context())
    weak, strong = (
        made(
            in_few_steps(reference_png, reference_type=reference_type, reference_strength=strength),
            new_context(**settings),
        )
        for strength in (0.1, 1.0)
    )
    assert strong.facts["reference_method"] == method
    assert strong.facts["steps"] == 2
    plain = pixels(without.artifacts[0])
    little, much = (np.abs(pixels(made_.artifacts[0]) - plain).mean() for made_ in (weak, strong))
    assert 0 < little < much
    # The next job without a reference is as if the adapter had never been there.
    again = made(job(config=FEW_STEPS), new_context(**settings))
    assert np.array_equal(pixels(again.artifacts[0]), plain)


def test_style_acts_through_the_style_layers_alone(
    new_context: NewContext, reference_png: Path, ip_adapter: Path, image_encoder: Path
) -> None:
    context = new_context(ip_adapter_style=ip_adapter, ip_adapter_image_encoder=image_encoder)
    made(job(config={"num_inference_steps": 1}), new_context())
    unet = warm_model(context).base.unet
    seen: dict[str, float] = {}

    def look(*_: object) -> None:
        for name, processor in unet.attn_processors.items():
            if hasattr(processor, "scale"):
                seen[name] = float(processor.scale[0])

    hook = unet.register_forward_pre_hook(look)
    try:
        made(in_few_steps(reference_png, reference_strength=0.8), context)
    finally:
        hook.remove()
    active = {name for name, scale in seen.items() if scale}
    assert active == {name for name in seen if name.startswith("up_blocks.0.attentions.1.")}
    assert {seen[name] for name in active} == {0.8}


def test_ip_adapter_image_of_a_batch_is_the_image_of_its_seed(
    new_context: NewContext, reference_png: Path, ip_adapter: Path, image_encoder: Path
) -> None:
    settings = {"ip_adapter_face": ip_adapter, "ip_adapter_image_encoder": image_encoder}
    batch = made(in_few_steps(reference_png, reference_type="character", num_images=3), new_context(**settings))
    single = made(in_few_steps(reference_png, reference_type="character", seed=32), new_context(**settings))
    assert np.abs(pixels(batch.artifacts[2]) - pixels(single.artifacts[0])).max() <= 1


def test_ip_adapter_goes_with_fused_projections_and_leaves_them_as_they_were(
    new_context: NewContext, reference_png: Path, ip_adapter: Path, image_encoder: Path
) -> None:
    settings = {"ip_adapter_face": ip_adapter, "ip_adapter_image_encoder": image_encoder}
    a_job = in_few_steps(reference_png, reference_type="character", num_inference_steps=2)
    expected = pixels(made(a_job, new_context(**settings)).artifacts[0])
    models = ModelCache()
    made(job(config={"num_inference_steps": 1}), new_context(models=models))
    unet = warm_model(new_context(models=models)).base.unet
    fuse_projections(unet)  # as on a GPU
    processors = dict(unet.attn_processors)

    picture = pixels(made(a_job, new_context(models=models, **settings)).artifacts[0])

    assert np.abs(picture - expected).max() <= 1
    # What was compiled, was compiled with these.
    assert all(unet.attn_processors[name] is processor for name, processor in processors.items())


def test_controlnet_acts_where_it_is_configured(new_context: NewContext, reference_png: Path, controlnet: Path) -> None:
    without = made(job(config=FEW_STEPS), new_context())
    weak, strong = (
        made(
            in_few_steps(reference_png, reference_type="composition", reference_strength=strength),
            new_context(controlnet=controlnet),
        )
        for strength in (0.1, 1.0)
    )
    assert strong.facts["reference_method"] == "controlnet_canny"
    plain = pixels(without.artifacts[0])
    little, much = (np.abs(pixels(made_.artifacts[0]) - plain).mean() for made_ in (weak, strong))
    assert 0 < little < much


def test_controlnet_image_of_a_batch_is_the_image_of_its_seed(
    new_context: NewContext, reference_png: Path, controlnet: Path
) -> None:
    batch = made(
        in_few_steps(reference_png, reference_type="composition", num_images=3), new_context(controlnet=controlnet)
    )
    single = made(
        in_few_steps(reference_png, reference_type="composition", seed=32), new_context(controlnet=controlnet)
    )
    assert np.abs(pixels(batch.artifacts[2]) - pixels(single.artifacts[0])).max() <= 1


def test_adapters_of_other_types_leave_img2img_in_place(
    new_context: NewContext, reference_png: Path, ip_adapter: Path, image_encoder: Path
) -> None:
    context = new_context(ip_adapter_style=ip_adapter, ip_adapter_image_encoder=image_encoder)
    facts = made(with_reference(reference_png, reference_type="character"), context).facts
    assert facts["reference_method"] == "img2img"


@pytest.mark.parametrize(
    ("settings", "reference_type", "named"),
    [
        ({"ip_adapter_style": Path("/nowhere/x.safetensors")}, "style", "OURVIDZ_SDXL_IP_ADAPTER_IMAGE_ENCODER"),
        ({"controlnet": Path("/nowhere/net")}, "composition", "OURVIDZ_SDXL_CONTROLNET names /nowhere/net"),
    ],
)
def test_missing_adapter_fails_the_job_and_names_its_setting(
    new_context: NewContext, reference_png: Path, settings: dict[str, Path], reference_type: str, named: str
) -> None:
    with pytest.raises(ModelUnavailable, match=named):
        made(with_reference(reference_png, reference_type=reference_type), new_context(**settings))


def test_weights_that_are_no_ip_adapter_fail_the_job(
    new_context: NewContext, reference_png: Path, image_encoder: Path, tmp_path: Path
) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    (tmp_path / "y.safetensors").write_bytes(b"not safe")
    for name in ("x", "y"):
        path = tmp_path / f"{name}.safetensors"
        with pytest.raises(ModelUnavailable, match=f"{name}.safetensors"):
            made(
                with_reference(reference_png),
                new_context(ip_adapter_style=path, ip_adapter_image_encoder=image_encoder),
            )


def test_edges_are_lines_along_an_outline() -> None:
    image = Image.new("RGB", (64, 64), "black")
    ImageDraw.Draw(image).rectangle((16, 16, 47, 47), fill="white")
    edges = np.asarray(edge_map(image).convert("L")) > 0
    assert edges[30, 12:20].sum() in (1, 2)  # thin
    assert edges[12:20, 30].sum() in (1, 2)
    assert not edges[24:40, 24:40].any()  # not inside
    assert not edges[:8].any()


def test_picture_without_edges_has_an_empty_edge_map() -> None:
    assert not np.asarray(edge_map(Image.new("RGB", (16, 8), "red"))).any()


@pytest.mark.slow
def test_weights_of_references_act_on_all_gpus_that_share_a_job(
    new_context: NewContext,
    monkeypatch: pytest.MonkeyPatch,
    reference_png: Path,
    ip_adapter: Path,
    image_encoder: Path,
    controlnet: Path,
) -> None:
    settings = {
        "ip_adapter_style": ip_adapter,
        "ip_adapter_face": ip_adapter,
        "ip_adapter_image_encoder": image_encoder,
        "controlnet": controlnet,
    }
    for name, value in settings.items():  # other ranks read them from there
        monkeypatch.setenv(variable_of(name, "sdxl"), str(value))
    monkeypatch.setattr(ranks, "_ranks", shared := ranks.DrawingRanks(2, "cpu"))
    try:
        for reference_type in TYPES:
            asked = in_few_steps(
                reference_png,
                num_images=3,
                reference_type=reference_type,
                reference_strength=0.8,
                num_inference_steps=3,
            )
            alone = made(asked, new_context(**settings))
            together = made(asked, new_context(**settings, gpus=2))
            assert together.facts["gpus"] == 2
            assert together.facts["reference_method"] == alone.facts["reference_method"] != "img2img"
            for one, other in zip(together.artifacts, alone.artifacts, strict=True):
                assert np.abs(pixels(one) - pixels(other)).max() <= 1
    finally:
        shared.close()


@pytest.mark.slow
def test_the_fast_tier_takes_fewer_steps_by_every_method(
    new_context: NewContext, reference_png: Path, ip_adapter: Path, image_encoder: Path, controlnet: Path
) -> None:
    settings = {
        "ip_adapter_style": ip_adapter,
        "ip_adapter_image_encoder": image_encoder,
        "controlnet": controlnet,
    }
    for reference_type, method in (
        ("style", "ip_adapter_instantstyle"),
        ("composition", "controlnet_canny"),
        ("character", "img2img"),
    ):
        asked = {"reference_type": reference_type, "reference_strength": 0.2, "tier": "fast"}
        context = new_context(**settings)
        facts = made(with_reference(reference_png, **asked), context).facts
        assert (facts["reference_method"], facts["tier"]) == (method, "fast")
        assert (facts["steps"], facts["steps_computed"]) == (12 if method == "img2img" else 15, 8)
        assert context.steps == [("denoise", step, 8) for step in range(1, 9)]
