"""From the work directory of the job that has the engine to the board; what the engine left is not believed."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from ourvidz_core.delivery.board import MemoryBoard, RunningJob
from ourvidz_core.observe.previews import PreviewTeller
from ourvidz_core.wire.previews import PREVIEW_BYTES

JPEG = b"\xff\xd8\xff\xe0 a picture"
JOBS = tuple(RunningJob(id=name, type="t", attempt=1, stage="denoise", claimed_at=1.0) for name in ("a", "b"))


class CountingBoard(MemoryBoard):
    """Counts what it is shown."""

    shown = 0

    def show_preview(self, job_id: str, content: bytes) -> None:
        self.shown += 1
        super().show_preview(job_id, content)


def test_each_preview_is_told_once_and_its_job_is_marked(tmp_path: Path) -> None:
    board = CountingBoard()
    teller = PreviewTeller(board, lambda: ("a", tmp_path))
    teller.tell()
    assert (board.preview("a"), teller.mark(JOBS)) == (None, JOBS)

    file = tmp_path / "preview.jpg"
    for number, content in enumerate((JPEG, JPEG + b" that has come further")):
        file.write_bytes(content)
        os.utime(file, (time.time(), 1000.0 + number))
        teller.tell()
        teller.tell()
        assert (board.preview("a"), board.shown) == (content, number + 1)
        assert [job.previewed_at for job in teller.mark(JOBS)] == [1000.0 + number, None]


@pytest.mark.parametrize("left", ["no picture", "too large", "a link", "a pipe", "a directory"])
def test_what_may_not_be_shown_is_not_told(tmp_path: Path, left: str) -> None:
    file = tmp_path / "preview.jpg"
    match left:
        case "no picture":
            file.write_bytes(b"<script>")
        case "too large":
            file.write_bytes(JPEG.ljust(PREVIEW_BYTES + 1))
        case "a link":
            (tmp_path / "other.jpg").write_bytes(JPEG)
            file.symlink_to(tmp_path / "other.jpg")
        case "a pipe":
            os.mkfifo(file)
        case "a directory":
            file.mkdir()
    board = CountingBoard()
    PreviewTeller(board, lambda: ("a", tmp_path)).tell()
    assert board.shown == 0
