"""Load WAN weights from a diffusers directory or from the files WAN was published as. Offline.

The native layout is ``diffusion_pytorch_model.safetensors`` (or its shards),
``models_t5_umt5-xxl-enc-bf16.pth``, ``Wan2.1_VAE.pth`` and the tokenizer in ``google/umt5-xxl``.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Mapping
from functools import partial
from importlib.resources import files
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import diffusers
import torch
from attrs import field, frozen
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel
from transformers.utils.logging import disable_progress_bar

from ourvidz_core.engine.models import AlwaysResident
from ourvidz_core.engine.tiers import Tier
from ourvidz_core.engine.variants import FILE_NAME, read_variant
from ourvidz_core.engine.weight_files import read_module, tensor_by_tensor
from ourvidz_core.errors import ModelUnavailable
from ourvidz_core.plugins.residency import Residence
from ourvidz_wan.acceleration import Acceleration, prepare_transformer
from ourvidz_wan.config import Solver, WanVariant
from ourvidz_wan.decoding import Decoder
from ourvidz_wan.layout import (
    NATIVE_TEXT_ENCODER,
    NATIVE_TOKENIZER,
    NATIVE_VAE,
    is_diffusers,
    missing_native_files,
    transformer_files,
)
from ourvidz_wan.prediction import LocalPredictor, Predictor
from ourvidz_wan.schedulers import SCHEDULERS
from ourvidz_wan.tasks import Pipeline, Task
from ourvidz_wan.tiers import steps_taken

#: Every WAN 2.1 transformer has heads of this size; its weights do not say it.
HEAD_DIM = 128

TRANSFORMERS: Mapping[Pipeline, str] = {
    Pipeline.TEXT: "WanTransformer3DModel",
    Pipeline.IMAGE: "WanTransformer3DModel",
    Pipeline.VACE: "WanVACETransformer3DModel",
}

#: Names in the published text encoder, and what transformers calls the same weight.
_TEXT_ENCODER_NAMES = (
    (r"token_embedding\.weight", "shared.weight"),
    (r"norm\.weight", "encoder.final_layer_norm.weight"),
    (r"blocks\.(\d+)\.norm1\.weight", r"encoder.block.\1.layer.0.layer_norm.weight"),
    (r"blocks\.(\d+)\.norm2\.weight", r"encoder.block.\1.layer.1.layer_norm.weight"),
    (r"blocks\.(\d+)\.attn\.([qkvo])\.weight", r"encoder.block.\1.layer.0.SelfAttention.\2.weight"),
    (
        r"blocks\.(\d+)\.pos_embedding\.embedding\.weight",
        r"encoder.block.\1.layer.0.SelfAttention.relative_attention_bias.weight",
    ),
    (r"blocks\.(\d+)\.ffn\.gate\.0\.weight", r"encoder.block.\1.layer.1.DenseReluDense.wi_0.weight"),
    (r"blocks\.(\d+)\.ffn\.fc1\.weight", r"encoder.block.\1.layer.1.DenseReluDense.wi_1.weight"),
    (r"blocks\.(\d+)\.ffn\.fc2\.weight", r"encoder.block.\1.layer.1.DenseReluDense.wo.weight"),
)


@frozen(kw_only=True, eq=False)
class WanModels:
    """One loaded WAN model, ready to run again and again."""

    name: str
    variant: WanVariant
    device: torch.device
    #: The diffusers pipeline of the task; each run sets its scheduler.
    pipeline: Any = field(repr=False)
    #: Asks the pipeline's transformer, here or on several devices.
    predictor: Predictor = field(repr=False)
    #: Decodes with the pipeline's VAE.
    decoder: Decoder = field(repr=False)
    #: What was done to the transformer; None on a CPU.
    acceleration: Acceleration | None = None
    #: Its place on the device, where its parts can make room for each other.
    residence: Residence = field(factory=AlwaysResident, repr=False)
    #: Encoded reference pictures, by what they show and frames, height and width: see ``sampling``.
    stills: OrderedDict[tuple[str, tuple[int, int, int]], torch.Tensor] = field(factory=OrderedDict, repr=False)
    #: Encoded texts, by what they say.
    texts: OrderedDict[str, torch.Tensor] = field(factory=OrderedDict, repr=False)

    @property
    def parts(self) -> Mapping[str, torch.nn.Module]:
        """What works one after another, by diffusers' names."""
        components = self.pipeline.components.items()
        return {name: component for name, component in components if isinstance(component, torch.nn.Module)}


