"""Measure the small models on prompts that no training has seen, and print what comes out.

Each picture is judged by ``measure.py``, which looks at pixels and has learnt nothing::

    python examples/models/evaluate.py                      # all models as shipped, 64 seeds each
    python examples/models/evaluate.py --count 8 --only wan # a part, in less time
    python examples/models/evaluate.py --only wan --motions left,right,up,down
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ourvidz_wan.config import WanVariant

from examples.models import measure, scenes, train_qwen, train_sdxl, train_wan, training
from ourvidz_core.engine.variants import read_variant

SHIPPED = Path(__file__).parent / "demo_models" / "ourvidz_demo_models"
_SEED = 7
Report = dict[str, Any]


def evaluate_sdxl(directory: Path, count: int, device: str, sheets: Path | None = None) -> Report:
    """PSNR of the autoencoder; colour and shape of what is drawn; what a negative prompt does."""
    from diffusers import StableDiffusionXLPipeline, UniPCMultistepScheduler

    pipeline: Any = StableDiffusionXLPipeline.from_pretrained(
        str(directory), torch_dtype=torch.float32, local_files_only=True, add_watermarker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(device)
    unseen = scenes.draw_scenes(count, _SEED, video=False, held_out=True)
    pictures = scenes.render(unseen, *train_sdxl.SIZES[0], device)
    with torch.no_grad():
        again = torch.cat([pipeline.vae.decode(pipeline.vae.encode(p[None]).latent_dist.mean).sample for p in pictures])
    report: Report = {"vae_psnr_db": round(training.psnr(again, pictures), 2)}

    def draw(prompts: list[str], negatives: list[str], steps: int, guidance: float) -> list[measure.Seen]:
        drawn = []
        for i in range(0, len(prompts), 32):
            rows = range(i, min(i + 32, len(prompts)))
            made = pipeline(
                prompt=prompts[i : i + 32],
                negative_prompt=negatives[i : i + 32],
                generator=[torch.Generator("cpu").manual_seed(row) for row in rows],
                num_inference_steps=steps,
                guidance_scale=guidance,
                width=128,
                height=128,
                output_type="pt",
            ).images
            drawn.append(made.cpu() * 2 - 1)
        pixels = training.bytes_of(torch.cat(drawn))
        if sheets:
            _sheet(pixels, sheets / f"sdxl_{len(list(sheets.glob('sdxl_*')))}.png")
        return [measure.see_picture(one) for one in pixels]

    own = pipeline.scheduler
    unipc = UniPCMultistepScheduler.from_config(own.config)
    prompts = [
        scenes.describe(scene) if row % 2 else f"a {scene.colour} {scene.shape}" for row, scene in enumerate(unseen)
    ]
    negative = "bad anatomy, extra limbs, deformed, worst quality, low quality, text, watermark, logo, signature"
    for name, scheduler, steps, guidance, against in (
        ("euler 25 steps 7.5", own, 25, 7.5, negative),
        ("unipc 25 steps 7.5", unipc, 25, 7.5, negative),
        ("unipc 15 steps 6.0", unipc, 15, 6.0, ""),
    ):
        pipeline.scheduler = scheduler
        seen = draw(prompts, [against] * count, steps, guidance)
        report[name] = _shares(
            seen,
            unseen,
            {
                "colour": lambda s, w: s.colour == w.colour,
                "shape": lambda s, w: s.shape == w.shape,
                "both": lambda s, w: (s.colour, s.shape) == (w.colour, w.shape),
            },
        )
        whole = [(s, w) for row, (s, w) in enumerate(zip(seen, unseen, strict=True)) if row % 2]
        report[name]["background"] = _share([s.background == w.background for s, w in whole])
    asked = [f"a {scenes.SHAPES[row % 8]}" for row in range(count)]
    unwanted = [tuple(scenes.COLOURS)[row // 8 % 8] for row in range(count)]
    for name, negatives in (("without", [""] * count), ("with", unwanted)):
        seen = draw(asked, negatives, 25, 7.5)
        hits = [s.colour == colour for s, colour in zip(seen, unwanted, strict=True)]
        report[f"unwanted colour {name} negative prompt"] = _share(hits)
    return report


def evaluate_wan(
    directory: Path,
    count: int,
    device: str,
    sheets: Path | None = None,
    motions: Collection[str] = tuple(scenes.MOTIONS),
) -> Report:
    """PSNR of the autoencoder on whole videos; colour and motion of what prompts with ``motions`` make."""
    pipeline = train_wan.load(directory)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(device)
    variant = read_variant(directory, WanVariant)
    width, height = train_wan.SIZES[0]
    others = {motion: 0.0 for motion in scenes.MOTIONS if motion not in motions}
    unseen = scenes.draw_scenes(count, _SEED, video=True, held_out=True, weights=others)
    with torch.no_grad():
        quality = []
        for scene in unseen[: max(4, count // 4)]:
            clip = scenes.render_frames([scene], width, height, train_wan.FRAMES, device)
            again = pipeline.vae.decode(pipeline.vae.encode(clip).latent_dist.mean).sample
            quality.append(training.psnr(again, clip))
    report: Report = {"vae_psnr_db": round(sum(quality) / len(quality), 2)}
    prompts = [scenes.describe(scene) if row % 2 else _short(scene) for row, scene in enumerate(unseen)]
    for steps, guidance in ((25, 6.5), (50, 7.5)) if device != "cpu" else ((25, 6.5),):
        seen = []
        for i in range(0, count, 16):
            rows = range(i, min(i + 16, count))
            made = pipeline(
                prompt=prompts[i : i + 16],
                negative_prompt=[""] * len(rows),
                generator=[torch.Generator("cpu").manual_seed(row) for row in rows],
                num_inference_steps=steps,
                guidance_scale=variant.guided(guidance),
                width=width,
                height=height,
                num_frames=train_wan.FRAMES,
                output_type="pt",
            ).frames
            videos = training.bytes_of((made.cpu() * 2 - 1).transpose(1, 2))
            seen += [measure.see_video(video) for video in videos]
            if sheets:
                strips = videos[:, ::16].reshape(-1, *videos.shape[2:])
                _sheet(strips, sheets / f"wan_{steps}_{i:02}.png", across=12)
        name = f"unipc {steps} steps {guidance}"
        report[name] = _shares(
            seen,
            unseen,
            {
                "colour": lambda s, w: s.colour == w.colour,
                "motion": lambda s, w: s.motion == w.motion,
                "both": lambda s, w: (s.colour, s.motion) == (w.colour, w.motion),
                "shape": lambda s, w: s.shape == w.shape,
            },
        )
        pairs = list(zip(seen, unseen, strict=True))
        ways = [(s, w) for s, w in pairs if w.motion in ("left", "right", "up", "down")]
        report[name]["both, of the four directions"] = _share(
            [(s.colour, s.motion) == (w.colour, w.motion) for s, w in ways]
        )
        report[name]["by motion"] = {
            motion: _share([s.motion == motion for s, w in pairs if w.motion == motion]) for motion in scenes.MOTIONS
        }
    made = pipeline(
        prompt=[f"a {scene.colour} {scene.shape}" for scene in unseen[:16]],
        generator=[torch.Generator("cpu").manual_seed(row) for row in range(len(unseen[:16]))],
        num_inference_steps=25,
        guidance_scale=variant.guided(6.5),
        width=width,
        height=height,
        num_frames=1,
        output_type="pt",
    ).frames
    stills = training.bytes_of(made[:, 0].cpu() * 2 - 1)
    seen = [measure.see_picture(still) for still in stills]
    report["single pictures"] = _shares(
        seen,
        unseen[:16],
        {
            "colour": lambda s, w: s.colour == w.colour,
            "shape": lambda s, w: s.shape == w.shape,
        },
    )
    if sheets:
        _sheet(stills, sheets / "wan_stills.png")
    return report


def evaluate_qwen(directory: Path, count: int, device: str) -> Report:
    """Whether answers are whole scenes and keep the words that they were asked with."""
    from transformers import AutoTokenizer, Qwen2ForCausalLM

    tokenizer: Any = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    model: Any = Qwen2ForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True).to(device)
    chance = random.Random(_SEED)
    whole, kept, ended, examples = [], [], [], []
    unseen = scenes.draw_scenes(count, _SEED, video=True, held_out=True)
    for row, scene in enumerate(unseen):
        prompt = (scene.shape, f"a {scene.colour} {scene.shape}", scenes.caption(scene, chance))[row % 3]
        messages = train_qwen.conversation(prompt, train_qwen.system_text(chance))
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        inputs = tokenizer(text, return_tensors="pt").to(device)
        made = model.generate(**inputs, max_new_tokens=64, do_sample=False)[0, inputs.input_ids.shape[1] :]
        answer = tokenizer.decode(made, skip_special_tokens=True).strip()
        ended.append(int(made[-1]) == tokenizer.eos_token_id)
        whole.append(scenes.read_caption(answer) is not None)
        kept.append(scenes.scene_words(prompt) <= scenes.scene_words(answer))
        examples.append(f"{prompt} -> {answer}")
    return {
        "in the grammar": _share(whole),
        "words kept": _share(kept),
        "both": _share([a and b for a, b in zip(whole, kept, strict=True)]),
        "ended by itself": _share(ended),
        "examples": examples[:6],
    }


def _short(scene: scenes.Scene) -> str:
    words = scenes.MOTIONS[scene.motion or "still"][0].format(scene.second_colour)
    return f"a {scene.colour} {scene.shape}{',' if 'camera' in words else ''} {words}"


def _share(hits: list[bool]) -> float | None:
    return round(sum(hits) / len(hits), 3) if hits else None


def _shares(
    seen: list[measure.Seen],
    wanted: list[scenes.Scene],
    checks: dict[str, Callable[[measure.Seen, scenes.Scene], bool]],
) -> Report:
    return {name: _share([check(s, w) for s, w in zip(seen, wanted, strict=True)]) for name, check in checks.items()}


def _sheet(pixels: Any, path: Path, across: int = 8) -> None:
    import numpy as np
    from PIL import Image

    rows = [np.concatenate(list(pixels[i : i + across]), 1) for i in range(0, len(pixels) // across * across, across)]
    if rows:
        Image.fromarray(np.concatenate(rows, 0)).save(path)


def main() -> None:
    """Print the metrics as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", type=Path, default=SHIPPED, help="directory with sdxl, wan and qwen")
    parser.add_argument("--count", type=int, default=64, help="held-out prompts, each with a seed of its own")
    parser.add_argument("--only", choices=("sdxl", "wan", "qwen"), action="append")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--motions", default=",".join(scenes.MOTIONS), help="what WAN is asked for (default: everything)"
    )
    parser.add_argument("--sheets", type=Path, help="where to put contact sheets of what was made")
    chosen = parser.parse_args()
    motions = chosen.motions.split(",")
    if unknown := sorted(set(motions) - set(scenes.MOTIONS)):
        parser.error(f"--motions has {unknown[0]!r}, which is none of {', '.join(scenes.MOTIONS)}")
    if chosen.sheets:
        chosen.sheets.mkdir(parents=True, exist_ok=True)
    report: Report = {}
    for name in chosen.only or ("sdxl", "wan", "qwen"):
        begun = time.monotonic()
        if not (chosen.models / name).is_dir():
            print(json.dumps({name: f"no model in {chosen.models}"}))
            continue
        directory = chosen.models / name
        if name == "qwen":
            report[name] = evaluate_qwen(directory, chosen.count, chosen.device)
        elif name == "sdxl":
            report[name] = evaluate_sdxl(directory, chosen.count, chosen.device, chosen.sheets)
        else:
            report[name] = evaluate_wan(directory, chosen.count, chosen.device, chosen.sheets, motions)
        report[name]["seconds"] = round(time.monotonic() - begun, 1)
        print(json.dumps({name: report[name]}, indent=1), flush=True)


if __name__ == "__main__":
    main()
