"""What operations take is measured once, outlives the engine, and a broken file costs nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from attrs import evolve
from hypothesis import given, settings
from hypothesis import strategies as st

from ourvidz_core.engine.working_memory import KEPT_RECORDS, SLACK, Figures, WorkingMemory
from ourvidz_core.plugins.residency import Work

DENOISE = Work(name="denoise", shape=(1024, 1024), rows=4)
MIB = 2**20


def test_what_was_never_measured_is_not_known() -> None:
    memory = WorkingMemory()
    memory.note("sdxl", DENOISE, 400 * MIB)

    assert memory.figures("wan", DENOISE) is None
    assert memory.figures("sdxl", evolve(DENOISE, name="decode")) is None
    assert memory.figures("sdxl", evolve(DENOISE, shape=(4096, 4096))) is None, "too far away to be guessed"


def test_an_operation_has_the_figure_it_would_like_and_the_one_it_can_be_cut_down_to() -> None:
    memory = WorkingMemory()
    memory.note("sdxl", DENOISE, 400 * MIB)
    memory.note("sdxl", evolve(DENOISE, rows=1), 150 * MIB)

    figures = memory.figures("sdxl", DENOISE)

    assert figures == Figures(wanted=round(400 * MIB * SLACK), least=round(150 * MIB * SLACK))


@pytest.mark.parametrize(
    ("asked", "share"),
    [
        pytest.param(evolve(DENOISE, rows=2), 0.5, id="half the rows"),
        pytest.param(evolve(DENOISE, shape=(1024, 2048)), 2.0, id="twice the picture"),
    ],
)
def test_an_operation_that_was_not_measured_grows_from_the_nearest_one(asked: Work, share: float) -> None:
    memory = WorkingMemory()
    memory.note("sdxl", DENOISE, 400 * MIB)
    memory.note("sdxl", evolve(DENOISE, rows=400), MIB)

    figures = memory.figures("sdxl", asked)

    assert figures is not None
    assert figures.wanted == round(400 * MIB * SLACK * share)


def test_more_counts_at_once_and_less_by_half() -> None:
    memory = WorkingMemory()
    for peak, expected in ((100, 100), (300, 300), (100, 200), (100, 150), (400, 400)):
        memory.note("sdxl", DENOISE, peak * MIB)
        figures = memory.figures("sdxl", DENOISE)
        assert figures is not None
        assert figures.wanted == round(expected * MIB * SLACK)


def test_a_restart_knows_it_all(tmp_path: Path) -> None:
    file = tmp_path / "state" / "memory.json"
    before = WorkingMemory(file, device=lambda: "a card")
    before.note("sdxl", DENOISE, 400 * MIB)
    before.note_weights("sdxl", 7000 * MIB)

    after = WorkingMemory(file, device=lambda: "a card")

    assert after.figures("sdxl", DENOISE) == before.figures("sdxl", DENOISE)
    assert after.weights_of("sdxl") == 7000 * MIB
    assert WorkingMemory(file, device=lambda: "another card").figures("sdxl", DENOISE) is None


def test_two_engines_share_one_file(tmp_path: Path) -> None:
    file = tmp_path / "memory.json"
    one, two = WorkingMemory(file), WorkingMemory(file)
    assert one.weights_of("b") is two.weights_of("a") is None

    one.note_weights("a", 1 * MIB)
    two.note_weights("b", 2 * MIB)

    after = WorkingMemory(file)
    assert (after.weights_of("a"), after.weights_of("b")) == (1 * MIB, 2 * MIB)


broken = st.one_of(
    st.binary(),
    st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists).map(
        lambda value: json.dumps(value).encode()
    ),
    st.fixed_dictionaries(
        {
            "device": st.just(""),
            "model": st.just("sdxl"),
            "name": st.text(),
            "shape": st.none() | st.lists(st.integers()),
        },
        optional={"rows": st.integers(-1, 1), "peak_bytes": st.integers()},
    ).map(lambda record: json.dumps([record]).encode()),
)


@settings(max_examples=50, deadline=None)
@given(content=broken)
def test_a_broken_file_is_no_error_and_is_written_anew(
    content: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("state") / "memory.json"
    file.write_bytes(content)
    memory = WorkingMemory(file)

    memory.figures("sdxl", DENOISE)
    memory.note("sdxl", DENOISE, 400 * MIB)

    assert WorkingMemory(file).figures("sdxl", DENOISE) == memory.figures("sdxl", DENOISE)


def test_a_directory_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    memory = WorkingMemory(tmp_path / "file" / "memory.json")

    memory.note_weights("sdxl", 10 * MIB)

    assert memory.weights_of("sdxl") == 10 * MIB


def test_a_write_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "memory.json").mkdir()

    WorkingMemory(tmp_path / "memory.json").note_weights("sdxl", 10 * MIB)

    assert [path.name for path in tmp_path.iterdir()] == ["memory.json"]


def test_the_oldest_records_leave() -> None:
    memory = WorkingMemory()
    for number in range(KEPT_RECORDS + 1):
        memory.note_weights(f"{number}", MIB)

    assert memory.weights_of("0") is None
    assert memory.weights_of("1") == MIB