def load_models(
    ckpt_dir: Path,
    task: Task,
    *,
    device: str = "cpu",
    offload: bool = False,
    dtype: torch.dtype | None = None,
    gpus: int = 1,
) -> WanModels:
    """Load the weights of ``task`` for ``device``.

    ``dtype`` is bfloat16 on a GPU and float32 elsewhere unless given; what has to stay in
    float32 does. ``offload`` keeps each model in main memory until it works. With more than
    one of ``gpus`` others than ``device`` predict as well, in processes of their own.

    :raises ModelUnavailable: a file is missing, cannot be read or is not what its name says.
    :raises GenerationError: there are not so many GPUs.
    """
    # Standard error carries the steps of a generation, and nothing is downloaded that one would wait for.
    disable_progress_bar()
    place = torch.device(device)
    dtype = dtype or (torch.bfloat16 if place.type == "cuda" else torch.float32)
    variant = read_variant(ckpt_dir, WanVariant)
    try:
        components = _components(ckpt_dir, task, dtype, torch.device("cpu") if offload else place)
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelUnavailable(f"the weights of {task.name} in {ckpt_dir} cannot be used: {error}") from error
    modules = [component for component in components.values() if isinstance(component, torch.nn.Module)]
    for module in modules:
        module.eval().requires_grad_(False)
    # diffusers' own, for a directory that is written from this names the classes in it.
    scheduler: Any = UniPCMultistepScheduler
    # By name, because diffusers imports each pipeline when it is asked for.
    pipeline_class = getattr(diffusers, task.pipeline.value)
    pipeline = pipeline_class(**components, scheduler=scheduler(**_shipped("scheduler")))
    pipeline.set_progress_bar_config(disable=True)
    if offload and place.type == "cuda":
        pipeline.enable_model_cpu_offload(device=place)
    else:
        for module in modules:
            module.to(place)
    if place.type == "cpu":
        for module in modules:
            _move_off_files(module)
    _check_text_encoder(components["text_encoder"], ckpt_dir)
    transformer = components["transformer"]
    acceleration = prepare_transformer(transformer, place)
    predictor: Predictor = LocalPredictor(transformer, place, is_offloaded=offload)
    if gpus > 1:
        from ourvidz_wan.parallel.ranks import share_predictions

        predictor = share_predictions(transformer, predictor, ckpt_dir, task, gpus=gpus, device=place)
    return WanModels(
        name=variant.name or ckpt_dir.name,
        variant=variant,
        device=place,
        pipeline=pipeline,
        acceleration=acceleration,
        predictor=predictor,
        decoder=Decoder(components["vae"], place),
    )


def load_transformer(ckpt_dir: Path, task: Task, *, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """The transformer of ``task`` alone, as :func:`load_models` has it.

    :raises ModelUnavailable: its files are missing or cannot be read.
    """
    disable_progress_bar()
    try:
        if is_diffusers(ckpt_dir):
            transformer = _diffusers_transformer(ckpt_dir, task, dtype, device)
        else:
            transformer = _native_transformer(transformer_files(ckpt_dir), task, dtype)
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, KeyError, IndexError, RuntimeError, SafetensorError) as error:
        raise ModelUnavailable(f"the transformer of {task.name} in {ckpt_dir} cannot be used: {error}") from error
    transformer.eval().requires_grad_(False).to(device)
    if device.type == "cpu":
        _move_off_files(transformer)
    return transformer


def make_scheduler(solver: Solver, shift: float, tier: Tier = Tier.EXACT) -> Any:
    """A new scheduler of WAN's flow; it keeps state, so that each video needs its own."""
    kind: Any = SCHEDULERS[solver]
    scheduler = kind(**{**_shipped("scheduler"), "flow_shift": shift})
    if tier is not Tier.EXACT:
        scheduler.places = partial(steps_taken, tier)
    return scheduler


def convert_checkpoint(source: Path, target: Path, task: Task, *, dtype: torch.dtype | None = None) -> None:
    """Write the model at ``source`` to the new directory ``target`` in the diffusers layout.

    ``dtype`` is the one of the saved weights, bfloat16 unless given.

    :raises ModelUnavailable: ``source`` cannot be used, or ``target`` is there already.
    """
    if target.exists():
        raise ModelUnavailable(f"{target} is there already; name a directory that is not")
    models = load_models(source, task, dtype=dtype or torch.bfloat16)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as directory:
        unfinished = Path(directory) / target.name
        models.pipeline.save_pretrained(unfinished)
        if (source / FILE_NAME).is_file():
            shutil.copyfile(source / FILE_NAME, unfinished / FILE_NAME)
        unfinished.rename(target)


def _components(ckpt_dir: Path, task: Task, dtype: torch.dtype, place: torch.device) -> dict[str, Any]:
    if is_diffusers(ckpt_dir):
        return _diffusers_components(ckpt_dir, task, dtype, place)
    return _native_components(ckpt_dir, task, dtype)


