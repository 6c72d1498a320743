"""``ourvidz validate``: what a producer should change in its messages, before it sends them."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import click

from ourvidz_core.cli.common import open_registry, open_settings, print_json, table

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ourvidz_core.plugins.registry import Registry
    from ourvidz_core.plugins.validation import Examination, Problem
    from ourvidz_core.wire.jobs import Job

_JOB_FILE = click.Path(exists=True, dir_okay=False, path_type=Path, allow_dash=True)


@click.command()
@click.argument("job_files", type=_JOB_FILE, metavar="JOB.json...", nargs=-1, required=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def validate(job_files: tuple[Path, ...], as_json: bool) -> int:
    """Say everything that is wrong with messages, and what a worker would ignore or change.

    A worker is lenient: it takes unknown keys, and some values that it does otherwise. This
    is strict, for those who write producers. "-" is standard input. Nothing is fetched and no
    model is asked.

    Ends with 0 when there is nothing to say, and 1 when any message has a problem.
    """
    registry = open_registry(open_settings(at_least=logging.ERROR))
    found = {path: _examine(registry, _read(path)) for path in job_files}
    if as_json:
        print_json([_as_json(path, examination) for path, examination in found.items()])
    else:
        click.echo("\n".join(_as_text(path, examination) for path, examination in found.items()))
    return 1 if any(examination.problems for examination in found.values()) else 0


def _examine(registry: Registry, raw: bytes) -> Examination:
    from ourvidz_core.plugins.validation import examine

    examination = examine(registry, raw)
    if examination.job is None:
        return examination
    return attrs.evolve(examination, problems=(*examination.problems, *_references(examination.job)))


def _references(job: Job) -> Iterable[Problem]:
    """References whose addresses no worker would ask."""
    from ourvidz_core.delivery.references import check_url
    from ourvidz_core.errors import ReferenceRefused
    from ourvidz_core.plugins.validation import Problem, ProblemKind

    for role, reference in job.references:
        try:
            check_url(reference.url)
        except ReferenceRefused as error:
            what, _, cure = error.message.partition("; ")
            yield Problem(path=f"the {role} reference", kind=ProblemKind.REFUSED, what=what, cure=cure)


def _as_json(path: Path, examination: Examination) -> dict[str, Any]:
    return {
        "file": str(path),
        "job_type": examination.job_type,
        "is_valid": not examination.problems,
        "problems": [attrs.asdict(problem) for problem in examination.problems],
    }


def _as_text(path: Path, examination: Examination) -> str:
    problems = examination.problems
    if not problems:
        return f"{path}: nothing to change"
    rows = [(problem.path, problem.kind.value, problem.what, problem.cure) for problem in problems]
    head = f"{path}: {len(problems)} problem{'s' if len(problems) > 1 else ''}"
    return f"{head}\n{table(('WHERE', 'IS', 'WHAT', 'WHAT TO DO'), rows)}\n"


def _read(path: Path) -> bytes:
    return sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
