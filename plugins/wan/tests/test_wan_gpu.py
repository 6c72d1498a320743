"""What only a GPU can show: compiled, batched, replayed, moved away and back, WAN makes what plain diffusers makes."""

from __future__ import annotations

import functools
import importlib.util
from collections import OrderedDict
from unittest import mock

import attrs
import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from ourvidz_wan import checkpoints, decoding, prediction, sampling
from ourvidz_wan.attention import Kernel, attend, best_kernel, may_attend_in_fp8
from ourvidz_wan.checkpoints import load_models, make_scheduler
from ourvidz_wan.config import Solver
from ourvidz_wan.flash_3 import FLASH_3_HEAD_DIM, FLASH_3_MODULES
from ourvidz_wan.sampling import make_latents, sample
from ourvidz_wan.tasks import TASKS
from ourvidz_wan.video import write_video

from ourvidz_core.engine.models import ModelCache
from ourvidz_core.errors import JobCancelled

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

DEVICE = "cuda"
HALF = torch.bfloat16
KINDS = {"t2v-1.3B": "t2v", "t2i-14B": "t2v", "i2v-14B": "i2v", "flf2v-14B": "flf2v", "vace-1.3B": "vace"}
#: Every task with every kind of reference: the task, the number of frames, and what it is given.
CASES = {
    "text": ("t2v-1.3B", 9, {}),
    "text and a single picture": ("t2v-1.3B", 9, {"image": "lake"}),
    "text and a start": ("t2v-1.3B", 9, {"first_frame": "lake"}),
    "text and an end": ("t2v-1.3B", 9, {"last_frame": "fire"}),
    "text and both ends": ("t2v-1.3B", 9, {"first_frame": "lake", "last_frame": "fire"}),
    "image": ("t2v-1.3B", 1, {}),
    "image from a picture": ("t2v-1.3B", 1, {"image": "lake"}),
    "image by t2i": ("t2i-14B", 1, {}),
    "i2v": ("i2v-14B", 9, {"image": "lake"}),
    "flf2v": ("flf2v-14B", 9, {"first_frame": "lake", "last_frame": "fire"}),
    "vace from text": ("vace-1.3B", 9, {}),
    "vace and a single picture": ("vace-1.3B", 9, {"image": "lake"}),
    "vace and a start": ("vace-1.3B", 9, {"first_frame": "lake"}),
    "vace and an end": ("vace-1.3B", 9, {"last_frame": "fire"}),
    "vace and both ends": ("vace-1.3B", 9, {"first_frame": "lake", "last_frame": "fire"}),
    "vace from a video": ("vace-1.3B", 9, {"src_video": "video", "src_mask": "mask"}),
    # With the picture's own latent frame as long as the others, so that nothing is compiled for it alone.
    "vace and what shall appear": ("vace-1.3B", 5, {"src_ref_images": "rings"}),
}


def quietly(step: int, total: int) -> None:
    """Nobody watches."""


def relative(made: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((made.float() - wanted.float()).norm() / wanted.float().norm())


@pytest.fixture(scope="module")
def on_gpu(model_dir):
    """The small model in single precision, where a difference would be one of method."""
    return load_models(model_dir, TASKS["t2v-1.3B"], device=DEVICE, dtype=torch.float32)


@pytest.fixture(scope="module")
def wide_dirs(tiny_wan, tmp_path_factory):
    """A model of each kind, with heads as wide as those of every published WAN: FlashAttention 3 is for them alone."""
    directory = tmp_path_factory.mktemp("wide")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_wan, "HEAD_DIM", FLASH_3_HEAD_DIM)
        for kind in tiny_wan.KINDS:
            tiny_wan.save(tiny_wan.make_pipeline(kind), directory / kind)
    return directory


@pytest.fixture(scope="module")
def wide(wide_dirs):
    """The models of a task as jobs have them, loaded once."""
    return functools.cache(lambda task: load_models(wide_dirs / KINDS[task], TASKS[task], device=DEVICE, dtype=HALF))


@pytest.fixture(scope="module")
def plain(wide_dirs):
    """The same with nothing done to them: diffusers' own modules, one kernel launched after another."""

    @functools.cache
    def load(task, dtype):
        with (
            mock.patch.object(checkpoints, "prepare_transformer", return_value=None),
            mock.patch.object(decoding, "is_decodable", return_value=False),
        ):
            return load_models(wide_dirs / KINDS[task], TASKS[task], device=DEVICE, dtype=dtype)

    def make(asked, dtype=HALF):
        with mock.patch.object(prediction, "LAUNCH_BOUND_TOKENS", 0):
            return sample(asked, load(asked.task.name, dtype), quietly)

    return make


