"""Build a small SDXL with random weights, for tests of everything but meaning.

Its parts are those of the real model (two CLIP text encoders with their tokenizers, the
UNet with SDXL's layout of blocks, the autoencoder), only narrow, so it takes the same way
through every loader. It shows textures, not things::

    python examples/models/tiny_sdxl.py /tmp/tiny-sdxl
    python examples/models/tiny_sdxl.py /tmp/tiny-sdxl --single-file /tmp/tiny-sdxl.safetensors
"""

from __future__ import annotations

import argparse
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

SEED = 20250719
#: Its words get a token of their own, as common words have in the real vocabulary.
TEXT = """
a an the of in on at and with by to from for over under near is are no not bad best high low worst extra missing photo
portrait painting picture image drawing art style light dark bright soft warm cold golden neon sunset night day man
woman boy girl person people men women child couple group crowd family face hands fingers eyes hair body head limbs
cat dog fox horse bird tree forest flower garden mountain river lake sea coast rocky beach city street house castle
lighthouse bridge ship boat car train sky cloud rain snow storm moon sun star fire water stone wood glass metal gold
red green blue yellow orange purple black white grey brown pink old young small large tall detailed photorealistic
quality anatomy deformed blurry lowres jpeg artifacts watermark text signature logo normal malformed distorted
features anime cartoon graphic minor merged bodies heads wrong number fused faces conjoined arms legs sitting standing
walking running dancing looking holding wearing dress hat coat book table chair window door room kitchen
"""
WORDS = TEXT.split()

VARIANT = """# What this model makes; the pipeline reads it in place of assumptions of its own.
name = "tiny-sdxl"
family = "sdxl"
# A message asks for the sizes of a production model: 1024*1024 is 128x128 here.
size_scale = 0.125
size_multiple_of = 8
max_pixels = 65536
"""


def build_pipeline(seed: int = SEED) -> StableDiffusionXLPipeline:
    """The model, the same for the same ``seed``."""
    vocab, merges = vocabulary()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text: dict[str, Any] = {
            "vocab_size": len(vocab),
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 77,
            "bos_token_id": vocab["<|startoftext|>"],
            "eos_token_id": vocab["<|endoftext|>"],
            # Wide enough that words, not only positions, tell one prompt from another.
            "initializer_factor": 4.0,
        }
        first = CLIPTextConfig(hidden_size=32, intermediate_size=64, projection_dim=32, hidden_act="quick_gelu", **text)
        second = CLIPTextConfig(hidden_size=64, intermediate_size=128, projection_dim=64, hidden_act="gelu", **text)
        text_encoder, text_encoder_2 = CLIPTextModel(first), CLIPTextModelWithProjection(second)
        unet = UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(32, 64, 128),
            layers_per_block=2,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=[1, 1, 2],
            attention_head_dim=[2, 4, 8],
            cross_attention_dim=96,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=64 + 6 * 8,
            norm_num_groups=16,
        )
        vae = AutoencoderKL(
            block_out_channels=(16, 32, 32, 32),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1,
            norm_num_groups=8,
            latent_channels=4,
            sample_size=128,
            scaling_factor=0.13025,
            force_upcast=True,
        )
        with torch.no_grad():
            _calibrate(unet.eval(), vae.eval())
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="leading",
        steps_offset=1,
        # With random weights this keeps the latents in range; noise prediction would not.
        prediction_type="v_prediction",
    )
    tokenizers = [
        CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77, pad_token=pad_token)
        for pad_token in ("<|endoftext|>", "!")
    ]
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=text_encoder.eval(),
        text_encoder_2=text_encoder_2.eval(),
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=unet,
        scheduler=scheduler,
        add_watermarker=False,
    )


def save_directory(pipeline: StableDiffusionXLPipeline, directory: Path) -> None:
    """Write the model in the diffusers layout, with its ``variant.toml``."""
    pipeline.save_pretrained(str(directory))
    (directory / "variant.toml").write_text(VARIANT, "utf-8")


