"""One group of rows in a process of its own: ``python -m benchmarks.gpu.measure``, started by the benchmark.

It says on a line of JSON each what it begins and what came of it, so that whoever started it can give a
row up, and go on with the rest after a crash of the device.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs

from benchmarks.gpu.models import Models
from benchmarks.gpu.rows import FULL, SMALL, Outcome, Scale, Skipped

#: The end of a traceback that is shown.
REASON = 900


def open_group(name: str, scale: Scale, models: Models, out: Path) -> Any:
    """What measures the rows of a group. Imports what it needs."""
    from importlib import import_module

    module, made = {
        "wan": ("wan", "Wan"),
        "sdxl": ("sdxl", "Sdxl"),
        "sdxl_exact": ("sdxl", "SdxlExact"),
        "qwen": ("qwen", "Qwen"),
        "exact": ("exact", "Exact"),
        "memory": ("memory", "Memory"),
        "service": ("service", "Service"),
        "gpus": ("service", "shared_video"),
        "sdxl_gpus": ("service", "shared_images"),
    }[name]
    return getattr(import_module(f"benchmarks.gpu.{module}"), made)(scale, models, out)


def measure(group: Callable[[], Any], rows: list[str], say: Callable[[dict[str, Any]], None]) -> None:
    """Measure each row; none of them keeps the others from being measured."""
    opened: Any = None
    try:
        for row in rows:
            say({"begins": row})
            try:
                opened = opened or group()
                outcome = Outcome(row=row, status="measured", measured=opened.measure(row))
            except Skipped as skipped:
                outcome = Outcome(row=row, status="skipped", reason=str(skipped))
            except Exception:
                outcome = Outcome(row=row, status="failed", reason=traceback.format_exc()[-REASON:])
            say(attrs.asdict(outcome))
    finally:
        if hasattr(opened, "close"):
            opened.close()


def main() -> None:
    """Measure what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("group")
    parser.add_argument("rows", nargs="+")
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--small", action="store_true")
    given = parser.parse_args()
    # An exception, so that a worker that was started is ended.
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(1))
    warnings.filterwarnings("ignore", category=FutureWarning)
    scale = SMALL if given.small else FULL
    # Whatever a library prints goes where the errors go.
    answers, sys.stdout = sys.stdout, sys.stderr

    def say(line: dict[str, Any]) -> None:
        answers.write(json.dumps(line) + "\n")
        answers.flush()

    with tempfile.TemporaryDirectory() as name:
        models = Models(directory=given.models, is_small=scale.is_small)
        out = given.out if given.group in ("service", "gpus", "sdxl_gpus") else Path(name)
        measure(lambda: open_group(given.group, scale, models, out), given.rows, say)


if __name__ == "__main__":
    main()
