"""Which workers there are, and how they share a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ourvidz_core.doctor.gpus import Gpu, GpuReport
from ourvidz_core.errors import SettingsError
from ourvidz_core.orchestrator.plan import (
    PlannedWorker,
    plan_workers,
    share_memory,
    tables_from_flags,
    tables_of,
)
from ourvidz_core.settings import engine_environment, load, load_worker_tables
from ourvidz_core.wire.job_types import JobType

QUEUES = ("sdxl_queue", "wan_queue")
JOB_TYPES = (
    JobType(name="image", queue="sdxl_queue", content_type="image", vram_gb=12),
    JobType(name="video", queue="wan_queue", content_type="video", vram_gb=24),
)


def planned(
    *, workers: int | None = None, gpus: tuple[int, ...] = (), per_queue: bool = False, gpus_per_worker: int = 1
) -> list[PlannedWorker]:
    tables = tables_from_flags(QUEUES, workers=workers, gpus=gpus, per_queue=per_queue, gpus_per_worker=gpus_per_worker)
    return plan_workers(tables, QUEUES, environ={}, host="h")


def report(*free_gb: float) -> GpuReport:
    return GpuReport(
        gpus=tuple(
            Gpu(index=index, name="X", free_gb=free, total_gb=80.0, capability="9.0")
            for index, free in enumerate(free_gb)
        )
    )


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, {"worker": (QUEUES, "")}),
        ({"per_queue": True}, {"sdxl_queue": (QUEUES[:1], ""), "wan_queue": (QUEUES[1:], "")}),
        ({"gpus": (0, 1)}, {"worker-gpu0": (QUEUES, "0"), "worker-gpu1": (QUEUES, "1")}),
        ({"workers": 2}, {"worker-1": (QUEUES, ""), "worker-2": (QUEUES, "")}),
        (
            {"workers": 3, "gpus": (0, 1)},
            {"worker-gpu0-1": (QUEUES, "0"), "worker-gpu1-1": (QUEUES, "1"), "worker-gpu0-2": (QUEUES, "0")},
        ),
        (
            {"gpus": (0, 1, 2, 3), "gpus_per_worker": 2},
            {"worker-gpu0-1": (QUEUES, "0,1"), "worker-gpu2-3": (QUEUES, "2,3")},
        ),
    ],
    ids=[
        "one engine for both queues",
        "a worker a queue",
        "a worker a GPU",
        "two",
        "three on two GPUs",
        "two GPUs each",
    ],
)
def test_flags_say_which_workers_there_are(flags: dict, expected: dict) -> None:
    made = {
        worker.name: (worker.queues, worker.environment.get("CUDA_VISIBLE_DEVICES", "")) for worker in planned(**flags)
    }
    assert made == expected


def test_gpus_that_cannot_be_dealt_out_evenly_are_refused() -> None:
    with pytest.raises(SettingsError, match="3 GPUs cannot be dealt out in groups of 2"):
        planned(gpus=(0, 1, 2), gpus_per_worker=2)


def test_tables_of_the_settings_file_say_it_too_and_no_process_takes_them_for_settings(tmp_path: Path) -> None:
    file = tmp_path / "ourvidz.toml"
    file.write_text(
        """
        [ourvidz]
        lease_seconds = 7
        [[ourvidz.workers]]
        name = "images"
        queues = ["sdxl_queue"]
        gpus = [1]
        environment = { OURVIDZ_LOG_LEVEL = "debug", ACME_TOKEN = "its-own-secret" }
        [[ourvidz.workers]]
        name = "videos"
        """
    )
    environ = {"OURVIDZ_SETTINGS": str(file)}
    images, videos = plan_workers(tables_of(load_worker_tables(environ)), QUEUES, environ=environ, host="h")
    assert (images.queues, images.gpus, images.arguments) == (
        ("sdxl_queue",),
        ("1",),
        ("worker", "--queues=sdxl_queue"),
    )
    assert images.environment["OURVIDZ_LOG_LEVEL"] == "debug"
    assert images.environment["OURVIDZ_WORKER_NAME"] == "h-images"
    assert (videos.queues, videos.gpus) == (QUEUES, ())
    settings = load(environ)
    assert settings.lease_seconds == 7
    assert "its-own-secret" not in str(engine_environment(settings, environ))


def test_the_tables_of_the_documentation_are_a_plan(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs/how-to/orchestrate.md").read_text("utf-8")
    file = tmp_path / "settings.toml"
    file.write_text(page.partition("```toml\n")[2].partition("```")[0])
    environ = {"OURVIDZ_SETTINGS": str(file)}
    workers = plan_workers(tables_of(load_worker_tables(environ)), QUEUES, environ=environ, host="h")
    assert [(worker.name, worker.queues, worker.gpus) for worker in workers] == [
        ("images", ("sdxl_queue",), ("0",)),
        ("videos", ("wan_queue",), ("1",)),
    ]
    assert load(environ).redis_address == "rediss://default:PASSWORD@HOST:6379"


@pytest.mark.parametrize(
    ("tables", "said"),
    [
        ([{"queues": ["wan_queue"]}], "name"),
        ([{"name": "a", "gpu": [0]}], "gpu; it may have name, queues, gpus, environment"),
        ([{"name": "a"}, {"name": "a"}], "two workers are called a"),
        ([{"name": "a", "queues": ["wan_qeue"]}], "wan_qeue; the queues are sdxl_queue, wan_queue"),
        ([{"name": "a", "environment": {"A=B": "x"}}], "number 1 has 'A=B' in its environment"),
        ([{"name": "a", "environment": {"A": "x\0"}}], "number 1 has 'A' in its environment"),
        ([{"name": "a/b"}], "'a/b' cannot be a worker's name"),
        ([{"name": "a", "gpus": [2]}], "GPU 2 is not among CUDA_VISIBLE_DEVICES=4,5"),
    ],
)
def test_a_wrong_table_says_what_is_wrong(tables: list[dict], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        plan_workers(tables_of(tables), QUEUES, environ={"CUDA_VISIBLE_DEVICES": "4,5"}, host="h")


@pytest.mark.parametrize(
    ("first", "expected"),
    [
        ("127.0.0.1:9464", ["127.0.0.1:9464", "127.0.0.1:9465"]),
        ("127.0.0.1:0", ["127.0.0.1:0"] * 2),
        ("off", ["off"] * 2),
    ],
)
def test_each_worker_says_how_it_is_at_a_port_of_its_own(first: str, expected: list[str]) -> None:
    tables = tables_from_flags(QUEUES, workers=2, gpus=[], per_queue=False)
    workers = plan_workers(tables, QUEUES, environ={}, health_address=first, host="h")
    assert [worker.environment["OURVIDZ_HEALTH_ADDRESS"] for worker in workers] == expected


def test_orchestrators_that_share_a_machine_can_name_their_workers_apart() -> None:
    tables = tables_from_flags(QUEUES, workers=2, gpus=[], per_queue=False)
    workers = plan_workers(tables, QUEUES, environ={"OURVIDZ_WORKER_NAME": "second"})
    assert [worker.environment["OURVIDZ_WORKER_NAME"] for worker in workers] == ["second-worker-1", "second-worker-2"]


def test_numbers_of_gpus_count_what_the_orchestrator_sees() -> None:
    (worker,) = plan_workers(
        tables_of([{"name": "a", "gpus": [1]}]), QUEUES, environ={"CUDA_VISIBLE_DEVICES": "4,5"}, host="h"
    )
    assert worker.environment["CUDA_VISIBLE_DEVICES"] == "5"


def test_workers_that_share_a_gpu_share_what_is_free_on_it() -> None:
    images, videos = share_memory(planned(per_queue=True), report(46.0), JOB_TYPES, device="auto", is_checked=True)
    assert (images.memory_gb, videos.memory_gb) == (17.0, 29.0)  # what each needs, and half of the 10 that are left
    assert images.environment["OURVIDZ_VRAM_BUDGET_GB"] == "15.3"


def test_workers_that_do_not_fit_are_refused_with_the_figures_and_the_cure() -> None:
    with pytest.raises(SettingsError, match=r"GPU 0 has 30\.0 GiB free and its workers need 36 .*--no-checks"):
        share_memory(planned(per_queue=True), report(30.0), JOB_TYPES, device="auto", is_checked=True)
    shared = share_memory(planned(per_queue=True), report(30.0), JOB_TYPES, device="auto", is_checked=False)
    assert len(shared) == 2


def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(SettingsError, match="worker-gpu0 shall have a GPU, and there is none here: torch finds none"):
        share_memory(
            planned(gpus=(0,)), GpuReport(trouble="torch finds none"), JOB_TYPES, device="auto", is_checked=True
        )
    with pytest.raises(SettingsError, match="no GPU 3 here; there are 0, 1"):
        share_memory(planned(gpus=(0, 3)), report(40.0, 40.0), JOB_TYPES, device="auto", is_checked=True)


@given(free=st.lists(st.floats(0.0, 200.0), min_size=1, max_size=4), workers=st.integers(1, 9))
def test_shares_never_add_up_to_more_than_is_free(free: list[float], workers: int) -> None:
    plan = planned(workers=workers, gpus=tuple(range(len(free))))
    try:
        shared = share_memory(plan, report(*free), JOB_TYPES, device="auto", is_checked=True)
    except SettingsError:
        return
    for index, free_gb in enumerate(free):
        shares = [worker.memory_gb or 0.0 for worker in shared if worker.gpus[0] == str(index)]
        assert sum(shares) <= free_gb + 0.05 * len(shares)  # each is rounded
        assert all(share >= 24 - 0.05 for share in shares)
