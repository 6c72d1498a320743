"""The page on scale shows what ``benchmarks/scale.py`` last measured, and the benchmark sees what is wrong."""

from __future__ import annotations

import json

import attrs
import pytest

from benchmarks import scale

RESULT = json.loads(scale.RESULT.read_text("utf-8"))


def size(workers: int, **changes: float) -> scale.Size:
    figures = {field.name: 1 for field in attrs.fields(scale.Size)}
    return scale.Size(**{**figures, "machine_share": 0.5, **changes, "workers": workers})


def result(*sizes: scale.Size, **ended: int) -> scale.Result:
    figures = {field.name: 0 for field in attrs.fields(scale.Soak)}
    soak = scale.Soak(**{**figures, "jobs": 10, "completed": 10, "kills": 1, **ended})
    sizes = sizes or (size(1), size(100))
    return scale.Result(job_seconds=0.5, cores=2, python="3", redis="7", sizes=sizes, soak=soak)


def test_the_page_shows_the_last_result() -> None:
    page = scale.PAGE.read_text("utf-8")
    assert scale.with_tables(page, RESULT) == page
    assert [size["workers"] for size in RESULT["sizes"]] == [1, 10, 50, 100]
    assert RESULT["soak"]["jobs"] == 100_000
    assert RESULT["soak"]["lost"] + RESULT["soak"]["two_outcomes"] + RESULT["soak"]["unexplained_runs"] == 0


def test_another_result_changes_the_tables_and_nothing_else() -> None:
    page = scale.PAGE.read_text("utf-8")
    other = json.loads(json.dumps(RESULT))
    other["soak"]["kills"] += 1
    changed = scale.with_tables(page, other)
    lines = [(old, new) for old, new in zip(page.splitlines(), changed.splitlines(), strict=True) if old != new]
    assert [old.split("|")[1].strip() for old, _ in lines] == ["processes killed, workers in them"]
    assert scale.with_tables(changed, RESULT) == page


@pytest.mark.parametrize(
    ("measured", "wrong"),
    [
        (result(), None),
        (result(size(1), size(100, round_trips=2)), "round_trips of a job: 2.00 with 100 workers, 1.00 with"),
        (result(size(1), size(100, redis_ms=2)), "redis_ms of a job"),
        (result(size(1), size(100, jobs_a_second_a_worker=0.5)), "a worker does 0.50 jobs/s among 100"),
        (result(size(1), size(100, jobs_a_second_a_worker=0.5, machine_share=0.99)), None),
        (result(lost=1), "did not hold"),
        (result(two_outcomes=1), "did not hold"),
        (result(unexplained_runs=1), "did not hold"),
        (result(repeated_runs=5, repeated_callbacks=2), None),
        (result(completed=9), "did not hold"),
        (result(left_in_the_books=1), "did not hold"),
        (result(kills=0), "did not hold"),
    ],
)
def test_what_grows_and_what_is_lost_is_a_miss(measured: scale.Result, wrong: str | None) -> None:
    misses = measured.misses
    assert len(misses) == (wrong is not None)
    assert all(wrong in miss for miss in misses if wrong)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_few_workers_lose_nothing_when_their_processes_are_killed() -> None:
    with scale.Fleet.on_new_redis(0.1) as fleet:
        ended = scale.soak(fleet, 10, 1000)
    assert ended.is_met, ended
    assert ended.interrupted >= ended.repeated_runs
