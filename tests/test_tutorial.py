"""The tutorial is true: its edits lead from the template to the example, and its sessions print what it shows."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from ourvidz_core.cli.new import render
from tests.environments import make_environment
from tests.test_docs import BLOCK, session

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/tutorial/first-plugin.md"
EXAMPLE = ROOT / "examples/acme-upscale"
STEPS = [(kind, text) for _, kind, text in BLOCK.findall(PAGE.read_text("utf-8"))]


def apply(diff: str, project: Path) -> None:
    """Edit a file as a diff of the page says. Each hunk must fit one place."""
    head, *hunks = re.split(r"^@@\n", diff, flags=re.MULTILINE)
    (name,) = re.findall(r"^\+\+\+ b/(\S+)", head, re.MULTILINE)
    file = project / name
    text = file.read_text("utf-8")
    for hunk in hunks:
        lines = hunk.splitlines(keepends=True)
        old, new = ("".join(line[1:] or line for line in lines if line[0] in f"{sign} \n") for sign in "-+")
        assert text.count(old) == 1, f"{name}:\n{old}"
        text = text.replace(old, new)
    file.write_text(text, "utf-8")


def test_the_edits_of_the_page_make_the_example_of_the_template(tmp_path: Path) -> None:
    for path, text in render("acme-upscale", "acme_upscale", "model").items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text, "utf-8")
    for kind, text in STEPS:
        if kind == "diff":
            apply(text, tmp_path)
    assert files_of(tmp_path) == files_of(EXAMPLE)


def test_the_examples_plugin_is_short() -> None:
    assert len((EXAMPLE / "acme_upscale/plugin.py").read_text("utf-8").splitlines()) < 60


def files_of(project: Path) -> dict[str, str]:
    """The texts of a project, without what Python and pytest leave there."""
    return {
        path.relative_to(project).as_posix(): path.read_text("utf-8")
        for path in project.rglob("*")
        if path.is_file() and "cache" not in path.parent.name
    }


@pytest.mark.slow
def test_the_page_shows_what_its_commands_print(tmp_path: Path) -> None:
    environ = {**make_environment(tmp_path / "environment"), "OURVIDZ_ALLOW_PLUGINS": "acme-upscale"}
    directory = tmp_path
    for kind, text in STEPS:
        if kind == "diff":
            apply(text, directory)
            continue
        for command, shown in session(text):
            if command.startswith("cd "):
                directory /= command.removeprefix("cd ")
                continue
            done = subprocess.run(
                ["bash", "-c", command], cwd=directory, env=environ, capture_output=True, text=True, check=False
            )
            assert comparable(done.stdout + done.stderr) == comparable(shown), command


def comparable(printed: str) -> list[list[str]]:
    """The words of each line, without what no two runs share."""
    lines = [line for line in printed.splitlines() if " blocked " not in line]
    return [re.sub(r"\bin \d+\.\d+s", "in a moment", line).split() for line in lines]