def _diffusers_components(ckpt_dir: Path, task: Task, dtype: torch.dtype, place: torch.device) -> dict[str, Any]:
    vae_class: Any = AutoencoderKLWan
    local: dict[str, Any] = {"local_files_only": True}
    # transformers reads by several threads, and straight to a GPU where it is told one.
    onto: dict[str, Any] = {"device_map": {"": place}} if place.type == "cuda" else {}
    with tensor_by_tensor():
        encoder = UMT5EncoderModel.from_pretrained(ckpt_dir / "text_encoder", dtype=dtype, **local, **onto)
    components = {
        "tokenizer": AutoTokenizer.from_pretrained(ckpt_dir / "tokenizer", **local),
        "text_encoder": encoder,
        "transformer": _diffusers_transformer(ckpt_dir, task, dtype, place),
        "vae": vae_class.from_pretrained(ckpt_dir / "vae", torch_dtype=torch.float32, **local),
    }
    if task.pipeline is Pipeline.IMAGE:
        from transformers import CLIPImageProcessor, CLIPVisionModel

        components["image_processor"] = CLIPImageProcessor.from_pretrained(ckpt_dir / "image_processor", **local)
        components["image_encoder"] = CLIPVisionModel.from_pretrained(
            ckpt_dir / "image_encoder", dtype=torch.float32, **local
        )
    return components


def _diffusers_transformer(ckpt_dir: Path, task: Task, dtype: torch.dtype, place: torch.device) -> torch.nn.Module:
    transformer_class: Any = getattr(diffusers, TRANSFORMERS[task.pipeline])
    if place.type == "cuda":
        directory, kept = ckpt_dir / "transformer", transformer_class._keep_in_fp32_modules
        read = read_module(transformer_class, directory, device=place, dtype=dtype, kept_in_float32=kept)
        if read is not None:
            return read
    transformer: torch.nn.Module = transformer_class.from_pretrained(
        ckpt_dir / "transformer", torch_dtype=dtype, local_files_only=True
    )
    return transformer


def _native_components(ckpt_dir: Path, task: Task, dtype: torch.dtype) -> dict[str, Any]:
    if task.pipeline is Pipeline.IMAGE:
        raise ModelUnavailable(
            f"{ckpt_dir} is no diffusers directory (it has no model_index.json), and {task.name} runs from one only"
        )
    if missing := missing_native_files(ckpt_dir):
        raise ModelUnavailable(
            f"{ckpt_dir} holds no {task.name} weights: it is no diffusers directory (model_index.json is missing),"
            f" and of WAN's own files these are missing: {', '.join(missing)}"
        )
    return {
        "tokenizer": AutoTokenizer.from_pretrained(ckpt_dir / NATIVE_TOKENIZER, local_files_only=True),
        "text_encoder": _native_text_encoder(ckpt_dir / NATIVE_TEXT_ENCODER, dtype),
        "transformer": _native_transformer(transformer_files(ckpt_dir), task, dtype),
        "vae": _native_vae(ckpt_dir / NATIVE_VAE),
    }


def _native_transformer(paths: list[Path], task: Task, dtype: torch.dtype) -> torch.nn.Module:
    weights: dict[str, torch.Tensor] = {}
    for path in paths:
        weights.update(load_file(path))
    config = _transformer_config(weights, paths[0].parent)
    transformer_class: Any = getattr(diffusers, TRANSFORMERS[task.pipeline])
    transformer = _from_single_file(transformer_class, weights, config)
    return _cast_all_but(transformer, transformer_class._keep_in_fp32_modules, dtype)


def _transformer_config(weights: Mapping[str, torch.Tensor], directory: Path) -> dict[str, Any]:
    """The sizes that the weights show, over those of the published 1.3B model."""
    width, channels, *patch = weights["patch_embedding.weight"].shape
    config = _shipped("transformer")
    heads = width // HEAD_DIM
    if (directory / "config.json").is_file():
        heads = json.loads((directory / "config.json").read_text("utf-8")).get("num_heads", heads)
    config |= {
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "in_channels": channels,
        "out_channels": weights["head.head.weight"].shape[0] // math.prod(patch),
        "patch_size": patch,
        "text_dim": weights["text_embedding.0.weight"].shape[1],
        "freq_dim": weights["time_embedding.0.weight"].shape[1],
        "ffn_dim": weights["blocks.0.ffn.0.weight"].shape[0],
        "num_layers": _count(weights, r"blocks\.(\d+)\."),
    }
    if "vace_patch_embedding.weight" in weights:
        # The control blocks are spread evenly over the others, as in both published models.
        stride = config["num_layers"] // _count(weights, r"vace_blocks\.(\d+)\.")
        config["_class_name"] = "WanVACETransformer3DModel"
        config["vace_layers"] = list(range(0, config["num_layers"], stride))
        config["vace_in_channels"] = weights["vace_patch_embedding.weight"].shape[1]
    return config


