"""The table of a run, and its JSON."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import attrs
import cattrs

from benchmarks.gpu.rows import BY_NAME, Outcome
from ourvidz_core.cli.common import table

HEAD = ("ROW", "WORK", "OURS", "ALTERNATIVE", "RATIO", "TARGET", "FLOOR", "PEAK GIB", "MET")
LIBRARIES = ("torch", "triton", "diffusers", "transformers", "fa3-fwd")


def as_table(outcomes: Sequence[Outcome], *, markdown: bool = False) -> str:
    """A line for each row; below them why rows are missing, and what else is true of the others."""
    rows = table(HEAD, map(_cells, outcomes), markdown=markdown)
    notes = [note for outcome in outcomes if (note := note_of(outcome))]
    return "\n".join([rows, "", *notes] if notes else [rows])


def as_line(outcome: Outcome) -> str:
    """One row as it comes, with what else is true of it."""
    cells = [cell for cell in _cells(outcome) if cell]
    return "  ".join(cells) + (f"\n    {note}" if (note := note_of(outcome)) else "")


def as_json(outcomes: Sequence[Outcome], machine: dict[str, Any]) -> dict[str, Any]:
    """Everything, for other programs."""
    rows = []
    for outcome in outcomes:
        row = BY_NAME[outcome.row]
        shown = {"unit": row.unit, "target": row.target, "target_ratio": row.target_ratio, "floor": row.floor}
        rows.append({**attrs.asdict(outcome), "ratio": outcome.ratio, "is_met": outcome.is_met, **shown})
    return {"machine": machine, "rows": rows}


def write(path: Path, outcomes: Sequence[Outcome], machine: dict[str, Any]) -> None:
    """Write the JSON; the file is whole at every moment."""
    unfinished = path.with_name(f".{path.name}.part")
    unfinished.write_text(json.dumps(as_json(outcomes, machine), indent=1) + "\n", "utf-8")
    os.replace(unfinished, path)


def join(paths: Sequence[Path]) -> tuple[list[Outcome], dict[str, Any]]:
    """The outcomes that several runs wrote, in the table's order, and the machine of the first.

    Of a row that several have, the last one that was measured. A file that is not there had nothing to say.
    """
    outcomes: dict[str, Outcome] = {}
    machine: dict[str, Any] = {}
    for path in filter(Path.exists, paths):
        written = json.loads(path.read_text("utf-8"))
        machine = machine or written["machine"]
        for outcome in cattrs.structure(written["rows"], list[Outcome]):
            if outcome.measured is not None or outcome.row not in outcomes:
                outcomes[outcome.row] = outcome
    return [outcomes[name] for name in BY_NAME if name in outcomes], machine


def this_machine() -> dict[str, Any]:
    """What the figures depend on."""
    versions = {}
    for library in LIBRARIES:
        try:
            versions[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return {
        "gpus": gpus(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": versions,
        "settings": {name: value for name, value in os.environ.items() if name.startswith("OURVIDZ_")},
    }


def gpus() -> list[str]:
    """The names of the GPUs that CUDA shows us, none of which is used."""
    import pynvml

    return [str(pynvml.nvmlDeviceGetName(handle)) for handle in gpu_handles()]


def gpu_handles() -> list[Any]:
    """NVML's handles of the GPUs that CUDA shows us; NVML itself knows nothing of what CUDA hides."""
    import pynvml

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    try:
        pynvml.nvmlInit()
        names = range(pynvml.nvmlDeviceGetCount()) if visible is None else [name for name in visible.split(",") if name]
        return [
            pynvml.nvmlDeviceGetHandleByIndex(int(name))
            if str(name).isdecimal()
            else pynvml.nvmlDeviceGetHandleByUUID(name)
            for name in names
        ]
    except pynvml.NVMLError:
        return []


def _cells(outcome: Outcome) -> list[str]:
    row, made = BY_NAME[outcome.row], outcome.measured
    target = _figure(row.target, row.unit)
    if row.target_ratio is not None:
        target += f" and {row.target_ratio:g}x"
    if made is None:
        return [row.name, row.what, outcome.status, "", "", target, _figure(row.floor, row.unit), "", ""]
    peaks = [f"{peak:.1f}" for peak in (made.peak, made.alternative_peak) if peak is not None]
    return [
        row.name,
        row.what,
        _figure(made.ours, row.unit),
        f"{_figure(made.alternative, row.unit)} {row.alternative}" if made.alternative is not None else "",
        f"{outcome.ratio:.2f}x" if outcome.ratio else "",
        target,
        _figure(row.floor, row.unit),
        " / ".join(peaks),
        "yes" if outcome.is_met else "NO",
    ]


def _figure(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    return f"{value:.1e}" if not unit else f"{value:.3g} {unit}"


def note_of(outcome: Outcome) -> str:
    """Why a row is missing, or what else is true of it; empty where there is nothing to say."""
    if outcome.measured is None:
        return f"{outcome.row}: {outcome.status}: {outcome.reason}"
    facts = ", ".join(f"{name} {_said(value)}" for name, value in outcome.measured.facts.items())
    return f"{outcome.row}: {facts}" if facts else ""


def _said(value: object) -> str:
    if isinstance(value, list | tuple) and value and isinstance(value[0], list | tuple):  # a timeline
        return "".join(f"\n      {seconds:6.2f} s  {text}" for seconds, text in value)
    return f"{value:.3g}" if isinstance(value, float) else str(value)
