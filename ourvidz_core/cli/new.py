"""``ourvidz new``: a plugin's distribution from the templates in this package, ready to install, run and test.

A template is a file in ``ourvidz_core/templates``, filled in by :class:`string.Template`: those
of ``common``, and those of the kind that is asked for.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import keyword
import re
import sys
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from string import Template

import click
from attrs import frozen

import ourvidz_core
from ourvidz_core.errors import PluginError

#: What packaging's specification of names allows.
_NAME = re.compile(r"[A-Za-z0-9]|[A-Za-z0-9][A-Za-z0-9._-]*[A-Za-z0-9]")
#: The job type and its queue are named after the package, and ``_queue`` is part of a name of 64 characters.
_LONGEST_PACKAGE = 58
_SUFFIX = ".tmpl"
#: What lies beside the package; ``suite.py`` are its tests, and all else is the package.
_BESIDE = frozenset({"README.md", "job.json", "pyproject.toml"})


@frozen(kw_only=True)
class Kind:
    """One way of making a plugin; its templates are in a folder of the kind's name."""

    summary: str
    dependencies: tuple[str, ...] = ()


KINDS: Mapping[str, Kind] = {
    "model": Kind(
        summary="The job type {package} for OurVidz, made in the engine process",
        dependencies=("pillow",),
    ),
    "command": Kind(
        summary="The job type {package} for OurVidz, made by a command-line tool",
        dependencies=("pillow",),
    ),
    "server": Kind(
        summary="The job type {package} for OurVidz, made by a model server over HTTP",
        dependencies=("pillow", "requests"),
    ),
    "extension": Kind(
        summary="An extension of OurVidz that sees the jobs of every plugin",
    ),
}


@click.command()
@click.argument("name")
@click.option(
    "--kind",
    type=click.Choice(list(KINDS)),
    default="model",
    show_default=True,
    help="What makes a job: a model in the engine, a command, a model server; or an extension of others' jobs.",
)
@click.option(
    "--directory",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where to write; NAME in the current directory unless said.",
)
def new(name: str, kind: str, directory: Path | None) -> None:
    """Make the distribution NAME of a plugin: it installs, runs and passes its tests as it is."""
    package = package_of(name)
    target = directory or Path(name)
    _refuse_occupied(target)
    written = render(name, package, kind)
    for path, text in written.items():
        file = target / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, "utf-8")
        click.echo(file)
    job = "ourvidz run job.json && " if "job.json" in written else ""
    click.echo(f'\ncd {target} && pip install --editable ".[test]" && {job}pytest')


def package_of(name: str) -> str:
    """The package, and the job type, of a distribution that may be called ``name``.

    :raises PluginError: it is no name of a distribution, or is taken.
    """
    if not _NAME.fullmatch(name):
        raise PluginError(
            f"{name!r} cannot name a distribution: use letters, digits, - _ and ., with a letter or digit at each end,"
            " such as acme-upscale"
        )
    package = re.sub(r"[-_.]+", "_", name).lower()
    if not package.isidentifier() or keyword.iskeyword(package):
        raise PluginError(
            f"{name!r} would have the package {package}, which Python cannot import; begin with a letter,"
            " and avoid Python's keywords"
        )
    if len(package) > _LONGEST_PACKAGE:
        raise PluginError(
            f"{name!r} has {len(name)} characters; a job type is named after it; use {_LONGEST_PACKAGE} at most"
        )
    if package in sys.stdlib_module_names:
        raise PluginError(f"{name!r} would hide Python's own module {package}; choose another name")
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
    else:
        raise PluginError(f"{name} {version} is installed here already; choose another name, or uninstall it first")
    spec = importlib.util.find_spec(package)
    if spec is not None and spec.origin is not None:  # a directory that happens to lie on the path has no origin
        raise PluginError(f"{name!r} would hide the module {package} at {spec.origin}; choose another name")
    return package


def render(name: str, package: str, kind: str) -> dict[str, str]:
    """The files of a distribution by their paths, as text."""
    dependencies = (_core_requirement(), "attrs>=24.2", *KINDS[kind].dependencies)
    values = {
        "distribution": name,
        "package": package,
        "section": package.upper(),
        "summary": KINDS[kind].summary.format(package=package),
        "dependencies": ", ".join(f'"{each}"' for each in dependencies),
    }
    rendered = {}
    for folder in ("common", kind):
        for template in (files("ourvidz_core") / "templates" / folder).iterdir():
            path = _place_of(template.name.removesuffix(_SUFFIX), package)
            rendered[path] = Template(template.read_text("utf-8")).substitute(values)
    return dict(sorted(rendered.items()))


def _core_requirement() -> str:
    """This core and later ones with the same hooks: the major version is that of the hooks."""
    major, minor, *_ = ourvidz_core.__version__.split(".")
    return f"ourvidz-core>={major}.{minor},<{int(major) + 1}"


def _place_of(name: str, package: str) -> str:
    if name == "suite.py":
        return f"tests/test_{package}.py"
    return name if name in _BESIDE else f"{package}/{name}"


def _refuse_occupied(target: Path) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        state = "is not empty" if target.is_dir() else "is a file"
        raise PluginError(f"{target} {state}; name another directory with --directory")
