"""The page of threats names every test of this folder, and no test that is not there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
#: The two that are about the page and the scan are about no threat of their own.
ABOUT_THE_LIST = {Path(__file__).name, "test_secret_scan.py"}


def names_in(*files: Path) -> set[str]:
    return {name for file in files for name in re.findall(r"^def (test_\w+)\(", file.read_text("utf-8"), re.MULTILINE)}


def test_every_test_that_the_page_names_is_there_and_every_security_test_is_named() -> None:
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs/explanation/threat-model.md").read_text("utf-8")))
    everywhere = [path for folder in ("tests", "plugins") for path in (ROOT / folder).rglob("test_*.py")]
    ours = [path for path in Path(__file__).parent.glob("test_*.py") if path.name not in ABOUT_THE_LIST]
    assert sorted(named - names_in(*everywhere)) == []
    assert sorted(names_in(*ours) - named) == []
    assert len(named) > 50
