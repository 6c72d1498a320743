"""What the shell, and whoever watches from a script, is told by the exit code."""

from __future__ import annotations

from pathlib import Path

import pytest

from ourvidz_core.cli.main import main


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("REDIS_URL", "OURVIDZ_SETTINGS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OURVIDZ_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("OURVIDZ_WORK_DIR", str(tmp_path / "work"))
    monkeypatch.setenv("OURVIDZ_ALLOW_PLUGINS", "none")


def test_a_redis_that_does_not_answer_is_no_good_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("REDIS_URL", "redis://127.0.0.1:1")
    assert main(["status"]) == 3
    assert "what the workers are doing is not known" in capsys.readouterr().out


@pytest.mark.parametrize("command", [["status"], ["queue", "status", "--queue", "q"]], ids=" ".join)
def test_an_address_that_is_none_of_redis_is_a_wrong_setting_before_anything_starts(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("REDIS_URL", "https://host/with-a-token")
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "REDIS_URL must begin with redis://" in said
    assert "with-a-token" not in said


def test_a_directory_that_cannot_be_used_is_named_with_its_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("OURVIDZ_STATE_DIR", str(tmp_path / "file" / "below"))
    assert main(["queue", "status", "--queue", "q"]) == 2
    said = capsys.readouterr().err
    assert str(tmp_path / "file") in said
    assert "OURVIDZ_STATE_DIR" in said
    assert "Traceback" not in said
