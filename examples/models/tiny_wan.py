"""Make a WAN model of a few hundred kilobytes: the production architectures with random weights.

Its pictures mean nothing, but it takes exactly the path of the real model, and an 81-frame
video of 25 steps takes seconds on one processor core::

    python examples/models/tiny_wan.py demo-models/wan
    wan_generate --task=t2v-1.3B --ckpt_dir=demo-models/wan --prompt=anything --save_file=out.mp4
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLWan,
    DiffusionPipeline,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
)
from safetensors.torch import save_file
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

VARIANT = """\
# A tenth of the real sides: 480*832 becomes 48*80.
name = "tiny-wan"
size_scale = 0.1
"""
TEXT_DIM = 32
HEADS = 2
HEAD_DIM = 12
VAE_DIM = 8
LETTERS = "etaoinshrdlcumwfgypbvkjxqzETAOINSHRDLCUMWFGYPBVKJXQZ0123456789.,;:!?'\"()-+*/&%#@_<>=[]{}|~^$\\`"

#: What each kind of model needs beside the text-to-video transformer's own sizes.
KINDS = ("t2v", "i2v", "flf2v", "vace")


def make_pipeline(kind: str = "t2v", *, seed: int = 0) -> DiffusionPipeline:
    """A model of this kind with weights drawn from ``seed``."""
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, not {kind!r}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = make_tokenizer()
        shared = {
            "tokenizer": tokenizer,
            "text_encoder": make_text_encoder(len(tokenizer)),
            "vae": make_vae(),
            "scheduler": UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=5.0
            ),
        }
        sizes = {
            "num_attention_heads": HEADS,
            "attention_head_dim": HEAD_DIM,
            "text_dim": TEXT_DIM,
            "freq_dim": 32,
            "ffn_dim": 48,
            "num_layers": 2,
        }
        if kind == "vace":
            transformer = WanVACETransformer3DModel(**sizes, vace_layers=[0], vace_in_channels=96)
            return WanVACEPipeline(transformer=_lively(transformer), **shared)
        if kind == "t2v":
            return WanPipeline(transformer=_lively(WanTransformer3DModel(**sizes)), **shared)
        from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

        vision = CLIPVisionConfig(
            hidden_size=24,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=16,
        )
        tokens = (32 // 16) ** 2 + 1
        transformer = WanTransformer3DModel(
            **sizes,
            # The mask (4) and the encoded picture (16) come beside the noise (16).
            in_channels=36,
            out_channels=16,
            image_dim=24,
            added_kv_proj_dim=HEADS * HEAD_DIM,
            pos_embed_seq_len=2 * tokens if kind == "flf2v" else None,
        )
        return WanImageToVideoPipeline(
            transformer=_lively(transformer),
            image_encoder=CLIPVisionModel(vision),
            image_processor=CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32),
            **shared,
        )


def make_tokenizer() -> T5Tokenizer:
    """A tokenizer of single letters, in the form of the real one."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    return T5Tokenizer(
        vocab=special + [(letter, -3.0 - place / 100) for place, letter in enumerate(LETTERS)], extra_ids=0
    )


def make_text_encoder(vocabulary: int) -> UMT5EncoderModel:
    """A UMT5 encoder of two blocks."""
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=vocabulary,
            d_model=TEXT_DIM,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            tie_word_embeddings=True,
        )
    )


def make_vae() -> AutoencoderKLWan:
    """The causal video VAE, with a twelfth of the channels."""
    return AutoencoderKLWan(base_dim=VAE_DIM, z_dim=16)


def _lively(transformer: torch.nn.Module) -> torch.nn.Module:
    """Let the untrained output depend visibly on text and time."""
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if name.endswith("proj_out.weight"):
                parameter.normal_(std=0.15)
    return transformer


def save(pipeline: DiffusionPipeline, directory: Path) -> None:
    """Write the diffusers layout."""
    pipeline.save_pretrained(directory)
    (directory / "variant.toml").write_text(VARIANT, "utf-8")


def save_native(pipeline: DiffusionPipeline, directory: Path, variant: str = VARIANT) -> None:
    """Write the layout that WAN was published in."""
    directory.mkdir(parents=True, exist_ok=True)
    transformer = {native_transformer_name(n): w.contiguous() for n, w in pipeline.transformer.state_dict().items()}
    save_file(transformer, directory / "diffusion_pytorch_model.safetensors")
    text_encoder = pipeline.text_encoder.state_dict()
    torch.save(
        {native_text_encoder_name(n): w for n, w in text_encoder.items() if n != "encoder.embed_tokens.weight"},
        directory / "models_t5_umt5-xxl-enc-bf16.pth",
    )
    torch.save({native_vae_name(n): w for n, w in pipeline.vae.state_dict().items()}, directory / "Wan2.1_VAE.pth")
    pipeline.tokenizer.save_pretrained(directory / "google" / "umt5-xxl")
    config = pipeline.transformer.config
    (directory / "config.json").write_text(
        json.dumps({"num_heads": config.num_attention_heads, "num_layers": config.num_layers}), "utf-8"
    )
    (directory / "variant.toml").write_text(variant, "utf-8")


