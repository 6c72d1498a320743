"""Train a small SDXL on scenes that we draw: the autoencoder, then both text encoders and the UNet together.

Minutes on one GPU; every part has the production model's architecture, only narrow::

    python examples/models/train_sdxl.py demo-models/sdxl
    python examples/models/train_sdxl.py /tmp/sdxl --scenes=64 --vae-steps=2 --steps=2 --batch=8   # does it run

The last third of the training is made for guidance: the sum that classifier-free guidance makes of
both predictions is trained to be right at ``GUIDANCE``. A request's 6.0 to 7.5 is then a gentle
guidance of 1.5 to 1.9, where a small model would otherwise burn out its colours.
"""

from __future__ import annotations

import logging
import random
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.models import scenes, training, vocabularies

logger = logging.getLogger("train_sdxl")

#: The guidance at which the combined prediction is that of the data.
GUIDANCE = 4.0
#: Part of the training after which the combined prediction is trained.
PLAIN_PART = 0.6
SIZES = ((128, 128), (96, 160), (160, 96))
_SHARE_OF_SIZES = (0.8, 0.1, 0.1)
_CAPTIONS = 4
_FILLERS = 4096
#: SDXL's own factor; the latents are made to fit it.
SCALING_FACTOR = 0.13025
_KL_WEIGHT = 2e-4

VARIANT = """\
# A small model that draws coloured shapes; see README.md. 1024*1024 is 128x128 here.
name = "demo"
family = "sdxl"
size_scale = 0.125
size_multiple_of = 32
max_pixels = 65536
"""


def make_pipeline() -> Any:
    """The untrained model."""
    words = scenes.vocabulary()
    tokenizers = [vocabularies.clip_tokenizer(words, pad_token=pad) for pad in (vocabularies.CLIP_END, "!")]
    text: dict[str, Any] = {
        "vocab_size": len(tokenizers[0]),
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 77,
        "bos_token_id": tokenizers[0].bos_token_id,
        "eos_token_id": tokenizers[0].eos_token_id,
    }
    narrow = CLIPTextConfig(hidden_size=96, intermediate_size=256, projection_dim=96, hidden_act="quick_gelu", **text)
    wide = CLIPTextConfig(hidden_size=160, intermediate_size=384, projection_dim=160, hidden_act="gelu", **text)
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(64, 96, 160),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=[1, 1, 2],
        attention_head_dim=[2, 3, 5],
        cross_attention_dim=256,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=160 + 6 * 16,
        norm_num_groups=16,
    )
    vae = AutoencoderKL(
        block_out_channels=(32, 64, 96, 96),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=16,
        latent_channels=4,
        sample_size=128,
        scaling_factor=SCALING_FACTOR,
        force_upcast=True,
    )
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(narrow),
        text_encoder_2=CLIPTextModelWithProjection(wide),
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=unet,
        scheduler=make_scheduler(),
        # An empty negative prompt is a text that was trained, not zeros.
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )


def make_scheduler() -> Any:
    """The noise schedule. It ends in pure noise: at 16x16 latents, SDXL's own would leave a background's colour."""
    return EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="trailing",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
    )