def save_checkpoint(pipeline: StableDiffusionXLPipeline, checkpoint: Path, config_dir: Path) -> None:
    """Write the model as one file under SDXL's original names, and its configuration beside it."""
    save_file(original_weights(pipeline), checkpoint)
    checkpoint.with_suffix(".variant.toml").write_text(VARIANT, "utf-8")
    full = config_dir.with_name(f"{config_dir.name}.full")
    pipeline.save_pretrained(str(full))
    shutil.copytree(full, config_dir, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    shutil.rmtree(full)


def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A byte-level vocabulary in CLIP's manner: every byte, and the words of ``WORDS``."""
    characters = sorted(ByteLevel.alphabet())
    tokens = [*characters, *(f"{character}</w>" for character in characters)]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        pieces = _merged([*word[:-1], f"{word[-1]}</w>"], merges)
        # A merge that comes later never changes a word that came before.
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces = ["".join(pieces[:2]), *pieces[2:]]
    tokens += list(dict.fromkeys("".join(merge) for merge in merges))
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: index for index, token in enumerate(tokens)}, merges


def _merged(pieces: list[str], merges: list[tuple[str, str]]) -> list[str]:
    for left, right in merges:
        position = 0
        while position < len(pieces) - 1:
            if (pieces[position], pieces[position + 1]) == (left, right):
                pieces = [*pieces[:position], left + right, *pieces[position + 2 :]]
            position += 1
    return pieces


def _calibrate(unet: UNet2DConditionModel, vae: AutoencoderKL) -> None:
    """Scale the last layers so that latents and pixels fill their range instead of staying grey."""
    waves = torch.linspace(0, 12, 128)
    pictures = torch.stack(
        [torch.sin(waves[:, None] * a + waves[None, :] * b) for a, b in ((1.0, 0.3), (0.2, 1.4), (0.7, 0.7))]
    )[None]
    moments = vae.encode(pictures).latent_dist.mean
    vae.quant_conv.weight.mul_(1 / (moments.std() * vae.config.scaling_factor))
    vae.quant_conv.bias.zero_()
    pixels = vae.decode(torch.randn(2, 4, 16, 16) / vae.config.scaling_factor).sample
    vae.decoder.conv_out.weight.mul_(0.5 / pixels.std(dim=(0, 2, 3)).view(-1, 1, 1, 1))
    pixels = vae.decode(torch.randn(2, 4, 16, 16) / vae.config.scaling_factor).sample
    vae.decoder.conv_out.bias.sub_(pixels.mean(dim=(0, 2, 3)))
    conditions = {"text_embeds": torch.randn(2, 64), "time_ids": torch.zeros(2, 6)}
    predicted = unet(torch.randn(2, 4, 16, 16), 500, torch.randn(2, 77, 96), added_cond_kwargs=conditions).sample
    unet.conv_out.weight.mul_(1 / predicted.std())


def original_weights(pipeline: StableDiffusionXLPipeline) -> dict[str, torch.Tensor]:
    """All weights under the names that SDXL checkpoints carry."""
    weights = {
        f"model.diffusion_model.{_unet_name(name)}": tensor for name, tensor in pipeline.unet.state_dict().items()
    }
    for name, tensor in pipeline.vae.state_dict().items():
        original = _vae_name(name, len(pipeline.vae.config.block_out_channels))
        # The original attention is a convolution over one pixel.
        is_attention = ".mid.attn_1." in original and tensor.ndim == 2
        weights[f"first_stage_model.{original}"] = tensor[:, :, None, None] if is_attention else tensor
    for name, tensor in pipeline.text_encoder.state_dict().items():
        weights[f"conditioner.embedders.0.transformer.text_model.{name.removeprefix('text_model.')}"] = tensor
    for name, tensor in _open_clip(pipeline.text_encoder_2.state_dict()).items():
        weights[f"conditioner.embedders.1.model.{name}"] = tensor
    return {name: tensor.clone().contiguous() for name, tensor in weights.items() if "position_ids" not in name}


