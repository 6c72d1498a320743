"""What the shipped models make of a prompt, judged by measuring pixels. All on a processor."""

from __future__ import annotations

import numpy as np
import ourvidz_demo_models
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from ourvidz_sdxl.config import ReferenceType
from ourvidz_sdxl.pipeline import ImageRequest, ReferencePicture, load_pipeline
from ourvidz_sdxl.references import Samplings
from ourvidz_sdxl.settings import SdxlSettings
from ourvidz_sdxl.variants import SdxlVariant
from ourvidz_wan.checkpoints import load_models
from ourvidz_wan.tasks import TASKS
from PIL import Image
from transformers import AutoTokenizer, Qwen2ForCausalLM

from docs import measure_reference_frames as reference_frames
from examples.models import measure, scenes, train_qwen, train_sdxl, train_wan, training
from ourvidz_core.engine.variants import read_variant

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def sdxl():
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        str(ourvidz_demo_models.path("sdxl")), torch_dtype=torch.float32, local_files_only=True, add_watermarker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def drawn(sdxl):
    def draw(prompts, negative_prompt="", guidance_scale=6.0):
        made = sdxl(
            prompt=prompts,
            negative_prompt=[negative_prompt] * len(prompts),
            generator=[torch.Generator().manual_seed(index) for index in range(len(prompts))],
            num_inference_steps=10,
            guidance_scale=guidance_scale,
            width=128,
            height=128,
            output_type="pt",
        ).images
        return [measure.see_picture(one) for one in training.bytes_of(made * 2 - 1)]

    return draw


def test_the_autoencoder_keeps_scenes_that_it_never_saw(sdxl):
    pictures = scenes.render(scenes.draw_scenes(8, 21, video=False, held_out=True), *train_sdxl.SIZES[0])
    with torch.no_grad():
        again = sdxl.vae.decode(sdxl.vae.encode(pictures).latent_dist.mean).sample
    assert training.psnr(again, pictures) > 38.0


def test_pictures_have_the_colour_of_the_prompt(drawn):
    colours = list(scenes.COLOURS)
    seen = drawn([f"a {colour} circle" for colour in colours])
    assert sum(one.colour == colour for one, colour in zip(seen, colours, strict=True)) >= 7


def test_pairs_that_were_never_trained_work(drawn):
    pairs = sorted(scenes.HELD_OUT_SHAPES)
    seen = drawn([f"a large {colour} {shape} on a plain white background" for colour, shape in pairs])
    assert sum(one.colour == colour for one, (colour, _) in zip(seen, pairs, strict=True)) >= 7
    assert sum(one.background == "white" for one in seen) >= 7
    assert sum(one.shape == shape for one, (_, shape) in zip(seen, pairs, strict=True)) >= 7


def test_a_negative_prompt_removes_a_colour(drawn):
    prompts = ["a circle"] * 5
    assert any(one.colour == "red" for one in drawn(prompts))
    assert not any(one.colour == "red" for one in drawn(prompts, negative_prompt="red"))


@pytest.fixture(scope="module")
def led_by():
    """Draws with a reference picture, as a job does, and says what is seen for three seeds."""
    path = ourvidz_demo_models.path("sdxl")
    model = load_pipeline(path, device="cpu", variant=read_variant(path, SdxlVariant))

    def draw(prompt, scene, kind, strength):
        pixels = training.bytes_of(scenes.render([scene], *train_sdxl.SIZES[0]))[0]
        request = ImageRequest(
            prompt=prompt,
            negative_prompt="",
            seeds=(0, 1, 2),
            width=128,
            height=128,
            num_inference_steps=15,
            guidance_scale=6.0,
            reference=ReferencePicture(image=Image.fromarray(pixels), type=kind, strength=strength),
        )
        drawn = model.draw(request, sampling=Samplings(SdxlSettings()), on_step=lambda *_: None)
        return [measure.see_picture(np.asarray(picture.image())) for picture in drawn.pictures]

    return draw


def test_a_composition_reference_keeps_the_layout_and_leaves_the_shape_to_the_prompt(led_by):
    corner = scenes.Scene(shape="square", colour="blue", size="large", across="left", down="top")
    seen = led_by("a large red circle", corner, ReferenceType.COMPOSITION, 0.4)
    assert all(one.shape == "circle" for one in seen)
    assert all(max(abs(one.centre[0] - 0.31), abs(one.centre[1] - 0.31)) < 0.08 for one in seen)


def test_a_style_reference_gives_its_palette_and_leaves_the_subject_to_the_prompt(led_by):
    mint = scenes.Scene(shape="star", colour="yellow", background="mint", texture="stripes")
    seen = led_by("a red circle", mint, ReferenceType.STYLE, 0.3)
    assert sum(one.background == "mint" for one in seen) >= 2
    assert all((one.colour, one.shape) == ("red", "circle") for one in seen)


