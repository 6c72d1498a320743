"""Check one installed plugin, in a process that may die of it: what ``ourvidz plugins check`` starts.

``python -m ourvidz_core.testing.conformance FILE`` with a JSON object in it that says the
``distribution``, the ``results`` file, the ``scratch`` directory, the ``messages`` to use
and whether ``is_light``. Writes a line of JSON for each check as it ends.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import attrs

from ourvidz_core.plugins.loading import installed_plugins
from ourvidz_core.plugins.trust import refusal_of
from ourvidz_core.settings import load
from ourvidz_core.testing.conformance import Subject, run_checks


def main(request: dict[str, Any]) -> None:
    """Run the checks that ``request`` describes."""
    # What a check provokes is no news. It is not disabled: a check listens to the log itself.
    logging.getLogger().addHandler(logging.NullHandler())
    settings = load()
    allowed = {
        plugin.distribution: plugin for plugin in installed_plugins() if not refusal_of(plugin.distribution, settings)
    }
    plugin = allowed.pop(request["distribution"])
    subject = Subject(
        plugin,
        root=Path(request["scratch"]),
        settings=attrs.evolve(settings, work_dir=Path(request["scratch"]) / "work"),
        others=list(allowed.values()),
        messages=request["messages"],
    )
    with Path(request["results"]).open("w", encoding="utf-8", buffering=1) as results:
        for result in run_checks(subject, is_light=request["is_light"]):
            results.write(json.dumps(attrs.asdict(result)) + "\n")


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text("utf-8")))
