"""What a GPU does with OurVidz and with plain diffusers and transformers, side by side.

``python -m benchmarks.gpu [--only wan81,sdxl1] [--list] [--small] [--models DIRECTORY] [--json FILE]``
``python -m benchmarks.gpu --join FILE FILE [--json FILE] [--markdown]``

The models have the production architectures and random weights, on which speed does not depend; they are
written below ``--models`` once, 40 GB, and used again by the next run. Every figure is of warm models and ends
with a file on disk. Ours goes through what jobs go through: ``wan_generate``'s arguments, the SDXL pipeline,
the writer of prompts, a worker's process. Groups of rows have a process each, one after another; a row that
fails or takes too long is reported, and the others go on. The JSON is written anew after each row.
Two runs may share the models, each with a GPU of its own by ``CUDA_VISIBLE_DEVICES``; ``--join`` makes one table
of theirs. ``--small`` takes the same ways with tiny models on a processor. Ends with 1 where a row failed or missed its
target.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import IO, Any

import cattrs
import psutil

from benchmarks.gpu import report
from benchmarks.gpu.models import Models
from benchmarks.gpu.rows import ROWS, Outcome, Row, choose

Say = Callable[[Outcome], None]
REASON = 900
#: Models that a group of rows needs, as methods of ``Models``.
MODELS = {
    "wan": ("wan",),
    "sdxl": ("sdxl",),
    "sdxl_exact": ("sdxl",),
    "qwen": ("qwen",),
    "memory": ("wan", "sdxl", "qwen"),
    "service": ("sdxl",),
    "gpus": ("wan",),
    "sdxl_gpus": ("sdxl",),
}
#: A process has this long to end its worker and itself.
CLOSE_SECONDS = 20.0


def run(rows: Sequence[Row], *, models: Path, is_small: bool, work: Path, on_outcome: Say) -> None:
    """Measure ``rows`` and say what became of each."""
    options = [f"--models={models}", f"--out={work}"]
    options += ["--small"] if is_small else []
    for group, members in groupby(rows, key=lambda row: row.group):
        pending = list(members)
        while pending:
            done = 0
            for outcome in _group(group, pending, options, work):
                done += 1
                on_outcome(outcome)
            # What is left after a crash begins again without the row that crashed.
            pending = pending[done:]


def _group(group: str, rows: Sequence[Row], options: Sequence[str], work: Path) -> Iterator[Outcome]:
    """The outcomes of one process; the last may be of the row that ended it."""
    command = [sys.executable, "-m", "benchmarks.gpu.measure", group, *(row.name for row in rows), *options]
    log = work / f"{group}.log"
    with log.open("ab") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, cwd=Path(__file__).parents[2])
    assert process.stdout is not None
    lines = _lines(process.stdout)
    is_whole = False
    try:
        for row in rows:
            deadline = time.monotonic() + row.limit
            outcome: Outcome | None = None
            while outcome is None:
                try:
                    said = lines.get(timeout=max(deadline - time.monotonic(), 0.01))
                except queue.Empty:
                    yield Outcome(row=row.name, status="failed", reason=f"not done within {row.limit:.0f} s")
                    return
                if said is None:
                    reason = f"its process ended: {log.read_text('utf-8', 'replace')[-REASON:]}"
                    yield Outcome(row=row.name, status="failed", reason=reason)
                    return
                if "row" in said:
                    outcome = cattrs.structure(said, Outcome)
            yield outcome
        is_whole = True
    finally:
        _end(process, CLOSE_SECONDS if is_whole else 0.0)


def _end(process: subprocess.Popen[bytes], patience: float) -> None:
    """End a process and what it started: by itself, then asked, then by force."""
    with contextlib.suppress(psutil.NoSuchProcess, subprocess.TimeoutExpired):
        process.wait(patience)
    left = []
    with contextlib.suppress(psutil.NoSuchProcess):
        left = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(CLOSE_SECONDS)
    process.kill()
    process.wait()
    for child in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()


def _lines(stream: IO[bytes]) -> queue.Queue[dict[str, Any] | None]:
    """What a process says, as it says it; None at its end."""
    lines: queue.Queue[dict[str, Any] | None] = queue.Queue()

    def read() -> None:
        for line in stream:
            lines.put(json.loads(line))
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print as rows come, and end with 1 where a row failed or missed its target."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", help="rows, comma-separated")
    parser.add_argument("--list", action="store_true", help="say which rows there are")
    parser.add_argument("--small", action="store_true", help="tiny models on a processor")
    parser.add_argument("--models", type=Path, help="where models are written and found again (default: nowhere)")
    parser.add_argument("--json", type=Path, help="write the figures there, anew after each row")
    parser.add_argument("--write-models", action="store_true", help="only write the models that the rows need")
    parser.add_argument("--join", type=Path, nargs="+", help="only make one table of these runs' JSON")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    given = parser.parse_args(argv)
    try:
        rows = choose(given.only)
    except ValueError as error:
        parser.error(str(error))
    if given.list:
        print("\n".join(f"{row.name:12} {row.what}" for row in ROWS))
        return 0
    if given.join:
        return _joined(given.join, given.json, markdown=given.markdown)
    if given.write_models:
        models = Models(directory=given.models, is_small=given.small)
        for name in {name for row in rows for name in MODELS.get(row.group, ())}:
            getattr(models, name)()
        return 0
    # An exception, so that what was started is ended.
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(1))
    outcomes: list[Outcome] = []
    machine = report.this_machine()

    def on_outcome(outcome: Outcome) -> None:
        outcomes.append(outcome)
        print(report.as_line(outcome), flush=True)
        if given.json is not None:
            report.write(given.json, outcomes, machine)

    with tempfile.TemporaryDirectory(prefix="ourvidz-gpu-") as work:
        run(
            rows,
            models=given.models or Path(work) / "models",
            is_small=given.small,
            work=Path(work),
            on_outcome=on_outcome,
        )
    print(f"\n{report.as_table(outcomes, markdown=given.markdown)}")
    if given.small:
        print("tiny models on a processor: the targets and floors are not theirs")
    return 1 if any(_is_bad(outcome, is_small=given.small) for outcome in outcomes) else 0


def _is_bad(outcome: Outcome, *, is_small: bool) -> bool:
    return outcome.status == "failed" or (not is_small and outcome.is_met is False)


def _joined(paths: Sequence[Path], written: Path | None, *, markdown: bool) -> int:
    outcomes, machine = report.join(paths)
    if written is not None:
        report.write(written, outcomes, machine)
    print(report.as_table(outcomes, markdown=markdown))
    return 1 if any(_is_bad(outcome, is_small=False) for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
