"""Several GPUs for one job: who does what, equal results, and ranks that die or stop."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from types import ModuleType

import psutil
import pytest
import torch
from ourvidz_wan.checkpoints import WanModels, load_models, load_transformer
from ourvidz_wan.config import WanSettings
from ourvidz_wan.doctor import gpu_findings
from ourvidz_wan.generate import main
from ourvidz_wan.parallel import ranks
from ourvidz_wan.parallel.plan import RankPlan, plan_ranks
from ourvidz_wan.parallel.ranks import Ranks, SharedPredictor
from ourvidz_wan.prediction import LocalPredictor
from ourvidz_wan.sampling import make_latents
from ourvidz_wan.tasks import TASKS

from ourvidz_core.doctor.gpus import Gpu, GpuReport
from ourvidz_core.engine.ranks import devices_of
from ourvidz_core.errors import EngineUnusable, GenerationError, JobCancelled, ModelUnavailable
from ourvidz_core.testing.ranks import outlive_lost_ranks
from ourvidz_core.wire.payloads import Payload

CPU = torch.device("cpu")
T2V = TASKS["t2v-1.3B"]
#: Four heads, for two ranks each; sides whose patches, four by seven, can be dealt out evenly.
HEADS = 4
VARIANT = 'name = "tiny-wan"\nsize_scale = 0.14\n'


@pytest.mark.parametrize(
    ("gpus", "guidance", "context"),
    [(1, 1, 1), (2, 2, 1), (3, 1, 3), (4, 2, 2), (5, 2, 2), (6, 2, 3), (7, 2, 3), (8, 2, 4), (12, 2, 6), (13, 2, 6)],
)
def test_most_gpus_are_used_and_the_prompts_are_shared_out_first(gpus: int, guidance: int, context: int) -> None:
    assert plan_ranks(gpus, heads=12) == RankPlan(offered=gpus, guidance=guidance, context=context)


@pytest.mark.parametrize("gpus", range(1, 20))
@pytest.mark.parametrize("heads", [2, 12, 40])
@pytest.mark.parametrize("branches", [1, 2])
def test_each_prediction_is_made_by_as_many_ranks_as_share_it(gpus: int, heads: int, branches: int) -> None:
    plan = plan_ranks(gpus, heads=heads)
    made = [branch for rank in range(plan.ranks) for branch in plan.branches_of(rank, branches)]
    assert {branch: made.count(branch) for branch in range(branches)} == dict.fromkeys(range(branches), plan.context)


def test_gpus_that_are_left_over_are_named() -> None:
    assert plan_ranks(5, heads=12).describe().startswith("5 GPUs, of which 4 are used")


@pytest.mark.parametrize(
    ("gpus", "seen", "expected"),
    [(1, 0, []), (2, 2, ["green"]), (2, 1, ["red"]), (5, 8, ["yellow"])],
    ids=["one", "as many as there are", "more than there are", "more than are used"],
)
def test_doctor_compares_the_setting_with_what_is_there(gpus: int, seen: int, expected: Sequence[str]) -> None:
    report = GpuReport(
        gpus=tuple(Gpu(index=index, name="X", free_gb=80.0, total_gb=80.0, capability="9.0") for index in range(seen))
    )
    assert [finding.level.value for finding in gpu_findings(WanSettings(gpus=gpus), lambda: report)] == expected


def test_more_gpus_than_are_there_are_refused_with_both_numbers() -> None:
    seen = torch.cuda.device_count()
    with pytest.raises(GenerationError, match=f"shall use 64 GPUs and this process sees {max(seen, 1)}"):
        devices_of(64, "cuda", variable="OURVIDZ_WAN_GPUS")


@pytest.fixture(scope="module")
def even_dir(tiny_wan: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of four heads."""
    directory = tmp_path_factory.mktemp("wan") / "even"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_wan, "HEADS", HEADS)
        tiny_wan.save(tiny_wan.make_pipeline("t2v"), directory)
    (directory / "variant.toml").write_text(VARIANT, "utf-8")
    return directory


@pytest.fixture(scope="class", params=[2, 4])
def spread(request: pytest.FixtureRequest, even_dir: Path) -> Iterator[WanModels]:
    """The model on several processes; the ranks end with the class."""
    models = load_models(even_dir, T2V, gpus=request.param)
    yield models
    ranks._world.close()