def train_vae(pipeline: Any, run: training.Run, device: torch.device, seed: int, batch: int) -> None:
    """Teach the autoencoder scenes of all kinds; both colours and shapes of held-out pairs occur, never together."""
    vae = pipeline.vae
    pool = scenes.draw_scenes(20000 if device.type == "cuda" else 64, seed, video=False)
    chance = random.Random(seed)
    for _ in run:
        width, height = chance.choices(SIZES, _SHARE_OF_SIZES)[0]
        pictures = scenes.render(chance.choices(pool, k=batch), width, height, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            posterior = vae.encode(pictures).latent_dist
            latents = posterior.sample()
            decoded = vae.decode(latents).sample
        error = decoded.float() - pictures
        square, kl = error.square().mean(), posterior.kl().mean() / latents[0].numel()
        run.learn(4 * square + error.abs().mean() + _KL_WEIGHT * kl, square=square, kl=kl)
    run.average()
    fit_latents(vae, scenes.render(pool[:2048], *SIZES[0], device))


@torch.no_grad()  # type: ignore[untyped-decorator]
def fit_latents(vae: Any, pictures: torch.Tensor) -> None:
    """Move mean and spread of the latents to what SDXL's scaling factor expects; what it decodes stays the same."""
    latents = torch.cat([vae.encode(part).latent_dist.mean for part in pictures.split(256)])
    mean, spread = latents.mean((0, 2, 3)), latents.std((0, 2, 3)) * SCALING_FACTOR
    channels = len(mean)
    vae.post_quant_conv.bias.add_(vae.post_quant_conv.weight[..., 0, 0] @ mean)
    vae.post_quant_conv.weight.mul_(spread.view(1, -1, 1, 1))
    vae.quant_conv.bias[:channels].sub_(mean)
    vae.quant_conv.bias[:channels].div_(spread)
    vae.quant_conv.weight[:channels].div_(spread.view(-1, 1, 1, 1))
    vae.quant_conv.bias[channels:].sub_(2 * spread.log())


@torch.no_grad()  # type: ignore[untyped-decorator]
def encode_scenes(vae: Any, drawn: list[scenes.Scene], width: int, height: int, device: torch.device) -> torch.Tensor:
    """Latents of all scenes, as the UNet sees them."""
    parts = [drawn[i : i + 512] for i in range(0, len(drawn), 512)]
    encoded = [vae.encode(scenes.render(part, width, height, device)).latent_dist.mean.half() for part in parts]
    return torch.cat(encoded) * SCALING_FACTOR


def encode_text(pipeline: Any, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What SDXL's pipeline makes of a prompt: the last but one states of both encoders, and a summary."""
    ids = ids.long()
    end = pipeline.tokenizer.eos_token_id
    # Both have one vocabulary; only what fills up the second's line differs.
    is_filling = (ids == end).cumsum(1) - (ids == end).int() >= 1
    second = torch.where(is_filling, pipeline.tokenizer_2.pad_token_id, ids)
    narrow = pipeline.text_encoder(ids, output_hidden_states=True)
    wide = pipeline.text_encoder_2(second, output_hidden_states=True)
    return torch.cat([narrow.hidden_states[-2], wide.hidden_states[-2]], dim=-1), wide.text_embeds


def train_unet(
    pipeline: Any, run: training.Run, device: torch.device, seed: int, batch: int, count: int, plain_part: float
) -> None:
    """Teach the UNet and the text encoders what captions mean."""
    chance = random.Random(seed + 1)
    drawn = scenes.draw_scenes(count, seed, video=False)
    latents, ids = [], []
    for (width, height), share in zip(SIZES, _SHARE_OF_SIZES, strict=True):
        part = drawn[: max(batch, int(count * share))]
        latents.append(encode_scenes(pipeline.vae, part, width, height, device))
        texts = [scenes.caption(scene, chance) for scene in part for _ in range(_CAPTIONS)]
        ids.append(training.token_rows(pipeline.tokenizer, texts, 77).view(len(part), _CAPTIONS, -1).to(device))
    fillers = training.token_rows(pipeline.tokenizer, [scenes.filler(chance) for _ in range(_FILLERS)], 77).to(device)
    logger.info("%d scenes encoded, mean %.3f, std %.3f", count, latents[0].float().mean(), latents[0].float().std())

    signal = pipeline.scheduler.alphas_cumprod.to(device).float()
    unet = pipeline.unet
    for _ in run:
        size = chance.choices(range(len(SIZES)), _SHARE_OF_SIZES)[0]
        width, height = SIZES[size]
        is_plain = run.done < plain_part
        wanted = batch if is_plain else batch // 2
        rows = torch.randint(len(latents[size]), (wanted,), device=device)
        clean = latents[size][rows].float()
        told = ids[size][rows, torch.randint(_CAPTIONS, (wanted,), device=device)]
        untold = fillers[torch.randint(_FILLERS, (wanted,), device=device)]
        steps = torch.randint(1000, (wanted,), device=device)
        kept = signal[steps].view(-1, 1, 1, 1)
        noise = torch.randn_like(clean)
        noisy = kept.sqrt() * clean + (1 - kept).sqrt() * noise
        target = kept.sqrt() * noise - (1 - kept).sqrt() * clean
        if is_plain:
            is_untold = torch.rand(wanted, 1, device=device) < 0.12
            text = torch.where(is_untold, untold, told)
        else:
            text, noisy, steps = torch.cat([told, untold]), noisy.repeat(2, 1, 1, 1), steps.repeat(2)
        with torch.autocast(device.type, torch.bfloat16):
            states, summary = encode_text(pipeline, text)
            sizes = torch.tensor([[height, width, 0, 0, height, width]], device=device).expand(len(text), -1)
            conditions = {"text_embeds": summary, "time_ids": sizes}
            predicted = unet(noisy, steps, states, added_cond_kwargs=conditions).sample.float()
        if is_plain:
            run.learn(functional.mse_loss(predicted, target))
        else:
            run.learn(**training.guided_losses(predicted, target, GUIDANCE))
    run.average()


def main() -> None:
    """Train, and write the model down."""
    parser = training.diffusion_arguments(__doc__, batch=768, rate=8e-4, plain_part=PLAIN_PART)
    chosen = parser.parse_args()
    device = training.start(chosen.seed)
    pipeline: Any = make_pipeline()
    if chosen.weights:
        pipeline = StableDiffusionXLPipeline.from_pretrained(
            str(chosen.weights), torch_dtype=torch.float32, local_files_only=True, add_watermarker=False
        )
    training.place([pipeline.vae, pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2], device)
    if chosen.vae_steps:
        vae_run = training.Run(
            "sdxl_vae", [pipeline.vae], work=chosen.work, steps=chosen.vae_steps, seconds=chosen.vae_seconds, rate=1e-3
        )
        train_vae(pipeline, vae_run, device, chosen.seed, min(96, chosen.batch))
    pipeline.vae.requires_grad_(False)
    with torch.no_grad():
        unseen = scenes.render(scenes.draw_scenes(64, 7, video=False, held_out=True), *SIZES[0], device)
        seen_again = pipeline.vae.decode(pipeline.vae.encode(unseen).latent_dist.mean).sample
        logger.info("VAE on held-out scenes: %.2f dB", training.psnr(seen_again, unseen))
    if chosen.steps:
        run = training.Run(
            "sdxl_unet",
            [pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2],
            work=chosen.work,
            steps=chosen.steps,
            seconds=chosen.seconds,
            rate=chosen.rate,
            warm_up=100,
        )
        train_unet(pipeline, run, device, chosen.seed, chosen.batch, chosen.scenes or 120000, chosen.plain_part)
    training.export(pipeline, chosen.directory, VARIANT)
    logger.info("written to %s", chosen.directory)


if __name__ == "__main__":
    main()
