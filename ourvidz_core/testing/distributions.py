"""Make a plugin distribution in a directory, installed the way pip leaves it, without pip."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from pathlib import Path


def make_distribution(
    site: Path,
    name: str,
    source: str,
    *,
    version: str = "1.0",
    group: str = "ourvidz",
    requires: Iterable[str] = (),
) -> None:
    """Install a distribution of one module into ``site``.

    With ``site`` on ``sys.path`` and in ``PYTHONPATH`` the framework finds it like any other,
    in this process and in an engine process. ``source`` is the module's text, dedented here.
    """
    module = name.replace("-", "_")
    site.mkdir(parents=True, exist_ok=True)
    (site / f"{module}.py").write_text(textwrap.dedent(source), "utf-8")
    metadata = site / f"{module}-{version}.dist-info"
    metadata.mkdir(exist_ok=True)
    lines = [
        "Metadata-Version: 2.1",
        f"Name: {name}",
        f"Version: {version}",
        *(f"Requires-Dist: {r}" for r in requires),
    ]
    (metadata / "METADATA").write_text("\n".join(lines) + "\n", "utf-8")
    (metadata / "entry_points.txt").write_text(f"[{group}]\n{module} = {module}\n", "utf-8")
    (metadata / "RECORD").write_text("", "utf-8")
