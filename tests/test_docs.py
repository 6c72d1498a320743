"""Every snippet of the README and the tutorial does what the page says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from ourvidz_core.testing.distributions import make_distribution

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)


def blocks(page: str, kind: str) -> list[str]:
    return [text for name, text in BLOCK.findall((ROOT / page).read_text("utf-8")) if name == kind]


def commands(text: str) -> list[tuple[str, str]]:
    """The commands of a console block, each with the output that the page shows."""
    shown: list[tuple[str, str]] = []
    for part in text.split("$ ")[1:]:
        command, _, output = part.partition("\n")
        shown.append((command, output))
    return shown


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OURVIDZ_", "SUPABASE_"))}
    return {
        **kept,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(tmp_path / "site"),
        "OURVIDZ_STATE_DIR": str(tmp_path / "state"),
        "OURVIDZ_WORK_DIR": str(tmp_path / "work"),
    }


@pytest.mark.parametrize("page", ["README.md", "docs/tutorial/first-plugin.md"])
def test_the_plugin_of_a_page_prints_what_the_page_says(page: str, tmp_path: Path, environ: dict[str, str]) -> None:
    (source,), (project,) = blocks(page, "python"), blocks(page, "toml")
    declared = tomllib.loads(project)
    name, version = declared["project"]["name"], declared["project"]["version"]
    make_distribution(tmp_path / "site", name, source, version=version)
    assert declared["project"]["entry-points"]["ourvidz"] == {name.replace("-", "_"): name.replace("-", "_")}
    for command, shown in [pair for text in blocks(page, "console") for pair in commands(text)]:
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=tmp_path,
            env={**environ, "OURVIDZ_ALLOW_PLUGINS": name},
            capture_output=True,
            text=True,
            check=False,
        )
        printed = done.stdout + ("" if done.stdout else done.stderr)
        # Plugins that are installed here and not allowed are listed as blocked; the page's reader has none.
        lines = [line for line in printed.splitlines() if " blocked " not in line]
        assert [line.split() for line in lines] == [line.split() for line in shown.splitlines()], done.stderr


def test_the_tutorials_plugin_is_the_example() -> None:
    (source,) = blocks("docs/tutorial/first-plugin.md", "python")
    assert source == (ROOT / "examples/acme-upscale/acme_upscale.py").read_text("utf-8")


def test_the_reference_pages_are_up_to_date_and_all_links_lead_somewhere() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs/generate.py"), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_every_setting_in_a_page_exists() -> None:
    from ourvidz_core.settings import SETTINGS_FILE

    reference = (ROOT / "docs/reference/settings.md").read_text("utf-8")
    known = {SETTINGS_FILE, *re.findall(r"`(OURVIDZ_\w+)`", reference)}
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "plugins").glob("*/README.md")]:
        for variable in re.findall(r"OURVIDZ_[A-Z_]+[A-Z]", page.read_text("utf-8")):
            assert variable in known, f"{page.relative_to(ROOT)}: {variable}"


def test_every_known_failure_has_the_test_that_the_page_names() -> None:
    named = re.findall(
        r"`(test_\w+)` \|$", (ROOT / "docs/explanation/known-failures.md").read_text("utf-8"), re.MULTILINE
    )
    assert len(named) >= 18
    sources = [
        path.read_text("utf-8") for folder in ("tests", "plugins") for path in (ROOT / folder).rglob("test_*.py")
    ]
    missing = [name for name in named if not any(f"def {name}(" in source for source in sources)]
    assert not missing
