"""What ``ourvidz up`` says of itself in a file, for ``ourvidz status`` to read; and the lock that says it lives."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from attrs import field, frozen
from cattrs.preconf.json import make_converter

from ourvidz_core.errors import PayloadError, SettingsError
from ourvidz_core.orchestrator.slots import SlotState
from ourvidz_core.wire.payloads import structure

logger = logging.getLogger(__name__)

_converter = make_converter()
_LOCK_TRIES = 10
_LOCK_SECONDS = 0.05


@frozen(kw_only=True)
class WorkerReport:
    """One worker, as the orchestrator sees it. Times are seconds since the epoch."""

    name: str
    #: What it is called in the queue's books and on the board.
    worker_name: str
    state: SlotState
    since: float
    pid: int | None = None
    queues: tuple[str, ...] = ()
    gpus: tuple[str, ...] = ()
    #: Its share of the device memory; None where none was measured.
    memory_gb: float | None = None
    restarts: int = 0
    #: When the next process is due; None where there is one.
    next_start_at: float | None = None
    is_looping: bool = False
    #: Ends in a row that nobody asked for, and when the first of them was.
    failures: int = 0
    failing_since: float | None = None
    #: How the last process ended that nobody had told to, in words, and when.
    last_ending: str | None = None
    last_ended_at: float | None = None
    last_lines: tuple[str, ...] = ()
    #: Queues and job types that it leaves to others, and why.
    left_out: Mapping[str, str] = field(factory=dict)


@frozen(kw_only=True)
class OrchestratorReport:
    """All workers of one ``ourvidz up``."""

    pid: int
    host: str
    started_at: float
    updated_at: float
    is_ending: bool = False
    #: The worker that a rolling restart replaces now.
    rolling: str | None = None
    workers: tuple[WorkerReport, ...] = ()


class ReportFile:
    """The file, held by one orchestrator at a time.

    :raises SettingsError: another one holds it.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._path = directory / "status.json"
        self._is_stale = False
        self._lock = (directory / "lock").open("w")
        if not _is_locked_soon(self._lock):
            self._lock.close()
            raise SettingsError(
                f"another ourvidz up runs with the state directory {directory.parent}; ourvidz status shows it."
                " Set another OURVIDZ_STATE_DIR to run two"
            ) from None

    def write(self, report: OrchestratorReport) -> None:
        """Replace what the file says. A full disk must not end the workers, so a failure is only logged, once."""
        temporary = self._path.with_suffix(".new")  # whoever holds the lock is the only one who writes
        try:
            temporary.write_text(json.dumps(_converter.unstructure(report)), "utf-8")
            os.replace(temporary, self._path)
            self._is_stale = False
        except OSError as error:
            if not self._is_stale:
                logger.warning("ourvidz status shows what was: %s cannot be written (%s)", self._path, error.strerror)
            self._is_stale = True

    def close(self) -> None:
        """Leave the file as the last word, and let another orchestrator have it."""
        self._lock.close()


def _is_locked_soon(file: IO[str]) -> bool:
    """Whether the lock can be had. Whoever reads the report holds it for an instant, too."""
    for _ in range(_LOCK_TRIES):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_LOCK_SECONDS)
        else:
            return True
    return False


def read_report(directory: Path) -> tuple[OrchestratorReport | None, bool]:
    """What the file says, and whether its orchestrator lives."""
    try:
        report = structure(json.loads((directory / "status.json").read_bytes()), OrchestratorReport)
        with (directory / "lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return report, True
    except (OSError, ValueError, PayloadError):
        return None, False
    return report, False
