"""Puts the newest preview of the job that has the engine on the board."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable
from pathlib import Path

import attrs
from attrs import frozen

from ourvidz_core.delivery.board import PREVIEW_SECONDS, Board, RunningJob
from ourvidz_core.wire.previews import PREVIEW_BYTES, PREVIEW_FILE, is_preview


@frozen
class _Told:
    """What the board has: of which job, the file's time, and when it was told."""

    job_id: str = ""
    written_at: float = 0.0
    told_at: float = float("-inf")


class PreviewTeller:
    """Looks for a preview whenever it is asked to. One thread tells; any may mark."""

    def __init__(self, board: Board, working_on: Callable[[], tuple[str, Path] | None]) -> None:
        self._board = board
        self._working_on = working_on
        self._told = _Told()

    def tell(self) -> None:
        """Put the preview on the board where it is another one, or would soon be forgotten there."""
        current = self._working_on()
        if current is None:
            return
        job_id, work_dir = current
        found = read_preview(work_dir)
        if found is None:
            return
        content, written_at = found
        told, now = self._told, time.monotonic()
        if (told.job_id, told.written_at) == (job_id, written_at) and now - told.told_at < PREVIEW_SECONDS / 3:
            return
        self._board.show_preview(job_id, content)
        self._told = _Told(job_id, written_at, now)

    def mark(self, jobs: tuple[RunningJob, ...]) -> tuple[RunningJob, ...]:
        """``jobs``, with the time of its preview where the board has one."""
        told = self._told
        return tuple(attrs.evolve(job, previewed_at=told.written_at) if job.id == told.job_id else job for job in jobs)


def read_preview(work_dir: Path) -> tuple[bytes, float] | None:
    """The bytes of the preview there and when it was written; None where there is none that may be shown.

    The engine wrote it and is not believed: a plain file, not a link, of a few bytes that begin like a JPEG.
    """
    try:
        descriptor = os.open(work_dir / PREVIEW_FILE, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            facts = os.fstat(file.fileno())
            content = file.read(PREVIEW_BYTES + 1) if stat.S_ISREG(facts.st_mode) else b""
    except OSError:
        return None
    return (content, facts.st_mtime) if is_preview(content) else None