@pytest.fixture
def asking_case(asking, wide_dirs, pictures, tmp_path):
    """Checked arguments of one of ``CASES``."""
    moment, down, right = np.mgrid[0:9, 0:60, 0:90]
    shown = dict(pictures)
    for name in ("video", "mask"):
        shown[name] = tmp_path / f"{name}.mp4"
    write_video(np.stack([right * 2, down * 3, moment * 20], -1).astype(np.uint8), shown["video"], {}, fps=16)
    write_video(np.repeat(((right > 45) * 255)[..., None], 3, -1).astype(np.uint8), shown["mask"], {}, fps=16)

    def ask(case, **options):
        task, frames, given = CASES[case]
        references = {option: shown[name] for option, name in given.items()}
        return asking(task=task, ckpt_dir=wide_dirs / KINDS[task], frame_num=frames, **references, **options)

    return ask


@pytest.mark.parametrize(
    ("frames", "launch_bound_tokens"),
    [(1, prediction.LAUNCH_BOUND_TOKENS), (9, prediction.LAUNCH_BOUND_TOKENS), (9, 0)],
    ids=["image", "video", "video whose branches go one after another"],
)
def test_latents_are_those_of_plain_diffusers(frames, launch_bound_tokens, on_gpu, model_dir, asking, monkeypatch):
    monkeypatch.setattr(prediction, "LAUNCH_BOUND_TOKENS", launch_bound_tokens)
    asked = asking(frame_num=frames, sample_steps=10)
    plain = WanPipeline.from_pretrained(model_dir, local_files_only=True).to(DEVICE)
    plain.set_progress_bar_config(disable=True)
    plain.scheduler = make_scheduler(Solver.UNIPC, 5.0)
    options = {
        "prompt": asked.prompt,
        "negative_prompt": on_gpu.variant.negative_prompt,
        "width": 48,
        "height": 80,
        "num_frames": frames,
        "num_inference_steps": 10,
        "guidance_scale": 5.0,
    }
    latents = plain(**options, generator=torch.Generator().manual_seed(5), output_type="latent").frames
    frames_of_plain = plain(**options, generator=torch.Generator().manual_seed(5), output_type="np").frames[0]
    # What is replayed in the second run was recorded in the first.
    for made in (sample(asked, on_gpu, quietly), sample(asked, on_gpu, quietly)):
        assert relative(made.latents, latents) < 1e-4
        assert np.abs(made.frames.astype(float) - frames_of_plain * 255).mean() < 1.5
        assert made.facts["vae_dtype"] == "bfloat16"


@pytest.mark.parametrize("case", CASES)
def test_in_half_precision_each_task_is_as_near_to_single_precision_as_plain_diffusers(case, wide, plain, asking_case):
    asked = asking_case(case, sample_steps=6)
    true, rounded = plain(asked, torch.float32), plain(asked)
    made, again = (sample(asked, wide(asked.task.name), quietly) for _ in range(2))
    off, plainly_off = relative(made.latents, true.latents), relative(rounded.latents, true.latents)
    apart = relative(made.latents, rounded.latents)
    print(f"{case}: {off:.4f} from fp32, plain diffusers {plainly_off:.4f}, {apart:.4f} from each other; {made.facts}")
    assert off < 1.5 * plainly_off
    assert apart < 4e-2
    assert np.abs(made.frames.astype(float) - rounded.frames).mean() < 5
    # What is replayed in the second run was recorded in the first.
    assert torch.equal(made.latents, again.latents)
    assert np.array_equal(made.frames, again.frames)
    assert made.facts["compiled"] is True
    assert made.facts["attention"] == best_kernel(torch.device(DEVICE), HALF, FLASH_3_HEAD_DIM).value


def test_flash_attention_3_takes_heads_of_128_alone():
    device = torch.device(DEVICE)
    is_there = any(importlib.util.find_spec(name) for name in FLASH_3_MODULES)
    is_hopper = torch.cuda.get_device_capability()[0] == 9
    chosen = {head_dim: best_kernel(device, HALF, head_dim) for head_dim in (12, 64, 128)}
    print(chosen)
    assert (chosen[128] is Kernel.FLASH_3) is (is_there and is_hopper)
    assert Kernel.FLASH_3 not in (chosen[12], chosen[64])
    for head_dim, kernel in chosen.items():
        query, key, value = torch.randn((3, 1, 77, 2, head_dim), device=device, dtype=HALF)
        wanted = attend(query.float(), key.float(), value.float(), Kernel.TORCH)
        assert relative(attend(query, key, value, kernel), wanted) < 2e-2


