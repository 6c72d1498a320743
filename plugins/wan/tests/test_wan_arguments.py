"""The command line: every option of the specification, its default, and what is refused before torch is imported."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ourvidz_wan.arguments import UsageError, parse_arguments
from ourvidz_wan.config import Solver
from ourvidz_wan.tasks import TASKS


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    directory = tmp_path_factory.mktemp("place")
    (directory / "weights").mkdir()
    (directory / "words.png").write_text("no picture")
    (directory / "empty.png").write_bytes(b"")
    from PIL import Image

    Image.new("RGB", (8, 8), "red").save(directory / "red.png")
    whole = (directory / "red.png").read_bytes()
    (directory / "half.png").write_bytes(whole[: len(whole) // 2])
    return directory


@pytest.fixture
def parse(place):
    def parse(*options, task="t2v-1.3B", save_file="out.mp4", ckpt_dir="weights"):
        return parse_arguments(
            [
                f"--task={task}",
                f"--ckpt_dir={place / ckpt_dir}",
                "--prompt=a cat",
                f"--save_file={place / save_file}",
                *(option.replace("PLACE", str(place)) for option in options),
            ]
        )

    return parse


def test_the_defaults_are_those_of_the_specification(parse):
    arguments = parse()
    assert arguments.size == "480*832"
    assert arguments.frame_num == 81
    assert arguments.sample_steps == 50
    assert arguments.sample_guide_scale == 5.0
    assert arguments.sample_solver is Solver.UNIPC
    assert arguments.sample_shift == 5.0
    assert arguments.offload_model is True
    assert 0 <= arguments.base_seed < 2**31


def test_an_image_has_one_frame_by_default(parse):
    assert parse(save_file="out.png").frame_num == 1


def test_image_to_video_takes_40_steps_by_default(parse):
    assert parse("--image=PLACE/red.png", task="i2v-14B").sample_steps == 40


def test_seeds_differ_where_none_is_given(parse):
    assert parse().base_seed != parse().base_seed


def test_the_size_list_of_each_task():
    small, large = {"480*832", "832*480"}, {"720*1280", "1280*720"}
    assert set(TASKS["t2v-1.3B"].sizes) == set(TASKS["vace-1.3B"].sizes) == small
    for name in ("t2v-14B", "i2v-14B", "flf2v-14B", "vace-14B"):
        assert set(TASKS[name].sizes) == small | large
    assert set(TASKS["t2i-14B"].sizes) == small | large | {"1024*1024"}


REFUSED = {
    "unknown task": (("--task=t2v-9B",), "--task t2v-9B is unknown"),
    "size of no task": (("--size=100*100",), "--size 100*100 is not supported by t2v-1.3B"),
    "size of another task": (("--size=1280*720",), "use one of 480*832, 832*480"),
    "83 frames": (("--frame_num=83",), "--frame_num 83 is not 4n+1; use 81 or 85"),
    "no frames": (("--frame_num=0",), "--frame_num 0 is too few"),
    "frames that are no number": (("--frame_num=many",), "--frame_num"),
    "no weights": (("--ckpt_dir=PLACE/nowhere",), "nowhere is no directory"),
    "weights that are a file": (("--ckpt_dir=PLACE/red.png",), "red.png is no directory"),
    "fp8 in the exact tier": (("--fp8_attention=True",), "--fp8_attention is not exact; use it with --tier fast"),
    "unreadable image": (("--image=PLACE/words.png",), "words.png is not a readable image"),
    "empty image": (("--image=PLACE/empty.png",), "empty.png is not a readable image"),
    "half an image": (("--first_frame=PLACE/half.png",), "half.png is not a readable image"),
    "missing image": (("--last_frame=PLACE/none.png",), "none.png is no file"),
    "solver": (("--sample_solver=euler",), "--sample_solver"),
    "no steps": (("--sample_steps=0",), "--sample_steps 0 is too few"),
    "guidance": (("--sample_guide_scale=nan",), "--sample_guide_scale nan"),
    "shift": (("--sample_shift=0",), "--sample_shift 0.0"),
    "seed": (("--base_seed=-5",), "--base_seed -5"),
    "strength": (("--reference_strength=1.5",), "--reference_strength 1.5"),
    "truth": (("--offload_model=perhaps",), "--offload_model"),
    "unknown option": (("--first=PLACE/red.png",), "unrecognized arguments: --first"),
    "no directory to save in": (("--save_file=PLACE/nowhere/out.mp4",), "there is no directory"),
    "odd file": (("--save_file=PLACE/out.gif",), "must end in .mp4, or in .png for one frame"),
    "video as a picture": (("--save_file=PLACE/out.png", "--frame_num=5"), "one frame is written as .png"),
    "two kinds of reference": (("--image=PLACE/red.png", "--first_frame=PLACE/red.png"), "give one kind"),
    "metadata that are no texts": (('--metadata={"steps": 3}',), "expected a JSON object of texts"),
    "metadata that are no JSON": (("--metadata=steps",), "expected a JSON object of texts"),
    "a reference that the task does not read": (("--src_video=PLACE/red.png",), "nothing that t2v-1.3B reads"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_done_is_refused_in_one_line(options, message, parse):
    with pytest.raises(UsageError) as refusal:
        parse(*options)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("i2v-14B", (), "needs --image"),
        ("flf2v-14B", ("--first_frame=PLACE/red.png",), "needs --last_frame"),
        ("flf2v-14B", ("--frame_num=1", "--save_file=PLACE/out.png"), "leads from a first frame to a last one"),
        ("i2v-14B", ("--image=PLACE/red.png", "--last_frame=PLACE/red.png"), "nothing that i2v-14B reads"),
        ("t2i-14B", ("--frame_num=5",), "makes one frame"),
        ("vace-1.3B", ("--src_mask=PLACE/red.png",), "none is given"),
    ],
    ids=["i2v", "flf2v", "flf2v of one frame", "i2v with an end", "t2i", "mask without video"],
)
def test_a_task_says_what_it_needs(task, options, message, parse):
    with pytest.raises(UsageError, match=message):
        parse(*options, task=task)


BAD_LINES = ["unknown task", "size of another task", "83 frames", "no weights", "unreadable image"]


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_command_line_ends_in_under_a_second_with_status_2(name, place):
    options = [option.replace("PLACE", str(place)) for option in REFUSED[name][0]]
    base = ["--task=t2v-1.3B", f"--ckpt_dir={place / 'weights'}", "--prompt=a", f"--save_file={place / 'out.mp4'}"]
    command = [sys.executable, "-m", "ourvidz_wan.generate", *base, *options]
    seconds = []
    for _ in range(3):  # the best of three: the machine has other things to do
        started = time.perf_counter()
        ended = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        seconds.append(time.perf_counter() - started)
        if seconds[-1] < 1.0:
            break
    assert ended.returncode == 2
    assert ended.stderr.startswith("wan_generate: ")
    assert ended.stderr.count("\n") == 1
    assert ended.stdout == ""
    assert min(seconds) < 1.0


PROMPTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=60)


@given(prompt=PROMPTS | st.sampled_from(["-neon --task x", "--", "-", "--prompt=--prompt", "a\nb", "=", "'\"$(x)`"]))
def test_any_prompt_arrives_unharmed(place, prompt):
    argv = ["--task=t2v-1.3B", f"--ckpt_dir={place}", f"--prompt={prompt}", f"--save_file={place / 'out.mp4'}"]
    assert parse_arguments(argv).prompt == prompt


@given(frames=st.integers(2, 500))
def test_only_4n_plus_1_frames_are_taken(place, frames):
    argv = ["--task=t2v-1.3B", f"--ckpt_dir={place}", "--prompt=a", f"--save_file={place / 'out.mp4'}"]
    if frames % 4 == 1:
        assert parse_arguments([*argv, f"--frame_num={frames}"]).frame_num == frames
    else:
        with pytest.raises(UsageError):
            parse_arguments([*argv, f"--frame_num={frames}"])
