"""The GPU's benchmark: a row that fails or hangs takes no other with it, and its table says what was measured."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import attrs
import pytest

from benchmarks.gpu import __main__ as benchmark
from benchmarks.gpu import models, report
from benchmarks.gpu.measure import measure
from benchmarks.gpu.rows import BY_NAME, ROWS, Measured, Outcome, Skipped, choose
from benchmarks.gpu.service import RunningWorker
from ourvidz_core.testing.servers import ReceivedRequest


def measured(row: str, ours: float, **others: float) -> Outcome:
    return Outcome(row=row, status="measured", measured=Measured(ours=ours, **others))


def test_the_floors_are_those_that_were_worked_out_for_an_h200() -> None:
    floors = {row.name: round(row.floor, 2) for row in ROWS if row.floor is not None and row.unit == "s"}
    assert floors == {
        "wan81": 18.37,
        "wan1": 0.29,
        "wan81_50": 36.38,
        "sdxl1": 0.44,
        "sdxl6": 2.64,
        "qwen150": 0.51,
    }


def test_rows_are_chosen_by_name_and_measured_in_the_table_s_order() -> None:
    assert [row.name for row in choose("sdxl1, wan81")] == ["wan81", "sdxl1"]
    assert choose(None) == list(ROWS)
    with pytest.raises(ValueError, match="no row is called wan80"):
        choose("wan81,wan80")


@pytest.mark.parametrize(
    ("outcome", "is_met"),
    [
        (measured("wan81", 24.0, alternative=34.0), True),
        (measured("wan81", 24.0, alternative=30.0), False),  # fast enough, but not by the ratio
        (measured("wan81", 26.0, alternative=40.0), False),
        (measured("mixed30", 96.0), True),
        (measured("mixed30", 94.0), False),
        (measured("wan_exact", 1e-3), True),
        (Outcome(row="wan81", status="failed"), None),
    ],
)
def test_a_target_is_met_by_time_and_ratio_and_in_its_own_direction(outcome: Outcome, is_met: bool | None) -> None:
    assert outcome.is_met is is_met


def test_the_table_shows_what_was_measured_and_why_the_rest_was_not(tmp_path: Path) -> None:
    outcomes = [
        measured("wan81", 24.0, alternative=34.0, peak=21.5, alternative_peak=30.0),
        Outcome(row="gpus2", status="skipped", reason="this machine has 1 GPUs"),
    ]
    shown = report.as_table(outcomes)
    cells = re.split(r" {2,}", shown.splitlines()[1])
    assert cells[2:] == ["24 s", "34 s diffusers", "1.42x", "25 s and 1.35x", "18.4 s", "21.5 / 30.0", "yes"]
    assert "gpus2: skipped: this machine has 1 GPUs" in shown

    report.write(tmp_path / "gpu.json", outcomes, {"gpus": ["H200"]})
    written = json.loads((tmp_path / "gpu.json").read_text("utf-8"))
    first, second = written["rows"]
    assert first["ratio"] == pytest.approx(34 / 24)
    assert (first["is_met"], first["measured"]["peak"], first["target_ratio"]) == (True, 21.5, 1.35)
    assert (second["is_met"], second["measured"]) == (None, None)


def test_a_start_is_shown_with_what_happened_when() -> None:
    facts = {"cold_seconds": 33.84, "timeline": [(0.7, "engine 7 starts"), (12.345, "importing torch")]}
    shown = report.note_of(Outcome(row="start", status="measured", measured=Measured(ours=31.0, facts=facts)))
    assert shown.splitlines() == [
        "start: cold_seconds 33.8, timeline ",
        "        0.70 s  engine 7 starts",
        "       12.35 s  importing torch",
    ]


def test_a_worker_s_timeline_ends_with_the_job_and_has_its_log_and_what_others_heard(tmp_path: Path) -> None:
    began = datetime(2026, 11, 22, 17, 0, 0)
    log = tmp_path / "worker.log"
    log.write_text(
        "2026-11-22 17:00:01,250 INFO ourvidz_core.engine.host: engine 7 starts\n"
        "Traceback of somebody\n"
        "2026-11-22 17:00:09,000 INFO ourvidz_core.worker.worker: after the job\n"
    )
    body = json.dumps({"job_id": "job-1", "status": "completed"}).encode()
    callback = ReceivedRequest(
        method="POST", target="/callback?x=1", headers={}, body=body, received_at=began.timestamp() + 2
    )
    supabase = SimpleNamespace(requests=[callback], callbacks=[callback])
    worker = RunningWorker(queue="q", client=None, supabase=supabase, environ={}, log=log)
    assert worker.timeline(began.timestamp()) == [
        (pytest.approx(1.25), "engine 7 starts"),
        (pytest.approx(2.0), "POST /callback"),
    ]


def test_the_tables_of_runs_beside_one_another_are_joined_in_order_and_measured_rows_win(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, joined = (tmp_path / name for name in ("first.json", "second.json", "joined.json"))
    report.write(first, [measured("sdxl1", 0.7), Outcome(row="gpus2", status="skipped", reason="1 GPU")], {"cores": 2})
    report.write(second, [measured("wan81", 24.0, alternative=34.0), measured("gpus2", 1.92)], {"cores": 3})

    missing = tmp_path / "missing.json"
    assert benchmark.main(["--join", str(first), str(second), str(missing), f"--json={joined}", "--markdown"]) == 0
    shown = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert shown[2:] == ["wan81", "sdxl1", "gpus2"]
    written = json.loads(joined.read_text("utf-8"))
    assert written["machine"] == {"cores": 2}
    assert [row["measured"]["ours"] for row in written["rows"]] == [24.0, 0.7, 1.92]


def test_models_that_two_runs_need_are_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []

    def write(directory: Path) -> None:
        written.append(directory)
        (directory / "model").touch()

    monkeypatch.setattr(models, "_small_wan", write)
    both = [models.Models(directory=tmp_path / "models", is_small=True) for _ in range(2)]
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(models.Models.wan, both))
    assert found == [tmp_path / "models" / "wan-small"] * 2
    assert written == found[:1]
    assert (found[0] / "model").exists()


def test_a_row_that_takes_too_long_is_given_up_and_the_next_begins(tmp_path: Path) -> None:
    rows = [attrs.evolve(BY_NAME[name], limit=0.05) for name in ("start", "mixed30", "qwen150")]
    outcomes: list[Outcome] = []
    benchmark.run(rows, models=tmp_path, is_small=True, work=tmp_path, on_outcome=outcomes.append)
    assert [outcome.row for outcome in outcomes] == ["start", "mixed30", "qwen150"]
    assert {(outcome.status, outcome.reason) for outcome in outcomes} == {("failed", "not done within 0 s")}


def test_a_row_that_fails_is_told_with_its_reason_and_the_next_is_measured() -> None:
    class Group:
        def measure(self, row: str) -> Measured:
            if row == "wan81":
                raise RuntimeError("CUDA error: out of luck")
            if row == "wan1":
                raise Skipped("not today")
            return Measured(ours=1.0)

    said: list[dict[str, object]] = []
    measure(Group, ["wan81", "wan1", "wan81_50"], said.append)
    outcomes = [line for line in said if "row" in line]
    assert [(line["row"], line["status"]) for line in outcomes] == [
        ("wan81", "failed"),
        ("wan1", "skipped"),
        ("wan81_50", "measured"),
    ]
    assert "out of luck" in str(outcomes[0]["reason"])


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_every_row_can_be_measured_with_tiny_models(tmp_path: Path) -> None:
    assert benchmark.main(["--small", f"--models={tmp_path}", f"--json={tmp_path / 'gpu.json'}"]) == 0

    rows = {row["row"]: row for row in json.loads((tmp_path / "gpu.json").read_text("utf-8"))["rows"]}
    assert list(rows) == list(BY_NAME)
    assert {row["status"] for row in rows.values()} == {"measured"}
    for name in ("wan81", "wan1", "sdxl1", "sdxl6", "qwen150"):
        assert rows[name]["measured"]["alternative"] > 0
    for name in ("wan_exact", "sdxl_exact", "exact_small"):
        assert rows[name]["measured"]["ours"] < 1e-4
    assert rows["mixed30"]["measured"]["ours"] > 0
