"""Model directories in the diffusers layout: the production architectures with random weights, or small ones.

How fast a model runs does not depend on what it says. Weights are drawn on the GPU and written once;
a directory that is there is used again. Several processes may share them: one writes and the others wait.
"""

from __future__ import annotations

import fcntl
import importlib.util
import json
import shutil
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from types import ModuleType
from typing import Any

from attrs import frozen

EXAMPLES = Path(__file__).parents[2] / "examples"
#: What CLIP's, UMT5's and Qwen's published tokenizers have.
CLIP_TOKENS, QWEN_TOKENS = 49408, 151936
#: Spread of decoded pixels, from -1 to 1: grey pictures are encoded in no time, wild ones more slowly than real ones.
#: With these a picture has 2.2 MB and a video, of noise that no encoder can foresee, 1.5 MB.
PICTURE_CONTRAST, VIDEO_CONTRAST = 0.15, 0.03
DONE = ".done"


@frozen(kw_only=True)
class Models:
    """Where the models are, or will be."""

    directory: Path
    is_small: bool

    def wan(self) -> Path:
        """WAN 2.1 1.3B with UMT5-XXL."""
        return self._made("wan", _small_wan if self.is_small else _wan)

    def sdxl(self) -> Path:
        """SDXL base."""
        return self._made("sdxl", _small_sdxl if self.is_small else _sdxl)

    def qwen(self) -> Path:
        """Qwen2.5-7B-Instruct."""
        return self._made("qwen", _small_qwen if self.is_small else _qwen)

    def _made(self, name: str, make: Callable[[Path], None]) -> Path:
        directory = self.directory / f"{name}{'-small' if self.is_small else ''}"
        self.directory.mkdir(parents=True, exist_ok=True)
        with directory.with_suffix(".lock").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (directory / DONE).exists():
                shutil.rmtree(directory, ignore_errors=True)
                directory.mkdir()
                make(directory)
                (directory / DONE).touch()
        return directory


def example(name: str) -> ModuleType:
    """A script of ``examples/models`` as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / "models" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def payload(name: str, **changes: Any) -> dict[str, Any]:
    """A message as the producer sends it; ``config`` is changed key by key."""
    message: dict[str, Any] = json.loads((EXAMPLES / "payloads" / f"{name}.json").read_text("utf-8"))
    config = {**message["config"], **changes.pop("config", {})}
    return {**message, **changes, "config": config}


def _small_wan(directory: Path) -> None:
    tiny = example("tiny_wan")
    tiny.save(tiny.make_pipeline("t2v"), directory)


def _small_sdxl(directory: Path) -> None:
    tiny = example("tiny_sdxl")
    tiny.save_directory(tiny.build_pipeline(), directory)


def _small_qwen(directory: Path) -> None:
    # A random one says as many words as it may.
    example("tiny_qwen").save(directory, is_random=True)


def _on_gpu(make: Callable[[], Any], dtype: str = "bfloat16", device: str = "cuda") -> Any:
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with torch.device(device), torch.no_grad():
            return make().eval()
    finally:
        torch.set_default_dtype(before)


def _wan(directory: Path) -> None:
    import torch
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    transformer = _on_gpu(lambda: WanTransformer3DModel(**_shipped("transformer")))
    text_encoder = _on_gpu(lambda: UMT5EncoderModel(UMT5Config(**_shipped("text_encoder"))))
    vae = _on_gpu(lambda: AutoencoderKLWan(**_shipped("vae")), "float32")
    with torch.no_grad():
        seen = vae.decode(torch.randn(1, 16, 4, 30, 52, device="cuda"), return_dict=False)[0]
        # The first frame, which has no others before it, is the calmest of all by far.
        vae.decoder.conv_out.weight.mul_(VIDEO_CONTRAST / seen[:, :, 1:].std())
        vae.decoder.conv_out.bias.zero_()
    scheduler: Any = UniPCMultistepScheduler
    pipeline = WanPipeline(
        tokenizer=example("tiny_wan").make_tokenizer(),
        text_encoder=text_encoder,
        transformer=transformer,
        vae=vae,
        scheduler=scheduler(**_shipped("scheduler")),
    )
    pipeline.save_pretrained(directory)


def _shipped(name: str) -> dict[str, Any]:
    text = files("ourvidz_wan").joinpath("configs", f"{name}.json").read_text("utf-8")
    return {key: value for key, value in json.loads(text).items() if not key.startswith("_")}


def sdxl_unet(device: str = "cuda") -> Any:
    """SDXL's in bfloat16, with random weights; on the device ``meta`` without any."""
    from diffusers import UNet2DConditionModel

    return _on_gpu(
        lambda: UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            layers_per_block=2,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=[1, 2, 10],
            attention_head_dim=[5, 10, 20],
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        ),
        device=device,
    )


