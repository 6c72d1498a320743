"""The scenes, their captions, and what measuring says of their pixels."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch
from scipy import ndimage

from examples.models import measure, scenes, training, vocabularies


@pytest.mark.parametrize("blur", [0.0, 1.2], ids=["sharp", "soft"])
def test_measuring_finds_colour_and_shape_of_drawn_pictures(blur):
    drawn = scenes.draw_scenes(24, 3, video=False)
    pixels = training.bytes_of(scenes.render(drawn, 128, 128))
    seen = [measure.see_picture(ndimage.gaussian_filter(one, (blur, blur, 0))) for one in pixels]
    assert [(s.colour, s.shape, s.background) for s in seen] == [(s.colour, s.shape, s.background) for s in drawn]


def test_measuring_finds_every_motion_of_drawn_videos():
    drawn = {scene.motion: scene for scene in scenes.draw_scenes(60, 3, video=True)}
    assert set(drawn) == set(scenes.MOTIONS)
    videos = training.bytes_of(scenes.render_frames(list(drawn.values()), 64, 112, 41))
    seen = [measure.see_video(video) for video in videos]
    assert [(s.colour, s.motion) for s in seen] == [(s.colour, s.motion) for s in drawn.values()]


def test_a_picture_without_a_shape_shows_none():
    assert measure.see_picture(np.full((64, 64, 3), 150, np.uint8)).colour is None


def test_scenes_are_the_same_for_the_same_seed():
    assert scenes.draw_scenes(20, 5, video=True) == scenes.draw_scenes(20, 5, video=True)
    assert scenes.draw_scenes(20, 5, video=True) != scenes.draw_scenes(20, 6, video=True)


def test_a_motion_with_twice_the_weight_is_drawn_twice_as_often():
    drawn = scenes.draw_scenes(4000, 1, video=True, weights={"turns": 2.0, "left": 0.5})
    often = {motion: sum(scene.motion == motion for scene in drawn) for motion in ("turns", "left", "up")}
    assert 1.6 < often["turns"] / often["up"] < 2.4
    assert 0.35 < often["left"] / often["up"] < 0.65


@pytest.mark.parametrize("video", [False, True])
def test_training_never_draws_a_held_out_scene(video):
    assert not any(scene.is_held_out for scene in scenes.draw_scenes(500, 1, video=video))
    assert all(scene.is_held_out for scene in scenes.draw_scenes(50, 1, video=video, held_out=True))


def test_training_sees_every_colour_and_every_shape_in_every_motion():
    drawn = scenes.draw_scenes(4000, 1, video=True)
    for kinds, seen in (
        (scenes.COLOURS, {(scene.colour, scene.motion) for scene in drawn}),
        (scenes.SHAPES, {(scene.shape, scene.motion) for scene in drawn}),
    ):
        assert seen == set(itertools.product(kinds, scenes.MOTIONS))


def test_a_description_is_read_back():
    for scene in scenes.draw_scenes(200, 2, video=True):
        read = scenes.read_caption(scenes.describe(scene))
        assert read is not None
        assert (read.shape, read.colour, read.background, read.texture, read.motion) == (
            scene.shape,
            scene.colour,
            scene.background,
            scene.texture,
            scene.motion,
        )


def test_captions_are_never_untrue():
    chance = random.Random(1)
    for scene in scenes.draw_scenes(300, 2, video=False):
        said = scenes.scene_words(scenes.caption(scene, chance))
        assert not said & (set(scenes.COLOURS) - {scene.colour})
        assert not said & (set(scenes.BACKGROUNDS) - {scene.background})


def test_expanding_keeps_what_was_said():
    scene = scenes.expand("a small red star turns blue on a striped navy background")
    assert (scene.size, scene.colour, scene.shape) == ("small", "red", "star")
    assert (scene.motion, scene.second_colour, scene.background, scene.texture) == ("turns", "blue", "navy", "stripes")
    assert scenes.read_caption(scenes.describe(scenes.expand("circle"))) is not None


def test_every_word_is_a_token_and_strange_text_falls_apart_into_bytes():
    words = scenes.vocabulary()
    clip, qwen = vocabularies.clip_tokenizer(words), vocabularies.qwen_tokenizer(words)
    assert len(clip.tokenize("a small red circle")) == 4
    assert len(qwen.tokenize("a small red circle")) == 4
    assert clip.eos_token_id not in clip("żółw 龟", add_special_tokens=False).input_ids
    assert qwen.decode(qwen("żółw 龟").input_ids) == "żółw 龟"
    assert vocabularies.clip_tokenizer(words).get_vocab() == clip.get_vocab()


def test_a_run_goes_on_where_it_stopped(tmp_path):
    def run(steps):
        torch.manual_seed(0)
        layer = torch.nn.Linear(2, 1)
        return training.Run("line", [layer], work=tmp_path, steps=steps, seconds=60, rate=0.01), layer

    first, layer = run(3)
    for _ in first:
        first.learn(layer(torch.ones(1, 2)).square().mean())
    second, resumed = run(5)
    assert second.step == 3
    assert torch.equal(resumed.weight, layer.weight)