TRANSFORMER_NAMES = (
    (r"condition_embedder\.time_embedder\.linear_1\.(.*)", r"time_embedding.0.\1"),
    (r"condition_embedder\.time_embedder\.linear_2\.(.*)", r"time_embedding.2.\1"),
    (r"condition_embedder\.text_embedder\.linear_1\.(.*)", r"text_embedding.0.\1"),
    (r"condition_embedder\.text_embedder\.linear_2\.(.*)", r"text_embedding.2.\1"),
    (r"condition_embedder\.time_proj\.(.*)", r"time_projection.1.\1"),
    (r"(.*blocks\.\d+)\.attn1\.to_out\.0\.(.*)", r"\1.self_attn.o.\2"),
    (r"(.*blocks\.\d+)\.attn1\.to_([qkv])\.(.*)", r"\1.self_attn.\2.\3"),
    (r"(.*blocks\.\d+)\.attn1\.(norm_[qk].*)", r"\1.self_attn.\2"),
    (r"(.*blocks\.\d+)\.attn2\.to_out\.0\.(.*)", r"\1.cross_attn.o.\2"),
    (r"(.*blocks\.\d+)\.attn2\.to_([qkv])\.(.*)", r"\1.cross_attn.\2.\3"),
    (r"(.*blocks\.\d+)\.attn2\.(norm_[qk].*)", r"\1.cross_attn.\2"),
    (r"(.*blocks\.\d+)\.ffn\.net\.0\.proj\.(.*)", r"\1.ffn.0.\2"),
    (r"(.*blocks\.\d+)\.ffn\.net\.2\.(.*)", r"\1.ffn.2.\2"),
    (r"(.*blocks\.\d+)\.norm2\.(.*)", r"\1.norm3.\2"),
    (r"(.*blocks\.\d+)\.scale_shift_table", r"\1.modulation"),
    (r"(vace_blocks\.\d+)\.proj_in\.(.*)", r"\1.before_proj.\2"),
    (r"(vace_blocks\.\d+)\.proj_out\.(.*)", r"\1.after_proj.\2"),
    (r"proj_out\.(.*)", r"head.head.\1"),
    (r"scale_shift_table", r"head.modulation"),
    (r"((?:vace_)?patch_embedding\..*)", r"\1"),
)
TEXT_ENCODER_NAMES = (
    (r"shared\.weight", "token_embedding.weight"),
    (r"encoder\.final_layer_norm\.weight", "norm.weight"),
    (r"encoder\.block\.(\d+)\.layer\.0\.layer_norm\.weight", r"blocks.\1.norm1.weight"),
    (r"encoder\.block\.(\d+)\.layer\.1\.layer_norm\.weight", r"blocks.\1.norm2.weight"),
    (r"encoder\.block\.(\d+)\.layer\.0\.SelfAttention\.([qkvo])\.weight", r"blocks.\1.attn.\2.weight"),
    (
        r"encoder\.block\.(\d+)\.layer\.0\.SelfAttention\.relative_attention_bias\.weight",
        r"blocks.\1.pos_embedding.embedding.weight",
    ),
    (r"encoder\.block\.(\d+)\.layer\.1\.DenseReluDense\.wi_0\.weight", r"blocks.\1.ffn.gate.0.weight"),
    (r"encoder\.block\.(\d+)\.layer\.1\.DenseReluDense\.wi_1\.weight", r"blocks.\1.ffn.fc1.weight"),
    (r"encoder\.block\.(\d+)\.layer\.1\.DenseReluDense\.wo\.weight", r"blocks.\1.ffn.fc2.weight"),
)
#: A residual block's layers, by their place in the published sequence.
RESIDUAL_NAMES = {"norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6"}


def native_transformer_name(name: str) -> str:
    """The published name of a transformer weight."""
    return _renamed(name, TRANSFORMER_NAMES)


def native_text_encoder_name(name: str) -> str:
    """The published name of a text encoder weight."""
    return _renamed(name, TEXT_ENCODER_NAMES)


def native_vae_name(name: str) -> str:
    """The published name of a VAE weight. There the blocks of all levels are counted through."""
    for ours, theirs in RESIDUAL_NAMES.items():
        name = re.sub(rf"\.{ours}\.", f".{theirs}.", name)
    name = name.replace(".conv_shortcut.", ".shortcut.")
    name = re.sub(r"^quant_conv\.", "conv1.", name)
    name = re.sub(r"^post_quant_conv\.", "conv2.", name)
    name = re.sub(r"^(encoder|decoder)\.conv_in\.", r"\1.conv1.", name)
    name = re.sub(r"^(encoder|decoder)\.norm_out\.", r"\1.head.0.", name)
    name = re.sub(r"^(encoder|decoder)\.conv_out\.", r"\1.head.2.", name)
    name = re.sub(r"^(encoder|decoder)\.mid_block\.resnets\.0\.", r"\1.middle.0.", name)
    name = re.sub(r"^(encoder|decoder)\.mid_block\.attentions\.0\.", r"\1.middle.1.", name)
    name = re.sub(r"^(encoder|decoder)\.mid_block\.resnets\.1\.", r"\1.middle.2.", name)
    name = name.replace("encoder.down_blocks.", "encoder.downsamples.")
    # Three residual blocks and an upsampler a level.
    up = re.match(r"decoder\.up_blocks\.(\d)\.(?:resnets\.(\d)|upsamplers\.0)\.(.*)", name)
    if up:
        level, block, rest = int(up[1]), int(up[2]) if up[2] else 3, up[3]
        name = f"decoder.upsamples.{4 * level + block}.{rest}"
    return name


def _renamed(name: str, names: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in names:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, replacement, name)
    raise ValueError(f"{name} has no published name")


def main() -> None:
    """Write a model where the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--kind", choices=KINDS, default="t2v")
    parser.add_argument(
        "--native", action="store_true", help="write the published layout in place of the diffusers one"
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    pipeline = make_pipeline(arguments.kind, seed=arguments.seed)
    (save_native if arguments.native else save)(pipeline, arguments.directory)
    print(arguments.directory)


if __name__ == "__main__":
    main()