def sdxl_vae() -> Any:
    """SDXL's autoencoder, likewise."""
    from diffusers import AutoencoderKL

    return _on_gpu(
        lambda: AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=4,
            sample_size=1024,
            scaling_factor=0.13025,
            force_upcast=True,
        )
    )


def _sdxl(directory: Path) -> None:
    import torch
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    torch.manual_seed(0)
    vocab, merges = example("tiny_sdxl").vocabulary()
    text: dict[str, Any] = {
        "vocab_size": CLIP_TOKENS,
        "max_position_embeddings": 77,
        "bos_token_id": vocab["<|startoftext|>"],
        "eos_token_id": vocab["<|endoftext|>"],
    }
    first = CLIPTextConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        projection_dim=768,
        hidden_act="quick_gelu",
        **text,
    )
    second = CLIPTextConfig(
        hidden_size=1280,
        intermediate_size=5120,
        num_hidden_layers=32,
        num_attention_heads=20,
        projection_dim=1280,
        hidden_act="gelu",
        **text,
    )
    unet, vae = sdxl_unet(), sdxl_vae()
    with torch.no_grad():
        noise = torch.randn(1, 4, 64, 64, device="cuda", dtype=torch.bfloat16)
        vae.decoder.conv_out.weight.mul_(PICTURE_CONTRAST / vae.decode(noise / 0.13025).sample.std())
        vae.decoder.conv_out.bias.zero_()
    scheduler: Any = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="leading",
        steps_offset=1,
        # With random weights this keeps the latents in range; it costs what predicting noise costs.
        prediction_type="v_prediction",
    )
    tokenizers = [
        CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77, pad_token=pad) for pad in ("<|endoftext|>", "!")
    ]
    pipeline = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=_on_gpu(lambda: CLIPTextModel(first)),
        text_encoder_2=_on_gpu(lambda: CLIPTextModelWithProjection(second)),
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=unet,
        scheduler=scheduler,
        add_watermarker=False,
    )
    pipeline.save_pretrained(str(directory))


def _qwen(directory: Path) -> None:
    import torch
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

    tokenizer = _qwen_tokenizer()
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = _on_gpu(lambda: Qwen2ForCausalLM(config))
    model.generation_config = GenerationConfig(
        eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id], pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _qwen_tokenizer() -> Any:
    """As many tokens as the real one has; those that are no words of ours have names that no text contains."""
    from ourvidz_wan_enhanced.instructions import read_instructions
    from transformers import Qwen2Tokenizer

    vocabularies = example("vocabularies")
    # What it reads becomes about as many tokens as with the real one.
    words = read_instructions().video.system.replace("\n", " ").split()
    small = vocabularies.qwen_tokenizer(dict.fromkeys(words))
    inner = json.loads(small.backend_tokenizer.to_str())["model"]
    vocab = dict(inner["vocab"])
    vocab |= {f"filler{number:06}": number for number in range(len(vocab), QWEN_TOKENS - 16)}
    tokenizer = Qwen2Tokenizer(
        vocab=vocab,
        merges=[tuple(merge) for merge in inner["merges"]],
        eos_token=vocabularies.CHAT_END,
        pad_token=vocabularies.QWEN_END,
        model_max_length=4096,
    )
    tokenizer.add_special_tokens({"additional_special_tokens": [vocabularies.CHAT_START, vocabularies.CHAT_END]})
    tokenizer.chat_template = vocabularies.CHAT_TEMPLATE
    return tokenizer