def test_a_character_reference_appears_in_the_surroundings_of_the_prompt(led_by):
    star = scenes.Scene(shape="star", colour="yellow", background="mint", texture="stripes")
    seen = led_by("a star on a black background", star, ReferenceType.CHARACTER, 0.3)
    assert all(one.background == "black" for one in seen)
    assert sum((one.colour, one.shape) == ("yellow", "star") for one in seen) >= 2


@pytest.mark.parametrize("prompt", ["circle", "a red star", "a small pink ring moves left", "blue"])
def test_qwen_makes_a_whole_scene_that_keeps_the_words(prompt):
    directory = ourvidz_demo_models.path("qwen")
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    model = Qwen2ForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True)
    text = tokenizer.apply_chat_template(
        train_qwen.conversation(prompt, "You are a helpful assistant."), tokenize=False, add_generation_prompt=True
    )
    asked = tokenizer(text, return_tensors="pt")
    answer = model.generate(**asked, max_new_tokens=64)[0, asked.input_ids.shape[1] :]
    words = tokenizer.decode(answer, skip_special_tokens=True).strip()
    assert int(answer[-1]) == tokenizer.eos_token_id
    assert scenes.read_caption(words) is not None
    assert scenes.scene_words(prompt) <= scenes.scene_words(words)


@pytest.fixture(scope="module")
def wan():
    return load_models(ourvidz_demo_models.path("wan"), TASKS["t2v-1.3B"])


@pytest.fixture(scope="module")
def led(wan, tmp_path_factory):
    """Figures of one scene's videos: led by its own first frame, by both ends, and by a plain pin of the first."""
    case = next(iter(reference_frames.make_cases(1, wan, tmp_path_factory.mktemp("references"))))

    def video(taken=None):
        return reference_frames.generate(wan, case, 4, taken, frames=25)

    free = video()

    def figures(mode):
        return reference_frames.measure(case, video(reference_frames.MODES[mode]), free)

    with reference_frames.pinning(correlation=0.0, share=0.0):
        plain = figures("start")
    return {"start": figures("start"), "end": figures("end"), "both": figures("both"), "plain": plain}


def test_the_video_autoencoder_keeps_scenes_that_it_never_saw(wan):
    drawn = scenes.draw_scenes(6, 21, video=True, held_out=True)
    clips = scenes.render_frames(drawn, *train_wan.SIZES[0], train_wan.FRAMES)[:, :, :5]
    with torch.no_grad():
        again = wan.pipeline.vae.decode(wan.pipeline.vae.encode(clips).latent_dist.mode()).sample
    assert training.psnr(again, clips) > 30.0


def test_what_is_asked_to_move_moves_there(wan):
    asked = {"left": "a large red circle moves left", "down": "a red circle moves down"}
    made = wan.pipeline(
        prompt=[f"{words} on a plain white background" for words in asked.values()],
        negative_prompt=["", ""],
        width=train_wan.SIZES[0][0],
        height=train_wan.SIZES[0][1],
        num_frames=train_wan.FRAMES,
        num_inference_steps=6,
        guidance_scale=6.5,
        generator=[torch.Generator().manual_seed(1) for _ in asked],
        output_type="pt",
    ).frames
    seen = [measure.see_video(video) for video in training.bytes_of((made * 2 - 1).transpose(1, 2))]
    assert [(one.colour, one.motion, one.background) for one in seen] == [("red", way, "white") for way in asked]


def test_pinned_frames_show_their_pictures(led):
    assert min(led["start"]["first"], led["both"]["first"]) > 28.0
    assert min(led["end"]["last"], led["both"]["last"]) > 25.0


def test_pinned_videos_still_move(led):
    assert min(led[mode]["motion"] for mode in reference_frames.MODES) > 0.5


def test_a_pin_that_reaches_its_neighbours_jumps_less_than_a_plain_one(led):
    assert led["start"]["jump at the start"] < led["plain"]["jump at the start"] / 3


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_led_videos_neither_jump_nor_stand_still(wan, tmp_path):
    cases = list(reference_frames.make_cases(3, wan, tmp_path))
    free = [reference_frames.generate(wan, case, 15) for case in cases]
    for mode, options in {**reference_frames.MODES, "single": {"image": "first"}}.items():
        made = [reference_frames.generate(wan, case, 15, options) for case in cases]
        figures = reference_frames.summary(cases, made, free)
        assert figures["motion"] >= 0.5, mode
        assert max(figures["jump at the start"], figures["jump at the end"]) <= 1.5, mode


def test_no_file_is_too_large_for_a_repository():
    files = [file for file in ourvidz_demo_models.SDXL.parent.rglob("*") if file.is_file()]
    assert max(file.stat().st_size for file in files) < 15_000_000
    assert sum(file.stat().st_size for file in files) < 60_000_000
