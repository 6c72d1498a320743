"""Train a small WAN on scenes that we draw: the video autoencoder, then text encoder and transformer together.

Minutes on one GPU; every part has the production model's architecture, only narrow::

    python examples/models/train_wan.py demo-models/wan
    python examples/models/train_wan.py /tmp/wan --scenes=8 --vae-steps=1 --steps=2 --batch=2   # does it run

The transformer learns by flow matching, on 81 frames (21 latent frames) and on single pictures.
As in ``train_sdxl.py``, the last part of the training makes guidance at ``GUIDANCE`` exact.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import random
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, WanResidualBlock
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch.nn import functional
from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.models import scenes, tiny_wan, training, vocabularies

logger = logging.getLogger("train_wan")

GUIDANCE = 6.0
PLAIN_PART = 0.75
FRAMES = 81
VAE_CHANNELS = 8
#: What 480*832 and 832*480 become at the variant's scale.
SIZES = ((64, 112), (112, 64))
_SHARE_OF_SIZES = (0.75, 0.25)
_CAPTIONS = 6
_FILLERS = 4096
#: Longer captions are cut; the pipeline fills up with zeros to ``_TEXT_LENGTH`` all the same.
_MOST_TOKENS = 72
_TEXT_LENGTH = 512
#: What is hardest to learn is shown more often: which of two colours comes first, and that behind a camera's pan
#: there is something to see it by.
_WEIGHTS = {"turns": 2.2, "pan left": 1.8, "pan right": 1.8, "down": 1.3}
#: Training's noise levels lie as sampling's do.
_SHIFT = 5.0
#: For each latent value.
_KL_WEIGHT = 1e-3
#: Of the autoencoder's training; clips follow.
_PICTURES_PART = 0.4

VARIANT = """\
# A small model that draws coloured shapes that move; see README.md. 480*832 is 64x112 here.
name = "demo"
size_scale = 0.14
# It follows its text better beyond the guidance that it was trained to be exact at: 6.5 is 10.9 here, 7.5 is 12.7.
guidance_factor = 1.8
# It has never seen people, so their deformities mean nothing to it.
negative_prompt = ""
"""


def make_pipeline(vae_channels: int = VAE_CHANNELS) -> Any:
    """The untrained model. ``vae_channels`` are the autoencoder's at full size."""
    tokenizer = vocabularies.t5_tokenizer(scenes.vocabulary())
    text_encoder = UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(tokenizer),
            d_model=128,
            d_kv=32,
            d_ff=256,
            num_layers=3,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            tie_word_embeddings=True,
        )
    )
    transformer = WanTransformer3DModel(
        num_attention_heads=4, attention_head_dim=64, text_dim=128, freq_dim=128, ffn_dim=1024, num_layers=6
    )
    # At full size a processor takes longest: few channels there, more where the picture is small.
    vae = AutoencoderKLWan(base_dim=vae_channels, dim_mult=[1, 2, 4, 64 // vae_channels], z_dim=16)
    initialise(vae)
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        transformer=transformer,
        vae=vae,
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=5.0
        ),
    )