_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
_RESNET_PARTS = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def _unet_name(name: str) -> str:
    for ours, original in _UNET_ENDS.items():
        if name.startswith(f"{ours}."):
            renamed = name.replace(ours, original, 1)
            return _resnet_parts(renamed) if original in ("middle_block.0", "middle_block.2") else renamed
    way, block, kind, index, rest = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", name).groups()  # type: ignore[union-attr]
    # Three places a block: two layers and the change of size downwards, three layers upwards.
    place = 3 * int(block) + int(index)
    if way == "down":
        side, first = "input_blocks", place + 1
    else:
        side, first = "output_blocks", place
    if kind == "resnets":
        return f"{side}.{first}.0.{_resnet_parts(f'.{rest}')[1:]}"
    if kind == "attentions":
        return f"{side}.{first}.1.{rest}"
    if kind == "downsamplers":
        return f"{side}.{3 * int(block) + 3}.0.{rest.replace('conv', 'op', 1)}"
    return f"{side}.{3 * int(block) + 2}.2.{rest}"


def _resnet_parts(name: str) -> str:
    for ours, original in _RESNET_PARTS.items():
        name = name.replace(f".{ours}.", f".{original}.")
    return name


def _vae_name(name: str, blocks: int) -> str:
    name = re.sub(r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block.", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d+)\.resnets\.", lambda m: f"up.{blocks - 1 - int(m[1])}.block.", name)
    name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{blocks - 1 - int(m[1])}.upsample", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    replaced = {
        "mid_block.attentions.0": "mid.attn_1",
        ".group_norm.": ".norm.",
        ".to_q.": ".q.",
        ".to_k.": ".k.",
        ".to_v.": ".v.",
        ".to_out.0.": ".proj_out.",
        ".conv_shortcut.": ".nin_shortcut.",
        ".conv_norm_out.": ".norm_out.",
    }
    for ours, original in replaced.items():
        name = name.replace(ours, original)
    return name


def _open_clip(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The second text encoder as OpenCLIP names it: queries, keys and values in one matrix."""
    named: dict[str, torch.Tensor] = {}
    for key, tensor in weights.items():
        name = _open_clip_name(key)
        if name == "text_projection":
            named[name] = tensor.T
        elif ".q_proj." in key:
            parts = [weights[key.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"]
            named[name.replace("attn.q_proj.", "attn.in_proj_")] = torch.cat(parts)
        elif ".k_proj." not in key and ".v_proj." not in key:
            named[name] = tensor
    return named


_OPEN_CLIP_NAMES = {
    "text_model.": "",
    "text_projection.weight": "text_projection",
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.token_embedding": "token_embedding",
    "final_layer_norm": "ln_final",
    "encoder.layers.": "transformer.resblocks.",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.": "attn.",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def _open_clip_name(name: str) -> str:
    for ours, original in _OPEN_CLIP_NAMES.items():
        name = name.replace(ours, original)
    return name


def main() -> None:
    """Write the model where the command line says."""
    parser = argparse.ArgumentParser(description="Build a small SDXL with random weights.")
    parser.add_argument("directory", type=Path, help="where to write it in the diffusers layout")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument(
        "--single-file", type=Path, help="also write it as one checkpoint, its configuration in <name>-config"
    )
    arguments = parser.parse_args()
    pipeline = build_pipeline(arguments.seed)
    save_directory(pipeline, arguments.directory)
    print(f"OURVIDZ_SDXL_MODEL={arguments.directory}")
    if arguments.single_file:
        config_dir = arguments.single_file.with_name(f"{arguments.single_file.stem}-config")
        save_checkpoint(pipeline, arguments.single_file, config_dir)
        print(f"OURVIDZ_SDXL_MODEL={arguments.single_file}")
        print(f"OURVIDZ_SDXL_CONFIG_DIR={config_dir}")


if __name__ == "__main__":
    main()