@pytest.mark.parametrize("case", ["text", "i2v", "vace and a start"])
def test_fast_videos_attend_in_fp8_where_they_are_asked_to(case, wide, asking_case, monkeypatch):
    # Small videos are replayed as one graph, and attend as they come.
    monkeypatch.setattr(prediction, "LAUNCH_BOUND_TOKENS", 0)
    monkeypatch.setattr(sampling, "LAUNCH_BOUND_TOKENS", 0)
    if not may_attend_in_fp8(torch.device(DEVICE), best_kernel(torch.device(DEVICE), HALF, FLASH_3_HEAD_DIM)):
        pytest.skip("this card or FlashAttention 3's build has no fp8")
    fast = asking_case(case, tier="fast")
    models = wide(fast.task.name)
    plain, made = (sample(asked, models, quietly) for asked in (fast, attrs.evolve(fast, fp8_attention=True)))
    print(f"{case}: {relative(made.latents, plain.latents):.4f} from the fast tier; {made.facts}")
    assert 0 < relative(made.latents, plain.latents) < 0.1
    assert (plain.facts["attention"], made.facts["attention"]) == ("fa3", "fa3_fp8")
    assert made.facts["compiled"] is True
    assert torch.equal(sample(fast, models, quietly).latents, plain.latents)


def test_a_job_of_another_size_between_changes_nothing(on_gpu, asking, pictures):
    asked = asking(first_frame=pictures["lake"])
    before = sample(asked, on_gpu, quietly)
    for other in (asking(frame_num=1), asking(size="832*480", frame_num=5)):
        made = sample(other, on_gpu, quietly)
        assert made.frames.shape == (other.frame_num, made.size[1], made.size[0], 3)
    after = sample(asked, on_gpu, quietly)
    assert torch.equal(before.latents, after.latents)
    assert np.array_equal(before.frames, after.frames)


@pytest.mark.parametrize("case", ["text", "i2v", "vace and a start"])
def test_a_job_that_is_cancelled_leaves_the_models_ready(case, wide, asking_case):
    def cancel(step, total):
        if step == 2:
            raise JobCancelled("someone asked for it")

    asked = asking_case(case)
    models = wide(asked.task.name)
    before = make_latents(asked, models, quietly)
    with pytest.raises(JobCancelled):
        make_latents(asked, models, cancel)
    assert torch.equal(before.latents, make_latents(asked, models, quietly).latents)


@pytest.mark.parametrize("case", ["text and both ends", "image", "i2v", "flf2v", "vace and a start"])
def test_offloaded_models_make_the_same_and_leave_the_device(case, wide, wide_dirs, asking_case):
    asked = asking_case(case)
    task = asked.task
    wanted = sample(asked, wide(task.name), quietly)
    models = load_models(wide_dirs / KINDS[task.name], task, device=DEVICE, dtype=HALF, offload=True)
    for _ in range(2):
        made = sample(asked, attrs.evolve(models, texts=OrderedDict(), stills=OrderedDict()), quietly)
        print(f"{case}: {relative(made.latents, wanted.latents):.6f} of the latents")
        assert relative(made.latents, wanted.latents) < 1e-2
        assert np.abs(made.frames.astype(float) - wanted.frames).mean() < 1
        assert made.facts == wanted.facts
        assert places(models) == {"cpu"}


@pytest.mark.parametrize("case", ["text and both ends", "image", "vace and a start", "i2v"])
def test_weights_that_left_and_came_back_make_the_same(case, wide_dirs, asking_case):
    asked = asking_case(case)
    task = asked.task
    cache = ModelCache()
    loaded = cache.get(
        "wan",
        lambda: load_models(wide_dirs / KINDS[task.name], task, device=DEVICE, dtype=HALF),
        parts=lambda models: models.parts,
        on_leave=lambda models, _part: models.predictor.forget_graphs(),
    )
    made = []
    for _ in range(3):
        models = attrs.evolve(loaded, residence=cache.residence("wan"), texts=OrderedDict(), stills=OrderedDict())
        made.append(sample(asked, models, quietly))
        assert cache.free_others()
        assert not cache.on_device
        assert places(loaded) == {"cpu"}
    for later in made[1:]:
        assert torch.equal(made[0].latents, later.latents)
        assert np.array_equal(made[0].frames, later.frames)
        assert later.facts == made[0].facts


def test_on_a_device_that_holds_one_part_they_take_turns(wide, wide_dirs, asking_case):
    asked = asking_case("text and a start")
    wanted = sample(asked, wide(asked.task.name), quietly)
    cache = ModelCache(1e-6)
    loaded = cache.get(
        "wan",
        lambda: load_models(wide_dirs / "t2v", asked.task, device=DEVICE, dtype=HALF),
        parts=lambda models: models.parts,
    )
    there = []
    made = sample(
        asked,
        attrs.evolve(loaded, residence=cache.residence("wan")),
        lambda step, total: there.append(set(cache.on_device)),
    )
    assert there == [{"wan (transformer)"}] * asked.sample_steps
    assert torch.equal(made.latents, wanted.latents)
    assert np.array_equal(made.frames, wanted.frames)


def places(models):
    return {tensor.device.type for part in models.parts.values() for tensor in (*part.parameters(), *part.buffers())}
