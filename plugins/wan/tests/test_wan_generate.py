"""``wan_generate`` as a program, and the tasks beside text-to-video."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import signal
import subprocess
import sys
import time

import attrs
import numpy as np
import pytest
import torch
from ourvidz_wan.arguments import parse_arguments
from ourvidz_wan.checkpoints import load_models
from ourvidz_wan.config import WanVariant
from ourvidz_wan.generate import main, run
from ourvidz_wan.sampling import sample
from ourvidz_wan.tasks import TASKS
from ourvidz_wan.video import read_facts, read_video, write_video

from ourvidz_core.engine.pictures import read_facts as read_picture_facts


def quietly(step, total):
    """Nobody watches."""


def command_line(**options):
    return [sys.executable, "-m", "ourvidz_wan.generate", *(f"--{name}={value}" for name, value in options.items())]


@pytest.fixture
def options(model_dir, tmp_path):
    return {
        "task": "t2v-1.3B",
        "ckpt_dir": model_dir,
        "prompt": "-neon --task x",
        "save_file": tmp_path / "out.mp4",
        "frame_num": 5,
        "sample_steps": 3,
        "base_seed": 4,
    }


@pytest.fixture
def call_main():
    """The program inside this process, which keeps its own way to end."""
    before = signal.getsignal(signal.SIGTERM)
    yield lambda **options: main([f"--{name}={value}" for name, value in options.items()])
    signal.signal(signal.SIGTERM, before)


def test_it_writes_the_file_and_reports_each_step(options, call_main, capsys):
    assert call_main(**options) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [str(options["save_file"])]
    assert printed.err.splitlines() == ["step 1 of 3", "step 2 of 3", "step 3 of 3"]
    assert read_video(options["save_file"]).shape == (5, 80, 48, 3)
    assert [path.name for path in options["save_file"].parent.iterdir()] == ["out.mp4"]


@pytest.mark.parametrize(("name", "frames", "read"), [("out.mp4", 5, read_facts), ("out.png", 1, read_picture_facts)])
def test_the_file_says_what_the_command_line_says_of_it(name, frames, read, options, tmp_path, call_main):
    told = {"original_prompt": '狐狸 🦊 & "friends"', "prompt": "not this one"}
    target = tmp_path / name
    assert call_main(**{**options, "save_file": target, "frame_num": frames, "metadata": json.dumps(told)}) == 0
    written = read(target)
    assert written["original_prompt"] == told["original_prompt"]
    assert (written["prompt"], written["seed"]) == (options["prompt"], "4")


def test_a_failure_is_one_line_and_status_1(options, tmp_path, call_main, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert call_main(**{**options, "ckpt_dir": empty}) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("wan_generate: ")
    assert printed.count("\n") == 1


def test_sigterm_ends_it_and_leaves_no_file(options):
    running = subprocess.Popen(
        command_line(**{**options, "sample_steps": 100_000}), stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert running.stderr
    assert "step 1 of" in running.stderr.readline()
    running.send_signal(signal.SIGTERM)
    started = time.monotonic()
    running.communicate(timeout=30)
    assert running.returncode == 128 + signal.SIGTERM
    assert time.monotonic() - started < 10
    assert list(options["save_file"].parent.iterdir()) == []


def test_a_terminal_gets_a_bar(options, call_main):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    with contextlib.redirect_stderr(Terminal()) as terminal:
        assert call_main(**options) == 0
    assert "100%" in terminal.getvalue()
    assert "step 1 of 3" not in terminal.getvalue()


@pytest.fixture(scope="module")
def small_models(tiny_wan, tmp_path_factory):
    """One small model for each pipeline."""
    directory = tmp_path_factory.mktemp("kinds")
    for kind in ("i2v", "flf2v", "vace"):
        tiny_wan.save(tiny_wan.make_pipeline(kind), directory / kind)
    return directory


@pytest.fixture(scope="module")
def loaded():
    """The models of a task, loaded once."""
    return functools.cache(lambda directory, task: load_models(directory, TASKS[task]))


@pytest.fixture
def made(small_models, model_dir, loaded, tmp_path):
    """The frames that a task makes, and its facts."""
    directories = {
        "i2v-14B": small_models / "i2v",
        "flf2v-14B": small_models / "flf2v",
        "vace-1.3B": small_models / "vace",
        "vace-14B": small_models / "vace",
    }

    def make(task, frames=5, **options):
        directory = directories.get(task, model_dir)
        target = tmp_path / ("out.png" if frames == 1 else "out.mp4")
        given = {
            "task": task,
            "ckpt_dir": directory,
            "prompt": "a cat",
            "save_file": target,
            "frame_num": frames,
            "sample_steps": 2,
            "base_seed": 1,
            **options,
        }
        arguments = parse_arguments([f"--{name}={value}" for name, value in given.items()])
        result = run(arguments, loaded(directory, arguments.task.name), quietly)
        return (target.read_bytes() if frames == 1 else read_video(target)), result

    return make


def test_every_task_of_the_specification_runs(made, pictures):
    lake, fire = pictures["lake"], pictures["fire"]
    needs = {"i2v-14B": {"image": lake}, "flf2v-14B": {"first_frame": lake, "last_frame": fire}}
    for task in TASKS.values():
        frames = 1 if task.makes_images_only else 5
        _, result = made(task.name, frames, **needs.get(task.name, {}))
        assert result.facts["wan_task"] == task.name
        assert result.facts["reference_applied"] is (task.name in needs)
        assert (result.width, result.height) == (48, 80)


@pytest.mark.parametrize(("task", "option"), [("i2v-14B", "image"), ("vace-1.3B", "first_frame")])
def test_other_tasks_have_the_fast_tier_too(task, option, made, pictures):
    forwards: list[str] = []
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, _arguments, _output: forwards.append(type(module).__name__)
    )
    try:
        _, result = made(task, sample_steps=12, tier="fast", **{option: pictures["lake"]})
    finally:
        hook.remove()
    assert (result.facts["steps"], result.facts["tier"], result.facts["steps_computed"]) == (12, "fast", 8)
    assert sum(name.endswith("Transformer3DModel") for name in forwards) == 2 * 8


@pytest.mark.parametrize(
    ("task", "option"),
    [("i2v-14B", "image"), ("flf2v-14B", "last_frame"), ("vace-1.3B", "first_frame"), ("vace-1.3B", "src_ref_images")],
)
def test_the_reference_of_a_task_changes_its_frames(task, option, made, pictures):
    shared = {"first_frame": pictures["rings"]} if task == "flf2v-14B" else {}
    lake, lake_result = made(task, **shared, **{option: pictures["lake"]})
    fire, _ = made(task, **shared, **{option: pictures["fire"]})
    assert not np.array_equal(lake, fire)
    assert lake_result.frames == len(lake) == 5
    assert lake_result.facts["reference_method"] in ("image_to_video_weights", "vace")


def test_vace_works_from_a_video_and_a_mask(made, tmp_path):
    video, mask = tmp_path / "video.mp4", tmp_path / "mask.mp4"
    moment, down, right = np.mgrid[0:7, 0:60, 0:90]
    write_video(np.stack([right * 2, down * 3, moment * 20], -1).astype(np.uint8), video, {}, fps=16)
    write_video(np.repeat(((right > 45) * 255)[..., None], 3, -1).astype(np.uint8), mask, {}, fps=16)
    _, result = made("vace-1.3B", src_video=video, src_mask=mask)
    assert result.facts["reference_method"] == "vace"


def test_a_source_video_that_is_too_short_is_refused(made, tmp_path):
    from ourvidz_core.errors import ReferenceInvalid

    video = tmp_path / "video.mp4"
    write_video(np.zeros((6, 60, 90, 3), np.uint8), video, {}, fps=16)
    with pytest.raises(ReferenceInvalid, match="has 6 frames and 9 are needed; use --frame_num 5"):
        made("vace-1.3B", 9, src_video=video)


def test_a_model_that_needs_more_guidance_gets_it_and_says_so(models, asking):
    variant = attrs.evolve(models.variant, guidance_factor=2.0)
    made = sample(
        asking(frame_num=5, sample_guide_scale=3), attrs.evolve(models, variant=variant), lambda step, total: None
    )
    expected = sample(asking(frame_num=5, sample_guide_scale=5), models, lambda step, total: None)
    assert np.array_equal(made.frames, expected.frames)
    assert (made.facts["guidance_scale"], made.facts["requested_guidance_scale"]) == (5.0, 3.0)
    assert "requested_guidance_scale" not in expected.facts


@pytest.mark.parametrize("asked", [0.0, 0.5, 1.0])
def test_who_asks_for_no_guidance_gets_none_from_any_model(asked):
    assert WanVariant(guidance_factor=2.0).guided(asked) == asked


@pytest.mark.parametrize(("size", "width", "height"), [("480*832", 48, 80), ("832*480", 80, 48)])
def test_the_size_is_width_then_height_scaled_by_the_model(size, width, height, made):
    frames, result = made("t2v-1.3B", size=size)
    assert frames.shape[1:3] == (height, width)
    assert result.facts["size"] == f"{width}*{height}"
    assert result.facts["requested_size"] == size
