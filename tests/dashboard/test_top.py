"""The dashboard in a terminal, as the command prints it."""

from __future__ import annotations

import time

import pytest

from ourvidz_core.cli.main import main
from ourvidz_core.delivery.board import DeviceMemory, RunningJob
from tests.dashboard.scenes import QUEUES, Scene


@pytest.fixture
def frame(scene: Scene, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> object:
    """Prints one frame of the scene."""
    monkeypatch.setenv("REDIS_URL", scene.redis_url)
    monkeypatch.setenv("COLUMNS", "140")

    def printed() -> str:
        assert main(["top", "--once", "--queues", ",".join(QUEUES)]) == 0
        return capsys.readouterr().out

    return printed


def line_with(text: str, word: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.lstrip().startswith(word)]
    return line.split()


def test_one_frame_shows_what_the_page_shows(scene: Scene, frame) -> None:
    now = time.time()
    scene.queue.push(QUEUES[0], b'{"id": "w"}')
    scene.bury(b'{"id": "bad"}', "bad", "the prompt is missing", queue=QUEUES[1])
    scene.publish(
        jobs=(RunningJob(id="run-1", type="video_fast", attempt=1, stage="denoise", step=3, total=9, claimed_at=now),),
        device=DeviceMemory(used_gb=11.25, total_gb=24.0),
        completed=7,
    )
    scene.finish("good-1", ago=30.5, assets=[("image/png", b"png")])
    scene.fail("broken-1", "too little of it", ago=130.5)

    shown = frame()

    assert "1 waiting, 1 running" in shown
    assert line_with(shown, QUEUES[0])[1] == "1"
    assert {"denoise", "3/9", "video_fast", "gpu-1"} <= set(line_with(shown, "run-1"))
    assert "11.2 of 24.0 GiB" in shown or "11.3 of 24.0 GiB" in shown
    (good,) = [line for line in shown.splitlines() if "good-1" in line]
    assert "1 stored" in good
    (broken,) = [line for line in shown.splitlines() if "broken-1" in line]
    assert "OutOfMemory: too little of it" in broken
    assert line_with(shown, "bad")[:3] == ["bad", QUEUES[1], "PayloadError"]
    assert "generate 5.5s" in shown


def test_words_of_a_job_are_neither_markup_nor_orders_to_the_terminal(scene: Scene, frame) -> None:
    scene.fail("a\x1b]0;owned\x07\x1b[2J[red]b[/red]", "[bold]x\x9b2J\r\nforged line", ago=1)
    shown = frame()
    assert "[red]b[/red]" in shown
    assert "[bold]x" in shown
    assert not {"\x1b", "\x07", "\x9b", "\r"} & set(shown)
    assert not any(line.startswith("forged") for line in shown.splitlines())