def _native_vae(path: Path) -> torch.nn.Module:
    weights = _load_pickle(path)
    config = _shipped("vae")
    base = config["base_dim"] = weights["encoder.conv1.weight"].shape[0]
    # Two residual blocks a level, and a downsampler after all levels but the last.
    widths = [weights[f"encoder.downsamples.{3 * level}.residual.2.weight"].shape[0] for level in range(4)]
    config["dim_mult"] = [width // base for width in widths]
    config["decoder_base_dim"] = weights["decoder.head.0.gamma"].shape[0]
    config["z_dim"] = weights["conv2.weight"].shape[0]
    return _from_single_file(AutoencoderKLWan, weights, config)


def _native_text_encoder(path: Path, dtype: torch.dtype) -> UMT5EncoderModel:
    native = _load_pickle(path)
    weights = {_text_encoder_name(name): weight.to(dtype) for name, weight in native.items()}
    embedding = weights["shared.weight"]
    bias = weights["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    inner = weights["encoder.block.0.layer.0.SelfAttention.q.weight"].shape[0]
    config = _shipped("text_encoder") | {
        "vocab_size": embedding.shape[0],
        "d_model": embedding.shape[1],
        "d_ff": weights["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"].shape[0],
        "d_kv": inner // bias.shape[1],
        "num_heads": bias.shape[1],
        "num_layers": _count(weights, r"encoder\.block\.(\d+)\."),
        "relative_attention_num_buckets": bias.shape[0],
    }
    # Without memory of its own first: the real one has 5.7 billion weights.
    with torch.device("meta"):
        model = UMT5EncoderModel(UMT5Config(**config))
    model.load_state_dict({**weights, "encoder.embed_tokens.weight": embedding}, assign=True)
    model.tie_weights()
    return model


def _text_encoder_name(native: str) -> str:
    for pattern, name in _TEXT_ENCODER_NAMES:
        if re.fullmatch(pattern, native):
            return re.sub(pattern, name, native)
    raise ValueError(f"{native} is no weight of a UMT5 encoder")


def _check_text_encoder(text_encoder: UMT5EncoderModel, ckpt_dir: Path) -> None:
    """Early 5.x of transformers left the input embedding at zero, and every video grey."""
    embedding, shared = text_encoder.encoder.embed_tokens.weight, text_encoder.shared.weight
    if embedding.data_ptr() != shared.data_ptr():
        raise ModelUnavailable(f"the text encoder in {ckpt_dir} does not share its embedding; update transformers")
    if not bool(embedding.any()):
        raise ModelUnavailable(f"the text encoder in {ckpt_dir} has an embedding of zeros; its file is damaged")


def _from_single_file(cls: Any, weights: dict[str, torch.Tensor], config: Mapping[str, Any]) -> torch.nn.Module:
    """A model in float32; diffusers renames the weights.

    Given a dtype, it would cast even what ``from_pretrained`` keeps in float32; without a local
    configuration, it would ask the Hub for one.
    """
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(config), "utf-8")
        model: torch.nn.Module = cls.from_single_file(weights, config=directory, local_files_only=True)
    return model.float()


def _cast_all_but(model: torch.nn.Module, kept: list[str], dtype: torch.dtype) -> torch.nn.Module:
    for name, parameter in model.named_parameters():
        if not set(name.split(".")) & set(kept):
            parameter.data = parameter.data.to(dtype)
    return model


def _move_off_files(module: torch.nn.Module) -> None:
    # A weight that is mapped from a file begins anywhere, and how a CPU rounds a product depends
    # on where it begins: with copies of their own all layouts and processes make the same frames.
    for parameter in module.parameters():
        parameter.data = parameter.data.clone()


def _load_pickle(path: Path) -> dict[str, torch.Tensor]:
    try:
        weights: dict[str, torch.Tensor] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UnpicklingError as error:
        # torch's own message advises to load it all the same.
        raise ModelUnavailable(f"{path} holds something else than weights, or is damaged; get it again") from error
    return weights


def _count(weights: Mapping[str, torch.Tensor], pattern: str) -> int:
    found = (re.match(pattern, name) for name in weights)
    return 1 + max(int(match.group(1)) for match in found if match)


def _shipped(name: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(files("ourvidz_wan").joinpath("configs", f"{name}.json").read_text("utf-8"))
    return config
