"""What the orchestrator leaves for others to read."""

from __future__ import annotations

import contextlib
import fcntl
import resource
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ourvidz_core.errors import SettingsError
from ourvidz_core.orchestrator.report import OrchestratorReport, ReportFile, read_report

REPORT = OrchestratorReport(pid=1, host="h", started_at=0.0, updated_at=0.0)


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """No file of this process can grow, as on a disk without room."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_without_room_is_said_once_and_nothing_piles_up_on_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    held = ReportFile(tmp_path)
    # No longer than this: the tests' own output may go to a file.
    with full_disk():
        for _ in range(3):
            held.write(REPORT)
    held.close()
    assert len(list(tmp_path.iterdir())) <= 2, "the lock and one file that was begun"
    assert caplog.text.count("ourvidz status shows what was") == 1


def test_one_who_reads_in_the_same_instant_keeps_no_orchestrator_from_starting(tmp_path: Path) -> None:
    ReportFile(tmp_path).close()
    with (tmp_path / "lock").open() as reader:
        fcntl.flock(reader, fcntl.LOCK_SH)
        timer = threading.Timer(0.1, fcntl.flock, [reader, fcntl.LOCK_UN])
        timer.start()
        held = ReportFile(tmp_path)
        timer.join()
    held.write(REPORT)
    assert read_report(tmp_path) == (REPORT, True)
    held.close()
    assert read_report(tmp_path) == (REPORT, False)


def test_a_second_orchestrator_is_refused_with_the_cure(tmp_path: Path) -> None:
    held = ReportFile(tmp_path)
    with pytest.raises(SettingsError, match="Set another OURVIDZ_STATE_DIR to run two"):
        ReportFile(tmp_path)
    held.close()
