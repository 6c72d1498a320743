"""Build every distribution of this repository, check what came of it, and install it where nothing else is.

``python deploy/dist.py`` leaves wheels and source distributions in ``dist/``, and beside them ``requirements.txt``,
what the released ones need of others. Wheels are built from the source distributions, so that these are known to be
whole. ``--no-install`` leaves the clean environment out.
"""

from __future__ import annotations

import argparse
import email
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from email.message import Message
from pathlib import Path

from attrs import field, frozen
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
#: Every distribution that is released, and the examples that a reader installs.
SOURCES = (
    ROOT,
    *sorted(path.parent for path in ROOT.glob("plugins/*/pyproject.toml")),
    *sorted(path.parent for path in ROOT.glob("examples/**/pyproject.toml")),
)
_REQUIRED = ("Name", "Version", "Summary", "Requires-Python", "Description")
#: What a released one says besides; an example may leave to its reader what licence a copy has.
_RELEASED = ("License-Expression", "License-File")
#: What a wheel may hold besides Python and its own metadata.
_DATA = re.compile(r"\.(py|typed|json|toml|lua|html|css|js|svg|md|jinja|safetensors|tmpl|txt)$")
_NEVER = re.compile(
    r"(^|/)(tests?|conftest\.py|test_[^/]*|\.[^/]*|__pycache__|[^/]*\.(pyc|egg-info|orig|rej|log))(/|$)"
)
#: Distributions that need gigabytes of torch; they are installed beside their dependencies that are there.
_HEAVY = "torch"
_OURS = "ourvidz-"


@frozen
class Wheel:
    """A built wheel: its metadata and the names in it."""

    path: Path
    metadata: Message = field(repr=False)
    names: tuple[str, ...] = field(repr=False)

    @classmethod
    def read(cls, path: Path) -> Wheel:
        """Open a wheel."""
        with zipfile.ZipFile(path) as archive:
            names = tuple(archive.namelist())
            (metadata,) = [name for name in names if name.endswith(".dist-info/METADATA")]
            return cls(path, email.message_from_bytes(archive.read(metadata)), names)

    @property
    def name(self) -> str:
        """The distribution's name."""
        return str(self.metadata["Name"])

    @property
    def is_ours(self) -> bool:
        """Whether it is released; the others are examples."""
        return self.name.startswith(_OURS)

    @property
    def requirements(self) -> list[Requirement]:
        """What it needs, extras left out."""
        needed = [Requirement(str(line)) for line in self.metadata.get_all("Requires-Dist") or ()]
        return [one for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})]

    @property
    def is_heavy(self) -> bool:
        """Whether it needs torch."""
        return any(one.name == _HEAVY for one in self.requirements)


def requirements(wheels: Sequence[Wheel]) -> str:
    """What the released wheels need of others, a line each, as pip reads it."""
    needed: dict[str, Requirement] = {}
    for one in (one for wheel in wheels if wheel.is_ours for one in wheel.requirements):
        if not one.name.startswith(_OURS):
            known = needed.setdefault(one.name, one)
            known.specifier &= one.specifier
    return "".join(f"{needed[name]}\n" for name in sorted(needed))


def build(target: Path) -> list[Wheel]:
    """All source distributions and the wheels made from them, in ``target``."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(target)]
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        list(pool.map(lambda source: _run([*command, str(source)]), SOURCES))
    return [Wheel.read(path) for path in sorted(target.glob("*.whl"))]


def faults(wheels: Sequence[Wheel]) -> Iterator[str]:
    """What a wheel lacks, or holds and should not."""
    if len(wheels) != len(SOURCES):
        yield f"{len(SOURCES)} distributions were built and there are {len(wheels)} wheels"
    for wheel in wheels:
        told = {key: str(value).strip() for key, value in wheel.metadata.items()}
        told["Description"] = str(wheel.metadata.get_payload()).strip()
        required = (*_REQUIRED, *(_RELEASED if wheel.is_ours else ()))
        yield from (f"{wheel.name}: its metadata has no {key}" for key in required if not told.get(key))
        own = [name for name in wheel.names if ".dist-info/" not in name]
        yield from (f"{wheel.name}: {name} does not belong into a wheel" for name in own if _NEVER.search(name))
        yield from (f"{wheel.name}: {name} is a file of no known kind" for name in own if not _DATA.search(name))
        packages = {name.split("/", 1)[0] for name in own if "/" in name}
        yield from (
            f"{wheel.name}: {package} has no py.typed"
            for package in packages
            if f"{package}/py.typed" not in wheel.names
        )
        if wheel.is_ours and not any("/licenses/" in name for name in wheel.names):
            yield f"{wheel.name}: it carries no licence"
    ours = {wheel.name: str(wheel.metadata["Version"]) for wheel in wheels if wheel.is_ours}
    if len(set(ours.values())) > 1:
        yield f"the versions differ: {ours}"


def install(wheels: Sequence[Wheel], environment: Path) -> Path:
    """Install ``wheels`` into a new virtual environment; those that need torch without what they need."""
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _run([*pip, *(str(wheel.path) for wheel in wheels if not wheel.is_heavy)])
    _run([*pip, "--no-deps", *(str(wheel.path) for wheel in wheels if wheel.is_heavy)])
    return python.parent


def use(wheels: Sequence[Wheel], commands: Path, directory: Path) -> Iterator[str]:
    """Ask the installed command line what is there, from a directory where this repository is not."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("OURVIDZ_", "PYTHON"))}
    environ["OURVIDZ_STATE_DIR"] = str(directory / "state")

    def ask(*arguments: str) -> str:
        return _run([str(commands / "ourvidz"), *arguments], cwd=directory, env=environ)

    plugins = {record["distribution"]: record for record in json.loads(ask("plugins", "list", "--json"))}
    expected = {wheel.name for wheel in wheels if _is_plugin(wheel)}
    if set(plugins) != expected:
        yield f"plugins list shows {sorted(plugins)}, and {sorted(expected)} are installed"
    yield from (
        f"{name}: {record['status']} {record['reason']}"
        for name, record in plugins.items()
        if record["status"] != "loaded"
    )
    owned = sum(len(record["job_types"]) for record in plugins.values())
    if not owned or len(json.loads(ask("job-types", "--json"))) != owned:
        yield f"job-types does not show the {owned} types that the plugins own"


def _is_plugin(wheel: Wheel) -> bool:
    with zipfile.ZipFile(wheel.path) as archive:
        texts = [archive.read(name).decode() for name in wheel.names if name.endswith("/entry_points.txt")]
    return any("[ourvidz]" in text for text in texts)


def _run(command: Sequence[str], *, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=env)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} ended with {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def main() -> int:
    """Build, check, install, use."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="where the distributions go")
    parser.add_argument("--no-install", action="store_true", help="build and check only")
    options = parser.parse_args()
    wheels = build(options.out)
    (options.out / "requirements.txt").write_text(requirements(wheels), "utf-8")
    found = list(faults(wheels))
    _run(
        [
            sys.executable,
            "-m",
            "twine",
            "check",
            "--strict",
            *(str(path) for path in sorted(options.out.iterdir()) if path.suffix in (".whl", ".gz")),
        ]
    )
    if not options.no_install:
        with tempfile.TemporaryDirectory() as directory:
            found += use(wheels, install(wheels, Path(directory, "environment")), Path(directory))
    for fault in found:
        print(fault, file=sys.stderr)
    if not found:
        print(f"{len(wheels)} wheels and as many source distributions in {options.out}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