class TestSharedJobs:
    """What two and four processes make together."""

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "references", [(), ("first_frame", "last_frame"), ("image",)], ids=["text", "pins", "single"]
    )
    @pytest.mark.parametrize("guidance", [5.0, 1.0])
    def test_latents_are_those_of_one_process(self, spread, even_dir, asking, pictures, references, guidance) -> None:
        named = dict(zip(references, pictures.values(), strict=False))
        arguments = asking(ckpt_dir=even_dir, sample_guide_scale=guidance, **named)
        alone = make_latents(arguments, load_models(even_dir, T2V), lambda step, total: None)
        made = make_latents(arguments, spread, lambda step, total: None)
        assert torch.allclose(made.latents, alone.latents, rtol=1e-5, atol=1e-5)
        plan = spread.predictor.plan
        assert made.facts["gpus"] == (plan.ranks if guidance > 1 else plan.context)
        assert "gpus" not in alone.facts

    @pytest.mark.slow
    def test_the_fast_tier_leaves_out_the_same_steps_on_all(self, spread, even_dir, asking) -> None:
        arguments = asking(ckpt_dir=even_dir, sample_steps=12, tier="fast")
        alone = make_latents(arguments, load_models(even_dir, T2V), lambda step, total: None)
        steps: list[tuple[int, int]] = []
        made = make_latents(arguments, spread, lambda step, total: steps.append((step, total)))
        assert torch.allclose(made.latents, alone.latents, rtol=1e-5, atol=1e-5)
        assert made.facts["steps_computed"] == len(steps) == 8

    @pytest.mark.slow
    def test_a_job_that_is_cancelled_leaves_the_ranks_ready(self, spread, even_dir, asking) -> None:
        def cancel(step: int, total: int) -> None:
            if step == 2:
                raise JobCancelled("someone asked for it")

        arguments = asking(ckpt_dir=even_dir)
        before = make_latents(arguments, spread, lambda step, total: None)
        with pytest.raises(JobCancelled):
            make_latents(arguments, spread, cancel)
        after = make_latents(arguments, spread, lambda step, total: None)
        assert torch.equal(before.latents, after.latents)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sent", "said"), [(signal.SIGKILL, "died: signal SIGKILL"), (signal.SIGSTOP, "has not answered for 3 s")]
)
def test_a_rank_that_is_gone_becomes_an_error_that_is_tried_again(even_dir: Path, sent: int, said: str) -> None:
    transformer = load_transformer(even_dir, T2V, device=CPU, dtype=torch.float32)
    world = Ranks(2, CPU, silent_seconds=3.0)
    (follower,) = map(psutil.Process, world._followers.pids)
    plan = RankPlan(offered=2, guidance=2, context=1)
    try:
        shared = world.share(transformer, LocalPredictor(transformer, CPU), even_dir, T2V, plan)
        with pytest.raises(EngineUnusable, match=said) as raised:
            _predict_until(shared, lambda step: os.kill(follower.pid, sent) if step == 1 else None)
    finally:
        world.close()
    assert raised.value.is_transient
    assert "rank 1" in raised.value.message
    assert not follower.is_running()


@pytest.mark.slow
def test_a_rank_that_cannot_load_says_which_and_why(even_dir: Path, tmp_path: Path) -> None:
    transformer = load_transformer(even_dir, T2V, device=CPU, dtype=torch.float32)
    world = Ranks(2, CPU)
    plan = RankPlan(offered=2, guidance=2, context=1)
    with pytest.raises(ModelUnavailable, match=r"rank 1 .* failed: ModelUnavailable: the transformer of t2v-1.3B in"):
        world.share(transformer, LocalPredictor(transformer, CPU), tmp_path / "nothing", T2V, plan)
    assert world.is_closed


@pytest.mark.slow
def test_the_command_line_uses_several_and_leaves_no_process(even_dir: Path, tmp_path: Path) -> None:
    """In a process of its own, as nobody closes the ranks there but the end."""
    import subprocess
    import sys

    options = ["--task=t2v-1.3B", f"--ckpt_dir={even_dir}", "--prompt=a", "--frame_num=9", "--sample_steps=2"]
    options += ["--base_seed=3", "--device=cpu"]
    assert main([*options, f"--save_file={tmp_path / 'alone.mp4'}"]) == 0
    program = [sys.executable, "-m", "ourvidz_wan.generate", *options, "--gpus=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OURVIDZ_TEST_MARK": str(tmp_path)}
    done = subprocess.run(
        [*program, f"--save_file={tmp_path / 'shared.mp4'}"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    from ourvidz_wan.video import read_facts, read_video

    assert (read_video(tmp_path / "alone.mp4") == read_video(tmp_path / "shared.mp4")).all()
    assert read_facts(tmp_path / "shared.mp4")["gpus"] == "2"
    assert not _marked(str(tmp_path))


@pytest.mark.slow
def test_an_engine_that_lost_a_rank_is_replaced_with_all_its_ranks(even_dir: Path, tmp_path: Path) -> None:
    config = {"sample_steps": 6, "frame_num": 9, "seed": 1}
    finished = outlive_lost_ranks(
        Payload(id="job-1", type="video_fast", prompt="a cat", user_id="user-1", config=config),
        {
            "OURVIDZ_WAN_CKPT_DIR": str(even_dir),
            "OURVIDZ_WAN_GPUS": "2",
            "OURVIDZ_DEVICE": "cpu",
            "OMP_NUM_THREADS": "1",
        },
        module="ourvidz_wan.parallel.follower",
        work_dir=tmp_path,
    )
    assert finished.generation.facts["gpus"] == 2


def _predict_until(shared: SharedPredictor, before: object) -> None:
    torch.manual_seed(0)
    noise, timestep = torch.randn(1, 16, 3, 8, 10), torch.tensor([500])
    branches = [{"encoder_hidden_states": torch.randn(1, 512, 32)} for _ in range(2)]
    with torch.no_grad(), shared.job(branches) as predict:
        for step in count():
            before(step)
            predict(noise, timestep)


def _marked(mark: str) -> set[int]:
    from ourvidz_core.engine.processes import _marked

    return _marked("OURVIDZ_TEST_MARK", mark)
