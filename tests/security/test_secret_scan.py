"""The scan of ``make check`` finds what it is there for, with the exceptions that it makes."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytest.importorskip("detect_secrets")


def scan(file: Path) -> str:
    recipe = re.search(r"^SECRETS = ((?:.*\\\n)*.*)", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    assert recipe
    options = shlex.split(recipe[1].replace("\\\n", " ").replace("$$", "$"))
    command = [sys.executable, "-m", "detect_secrets.pre_commit_hook", *options[options.index("--no-verify") :]]
    return subprocess.run([*command, str(file)], capture_output=True, text=True, check=False).stdout


def test_keys_are_found_and_made_up_secrets_are_not(tmp_path: Path) -> None:
    file = tmp_path / "settings.py"
    # In parts, or the scan would find them here.
    leaks = {
        "AWS Access Key": "AKIA" + "Q3XZ7PLM2WVB9TRK",
        "GitHub Token": "ghp_" + "aZ3kQ9xW7" + "mB1nV5cR2" + "tY8uJ4pL6" + "sD0fG3hKe",
        "Private Key": "-----BEGIN RSA " + "PRIVATE KEY-----",
    }
    file.write_text("\n".join(f'value = "{leak}"' for leak in leaks.values()))
    said = scan(file)
    assert [kind for kind in leaks if kind not in said] == []
    file.write_text(f'callback_secret = {"canary-callback"!r}\nurl = "redis://:PASSWORD@host"\n')
    assert scan(file) == ""
