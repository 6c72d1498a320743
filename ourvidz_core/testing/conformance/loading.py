"""Checks of what a plugin is before any job: it loads, it is light, and its names are its own."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Iterator

from ourvidz_core.plugins.loading import ENTRY_POINT_GROUP, PluginStatus
from ourvidz_core.testing.conformance.results import Flaw, NotChecked
from ourvidz_core.testing.conformance.subject import Subject
from ourvidz_core.testing.host import PluginHost

COMMAND_GROUP = "ourvidz.commands"
_IMPORT_SECONDS = 60.0
#: What to change, by the stage that the loader names.
_CURES = {
    "(import)": "import the module by hand to see the whole traceback; name what it needs in the dependencies"
    " of pyproject.toml, and the module itself in [project.entry-points.ourvidz]",
    "(validation)": "give the function the name and the arguments of a hook of the reference; a hook may leave"
    " arguments out, and an extension may only wrap the hooks of owners",
    "(job types)": "correct what register_job_types yields: JobType(name=..., queue=..., content_type=...)",
}
_OTHER_CURE = "change what the message says, and look at it with: ourvidz plugins list"


def check_loads(subject: Subject) -> Iterator[Flaw]:
    """It is imported, its hooks are known and its job types are right."""
    if subject.record.status is not PluginStatus.LOADED:
        reason = subject.record.reason
        cure = next((cure for stage, cure in _CURES.items() if reason.startswith(stage)), _OTHER_CURE)
        yield Flaw(problem=f"it does not load: {reason}", cure=cure)


def check_light_import(subject: Subject) -> Iterator[Flaw]:
    """Importing it imports no torch and no other heavy library, in a process of its own."""
    try:
        importlib.metadata.distribution(subject.distribution)
    except importlib.metadata.PackageNotFoundError:
        raise NotChecked("it is not installed as a distribution") from None
    try:
        done = subprocess.run(
            [sys.executable, "-m", "ourvidz_core.testing.light_import", subject.distribution],
            capture_output=True,
            text=True,
            check=False,
            timeout=_IMPORT_SECONDS,
        )
    except subprocess.TimeoutExpired:
        yield Flaw(
            problem=f"importing it takes more than {_IMPORT_SECONDS:g} s, and every ourvidz command imports it",
            cure="define hooks at import and do nothing else; what takes time belongs into prepare_job and generate",
        )
        return
    if done.returncode != 0:
        raise NotChecked(f"the import ended with {done.returncode}: {done.stderr.strip()[-200:]}")
    for library, place in json.loads(done.stdout.splitlines()[-1]).items():
        yield Flaw(
            problem=f"importing it imports {library} ({place}), so every ourvidz command and the worker would",
            cure=f"import {library} inside the function that uses it; types go below `if TYPE_CHECKING:`",
        )


def check_names(subject: Subject) -> Iterator[Flaw]:
    """Its job types and commands are no other installed plugin's."""
    names = set(subject.record.job_types)
    for other in subject.others:
        with PluginHost(subject.scratch(), other) as host:
            for name in sorted(names & {job_type.name for job_type in host.registry.job_types}):
                yield Flaw(
                    job_type=name,
                    problem=f"{other.distribution} {other.version} registers {name!r} too; where both are installed"
                    " no worker starts",
                    cure="begin the names of your job types with a word of your own, such as acme_",
                )
    yield from _second_entry_points(subject)
    yield from _shared_commands(subject)


def _second_entry_points(subject: Subject) -> Iterator[Flaw]:
    try:
        declared = importlib.metadata.distribution(subject.distribution).entry_points.select(group=ENTRY_POINT_GROUP)
    except importlib.metadata.PackageNotFoundError:
        return
    if len(names := sorted(point.name for point in declared)) > 1:
        yield Flaw(
            problem=f"it declares {len(names)} entry points in the group {ENTRY_POINT_GROUP} ({', '.join(names)});"
            " only the first is loaded",
            cure="keep one entry point for each distribution, and import the other module's hooks into its module",
        )


def _shared_commands(subject: Subject) -> Iterator[Flaw]:
    owners: dict[str, set[str]] = {}
    for point in importlib.metadata.entry_points(group=COMMAND_GROUP):
        if point.dist is not None:
            owners.setdefault(point.name, set()).add(point.dist.name)
    for name, distributions in sorted(owners.items()):
        if len(distributions) > 1 and subject.distribution in distributions:
            yield Flaw(
                problem=f"the command `ourvidz {name}` is declared by {' and '.join(sorted(distributions))}",
                cure=f"rename the entry point in [project.entry-points.{COMMAND_GROUP!r}]",
            )