def train_vae(
    pipeline: Any, run: training.Run, device: torch.device, *, seed: int, batch: int, pictures_part: float
) -> None:
    """Teach the autoencoder single pictures first, then clips, from its weights at that point on.

    Its decoder alone where the encoder takes no gradients: latents then stay what a transformer knows.
    """
    vae = pipeline.vae
    on_gpu = device.type == "cuda"
    learns_whole = vae.quant_conv.weight.requires_grad
    pools = [
        render_pool(scenes.draw_scenes(int(share * (8000 if on_gpu else 16)), seed + i, video=True), *size, device)
        for i, (size, share) in enumerate(zip(SIZES, _SHARE_OF_SIZES, strict=True))
    ]
    logger.info("%s videos rendered", [len(pool) for pool in pools])
    chance = random.Random(seed)
    with joined_taps(vae):
        for _ in run:
            pool = chance.choices(pools, _SHARE_OF_SIZES)[0]
            frames = 1 if run.done < pictures_part else chance.choices((1, 9, 17, 33), (0.1, 0.4, 0.4, 0.1))[0]
            clip = some_clips(pool, max(1, (4 * batch if frames == 1 else batch * 9) // frames), frames, chance)
            with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
                posterior = encode_whole(vae, clip)
                decoded = decode_whole(vae, posterior.sample())
            error = decoded.float() - clip
            # Frames that are each a little wrong in another way flicker: what changes from one to the next counts, too.
            flicker = error.diff(dim=2).abs().mean() if frames > 1 else error.new_zeros(())
            square, kl = error.square().mean(), divergence(posterior)
            run.learn(
                4 * square + error.abs().mean() + flicker + _KL_WEIGHT * kl, square=square, flicker=flicker, kl=kl
            )
    run.average()
    if learns_whole:
        fit_latents(vae, scenes.draw_scenes(256 if on_gpu else 8, seed, video=True), device)


def divergence(posterior: Any) -> torch.Tensor:
    """How far the encoder is from saying nothing, in nats for each latent value (the library leaves out the width)."""
    return 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).float().mean()


def render_pool(drawn: list[scenes.Scene], width: int, height: int, device: torch.device) -> torch.Tensor:
    """Whole videos as bytes ``[scene, 3, frame, height, width]``."""
    rendered = []
    for i in range(0, len(drawn), 64):
        clip = scenes.render_frames(drawn[i : i + 64], width, height, FRAMES, device)
        rendered.append(((clip + 1) * 127.5).round().to(torch.uint8))
    return torch.cat(rendered)


def some_clips(pool: torch.Tensor, rows: int, frames: int, chance: random.Random) -> torch.Tensor:
    """``rows`` parts of videos of ``pool``, at their true speed or twice as fast, from -1 to 1."""
    pace = chance.choice((1, 1, 2)) if 1 < frames < 33 else 1
    first = torch.randint(FRAMES - (frames - 1) * pace, (rows, 1), device=pool.device)
    at = first + pace * torch.arange(frames, device=pool.device)
    chosen = torch.randint(len(pool), (rows, 1), device=pool.device).expand_as(at)
    return pool[chosen, :, at].transpose(1, 2).float() / 127.5 - 1


def initialise(vae: Any) -> None:
    """Begin as an autoencoder of single pictures that keeps the size of what passes through it.

    The library's own beginning shrinks the signal threefold with each convolution over time, since two of three taps
    see nothing but the padding before the first frame; a network of this depth and width then learns no more than
    brightness. Here only the tap at the present frame is not zero. Joining two frames begins as their mean,
    doubling a frame as two copies, and each block close to doing nothing.
    """
    with torch.no_grad():
        for module in vae.modules():
            if not isinstance(module, torch.nn.Conv2d | torch.nn.Conv3d):
                continue
            weight, kernel = module.weight, module.kernel_size
            torch.nn.init.zeros_(module.bias)
            if kernel == (3, 1, 1):
                same = torch.eye(weight.shape[1]).repeat(weight.shape[0] // weight.shape[1], 1)
                joins = weight.shape[0] == weight.shape[1]
                torch.nn.init.normal_(weight, 0, 0.02)
                weight[..., 0, 0] += torch.stack(
                    [0 * same, 0.5 * same, 0.5 * same] if joins else [0 * same, 0 * same, same], -1
                )
                continue
            present = weight[:, :, -1] if weight.dim() == 5 else weight
            torch.nn.init.zeros_(weight)
            torch.nn.init.normal_(present, 0, present[0].numel() ** -0.5)
        for module in vae.modules():
            if isinstance(module, WanResidualBlock):
                module.conv2.weight.mul_(0.1)
        # Sure of itself: under the noise of its first guess all latents look alike, and the decoder does without them.
        channels = vae.config.z_dim
        vae.quant_conv.weight[channels:].mul_(0.1)
        vae.quant_conv.bias[channels:].fill_(-6)


@contextlib.contextmanager
def joined_taps(vae: Any) -> Iterator[None]:
    """Let convolutions over time and space work as flat ones, their three frames joined as channels.

    The same result; a GPU has far better kernels for it.
    """
    convolutions = [m for m in vae.modules() if isinstance(m, WanCausalConv3d) and m.kernel_size == (3, 3, 3)]
    for convolution in convolutions:
        convolution.forward = functools.partial(_convolve_flat, convolution)
    try:
        yield
    finally:
        for convolution in convolutions:
            del convolution.forward


def _convolve_flat(convolution: Any, states: torch.Tensor) -> torch.Tensor:
    batch, channels, count, height, width = states.shape
    frames = states.transpose(1, 2)
    weight = convolution.weight
    if count == 1:
        flat, kernel = frames[:, 0], weight[:, :, -1]
    else:
        before = torch.cat([torch.zeros_like(frames[:, :1]).expand(-1, 2, -1, -1, -1), frames], 1)
        taps = [before[:, i : i + count] for i in range(3)]
        flat = torch.cat(taps, 2).reshape(batch * count, 3 * channels, height, width)
        kernel = weight.transpose(1, 2).flatten(1, 2)
    flat = functional.conv2d(flat.contiguous(memory_format=torch.channels_last), kernel, convolution.bias, padding=1)
    return flat.view(batch, count, -1, height, width).transpose(1, 2)


def encode_whole(vae: Any, clip: torch.Tensor) -> Any:
    """What ``vae.encode`` makes of ``clip``, all frames in one pass instead of four at a time."""
    states = vae.encoder.conv_in(clip)
    for layer in vae.encoder.down_blocks:
        states = _resampled(layer, states)
    states = vae.encoder.conv_out(vae.encoder.nonlinearity(vae.encoder.norm_out(vae.encoder.mid_block(states))))
    return DiagonalGaussianDistribution(vae.quant_conv(states))


def decode_whole(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """What ``vae.decode`` makes of ``latents``, in one pass, and without its last clamp, which stops gradients."""
    decoder = vae.decoder
    states = decoder.mid_block(decoder.conv_in(vae.post_quant_conv(latents)))
    for block in decoder.up_blocks:
        for layer in (*block.resnets, *(block.upsamplers or ())):
            states = _resampled(layer, states)
    result: torch.Tensor = decoder.conv_out(decoder.nonlinearity(decoder.norm_out(states)))
    return result


def _resampled(layer: Any, states: torch.Tensor) -> torch.Tensor:
    """``layer`` on a whole clip. Its first frame is never joined with others, and never doubled."""
    mode = getattr(layer, "mode", "")
    if mode == "upsample3d" and states.shape[2] > 1:
        later = states[:, :, 1:]
        batch, channels, count, height, width = later.shape
        doubled = layer.time_conv(later).view(batch, 2, channels, count, height, width)
        later = doubled.permute(0, 2, 3, 1, 4, 5).reshape(batch, channels, 2 * count, height, width)
        states = torch.cat([states[:, :, :1], later], 2)
    states = layer(states)
    if mode == "downsample3d" and states.shape[2] > 1:
        states = torch.cat([states[:, :, :1], layer.time_conv(states)], 2)
    return states


@torch.no_grad()  # type: ignore[untyped-decorator]
def fit_latents(vae: Any, drawn: list[scenes.Scene], device: torch.device) -> None:
    """Move mean and spread of the latents to those that WAN publishes; what they decode to stays the same.

    The native layout says neither, and whoever loads it takes the published ones.
    """
    encoded = []
    for i in range(0, len(drawn), 16):
        clip = scenes.render_frames(drawn[i : i + 16], *SIZES[0], 33 if device.type == "cuda" else 5, device)
        encoded.append(encode_whole(vae, clip).mean)
    latents = torch.cat(encoded)
    move_latents(vae, latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4)))


def move_latents(vae: Any, mean: torch.Tensor, spread: torch.Tensor) -> None:
    """Let the latents have the configured mean and spread in place of ``mean`` and ``spread``, by channel."""
    wanted_mean, wanted_spread = (
        torch.tensor(values, device=mean.device) for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    scale, channels = wanted_spread / spread, len(mean)
    into, out = vae.quant_conv, vae.post_quant_conv
    out.bias.add_(out.weight[..., 0, 0, 0] @ (mean - wanted_mean / scale))
    out.weight.div_(scale.view(1, -1, 1, 1, 1))
    into.weight[:channels].mul_(scale.view(-1, 1, 1, 1, 1))
    into.bias[:channels].sub_(mean).mul_(scale).add_(wanted_mean)
    into.bias[channels:].add_(2 * scale.log())


def normalised(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Latents as the transformer sees them."""
    mean, spread = (
        torch.tensor(values, device=latents.device).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return (latents - mean) / spread


@torch.no_grad()  # type: ignore[untyped-decorator]
def encode_scenes(
    vae: Any, drawn: list[scenes.Scene], width: int, height: int, frames: int, device: torch.device
) -> torch.Tensor:
    """Normalised latents of all scenes."""
    encoded, size = [], 64 if frames > 1 else 1024
    for i in range(0, len(drawn), size):
        clip = scenes.render_frames(drawn[i : i + size], width, height, frames, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"), joined_taps(vae):
            latents = encode_whole(vae, clip).mean
        encoded.append(normalised(vae, latents.float()).half())
    return torch.cat(encoded)


def encode_text(text_encoder: Any, ids: torch.Tensor) -> torch.Tensor:
    """What WAN's pipeline makes of a prompt: the states of its tokens, then zeros, the last for all that follow."""
    ids = ids.long()
    mask = ids != 0
    # Given whole, so that the library does not look whether there is anything to mask, which would stop the device.
    hidden = torch.zeros(mask.shape, device=ids.device).masked_fill(~mask, torch.finfo(torch.float32).min)
    states = text_encoder(ids, attention_mask=hidden[:, None, None]).last_hidden_state * mask[..., None]
    return functional.pad(states, (0, 0, 0, 1))


class BriefText(WanAttnProcessor):  # type: ignore[misc]
    """Attention to a text as :func:`encode_text` makes it: its last zeros weigh as much as all that they stand for."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._weights = torch.zeros(1, 1, 1, _MOST_TOKENS + 1, device=device)
        self._weights[..., -1] = math.log(_TEXT_LENGTH - _MOST_TOKENS)

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: Any = None,
    ) -> torch.Tensor:
        if encoder_hidden_states is not None:
            attention_mask = self._weights.to(hidden_states.dtype)
        attended: torch.Tensor = super().__call__(
            attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb
        )
        return attended


def train_transformer(
    pipeline: Any,
    run: training.Run,
    device: torch.device,
    *,
    seed: int,
    batch: int,
    count: int,
    plain_part: float,
    pictures_part: float,
) -> None:
    """Teach the transformer and the text encoder what captions mean."""
    common = random.Random(seed)
    seed += 10 * training.rank()
    chance = random.Random(seed + 1)
    drawn = scenes.draw_scenes(count, seed + 1, video=True, weights=_WEIGHTS)
    pictures = scenes.draw_scenes(count, seed + 2, video=False)
    # Videos of both shapes, then pictures of both: (latents, captions), and how often each is drawn.
    pools: list[tuple[torch.Tensor, torch.Tensor]] = []
    shares: list[float] = []
    for frames, share_of_kind in ((FRAMES, 0.9), (1, 0.1)):
        for (width, height), share in zip(SIZES, _SHARE_OF_SIZES, strict=True):
            # A request for one picture may speak of motion as well.
            source = drawn if frames > 1 else [*pictures, *drawn]
            part = chance.sample(source, max(batch, int(count * share))) if count > batch else source
            latents = encode_scenes(pipeline.vae, part, width, height, frames, device)
            texts = [scenes.caption(scene, chance) for scene in part for _ in range(_CAPTIONS)]
            pools.append(
                (
                    latents,
                    training.token_rows(pipeline.tokenizer, texts, _MOST_TOKENS)
                    .view(len(part), _CAPTIONS, -1)
                    .to(device),
                )
            )
            shares.append(share_of_kind * share)
            logger.info(
                "%d scenes encoded, mean %.3f, std %.3f", len(part), latents.float().mean(), latents.float().std()
            )
    fillers = training.token_rows(
        pipeline.tokenizer, [scenes.filler(chance) for _ in range(_FILLERS)], _MOST_TOKENS
    ).to(device)

    def losses(pool: tuple[torch.Tensor, torch.Tensor], is_plain: bool) -> Mapping[str, torch.Tensor]:
        latents, ids = pool
        count = batch if latents.shape[2] > 1 else batch * 8
        count = count if is_plain else count // 2
        rows = torch.randint(len(latents), (count,), device=device)
        clean = latents[rows].float()
        told = ids[rows, torch.randint(_CAPTIONS, (count,), device=device)]
        text = untold = fillers[torch.randint(_FILLERS, (count,), device=device)]
        even = torch.rand(count, device=device)
        sigma = _SHIFT * even / (1 + (_SHIFT - 1) * even)
        noise = torch.randn_like(clean)
        noisy = torch.lerp(clean, noise, sigma.view(-1, 1, 1, 1, 1))
        if is_plain:
            text = torch.where(torch.rand(count, 1, device=device) < 0.12, untold, told)
        else:
            text, noisy, sigma = torch.cat([told, untold]), noisy.repeat(2, 1, 1, 1, 1), sigma.repeat(2)
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            states = encode_text(pipeline.text_encoder, text)
            predicted = pipeline.transformer(noisy, sigma * 1000, states, return_dict=False)[0].float()
        if is_plain:
            return {"loss": functional.mse_loss(predicted, noise - clean)}
        return training.guided_losses(predicted, noise - clean, GUIDANCE)

    pipeline.transformer.set_attn_processor(BriefText(device))
    only_pictures = [0.0 if latents.shape[2] > 1 else share for (latents, _), share in zip(pools, shares, strict=True)]
    for _ in run:
        is_plain, is_early = run.done < plain_part, run.done < pictures_part
        chosen = common.choices(range(len(pools)), only_pictures if is_early else shares)[0]
        run.learn_by(f"{chosen} {is_plain}", functools.partial(losses, pools[chosen], is_plain))
    run.average()
    pipeline.transformer.set_attn_processor(WanAttnProcessor())


def load(directory: Path) -> Any:
    """An exported model, in single precision."""
    single: dict[str, Any] = {"local_files_only": True}
    return WanPipeline(
        tokenizer=AutoTokenizer.from_pretrained(directory / "tokenizer", **single),
        text_encoder=UMT5EncoderModel.from_pretrained(directory / "text_encoder", dtype=torch.float32, **single),
        transformer=WanTransformer3DModel.from_pretrained(
            directory / "transformer", torch_dtype=torch.float32, **single
        ),
        vae=AutoencoderKLWan.from_pretrained(directory / "vae", torch_dtype=torch.float32, **single),
        scheduler=UniPCMultistepScheduler.from_pretrained(directory / "scheduler", **single),
    )


def main() -> None:
    """Train, and write the model down."""
    parser = training.diffusion_arguments(__doc__, batch=96, rate=1e-3, plain_part=PLAIN_PART)
    parser.add_argument("--native", type=Path, help="where to write the model in the layout that WAN was published in")
    parser.add_argument("--vae-channels", type=int, default=VAE_CHANNELS)
    # A step takes eight times as many pictures as videos.
    parser.add_argument("--pictures-part", type=float, default=0.25, help="part of the training on pictures alone")
    parser.add_argument("--vae", type=Path, help="begin with the autoencoder of an exported model")
    parser.add_argument(
        "--decoder-only",
        action="store_true",
        help="of the autoencoder train the decoder alone, for latents as they are",
    )
    chosen = parser.parse_args()
    device = training.start(chosen.seed)
    pipeline = load(chosen.weights) if chosen.weights else make_pipeline(chosen.vae_channels)
    if chosen.vae:
        pipeline.vae = AutoencoderKLWan.from_pretrained(chosen.vae / "vae", torch_dtype=torch.float32)
    training.place([pipeline.vae, pipeline.transformer, pipeline.text_encoder], device)
    if chosen.vae_steps:
        if chosen.decoder_only:
            pipeline.vae.encoder.requires_grad_(False)
            pipeline.vae.quant_conv.requires_grad_(False)
        vae_run = training.Run(
            "wan_vae",
            [pipeline.vae],
            work=chosen.work,
            steps=chosen.vae_steps,
            seconds=chosen.vae_seconds,
            rate=1e-3,
            warm_up=100,
        )
        train_vae(
            pipeline,
            vae_run,
            device,
            seed=chosen.seed,
            batch=min(48, chosen.batch),
            pictures_part=0.0 if chosen.decoder_only else _PICTURES_PART,
        )
    pipeline.vae.requires_grad_(False)
    with torch.no_grad():
        unseen = scenes.draw_scenes(8 if device.type == "cuda" else 1, 7, video=True, held_out=True)
        clip = scenes.render_frames(unseen, *SIZES[0], FRAMES, device)
        seen_again = pipeline.vae.decode(pipeline.vae.encode(clip).latent_dist.mean).sample
        by_frame = [round(training.psnr(seen_again[:, :, i], clip[:, :, i]), 1) for i in (0, 1, 8, 16, 32, 48, 64, 80)]
        logger.info("VAE on held-out scenes: %.2f dB; frames %s", training.psnr(seen_again, clip), by_frame)
    if chosen.steps:
        if device.type == "cuda":
            pipeline.transformer.compile_repeated_blocks()
        run = training.Run(
            "wan_transformer",
            [pipeline.transformer, pipeline.text_encoder],
            work=chosen.work,
            steps=chosen.steps,
            seconds=chosen.seconds,
            rate=chosen.rate,
            matrices=[
                weight
                for blocks in (pipeline.transformer.blocks, pipeline.text_encoder.encoder.block)
                for name, weight in blocks.named_parameters()
                if weight.dim() == 2 and "bias" not in name
            ],
        )
        train_transformer(
            pipeline,
            run,
            device,
            seed=chosen.seed,
            batch=chosen.batch,
            count=chosen.scenes or 20000,
            plain_part=chosen.plain_part,
            pictures_part=chosen.pictures_part,
        )
    training.export(pipeline, chosen.directory, VARIANT)
    if chosen.native and training.rank() == 0:
        tiny_wan.save_native(pipeline, chosen.native, VARIANT)
    logger.info("written to %s", chosen.directory)


if __name__ == "__main__":
    main()
