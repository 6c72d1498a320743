"""Check the worker's Dockerfile, and rehearse its build where no image can be built.

``python deploy/check_dockerfile.py`` checks what the file promises and lints it with hadolint. With ``--rehearse`` it
also runs the file's RUN steps, in order, in a new virtual environment in place of the image: pip does everything that
it would do there, apt only says what it would install, and no user is made. ``make dist`` has to come first.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator, Sequence
from pathlib import Path

from attrs import frozen
from dockerfile_parse import DockerfileParser

from ourvidz_core.settings import Settings, variable_of

ROOT = Path(__file__).parent.parent
DOCKERFILE = Path(__file__).parent / "Dockerfile"
_SECRET = re.compile(r"key|secret|token|password|credential", re.IGNORECASE)
_MOUNT = re.compile(r"--mount=(\S+)\s*")
#: Steps that change the system, which a rehearsal leaves as it is.
_OF_THE_SYSTEM = ("groupadd", "useradd")


@frozen(kw_only=True)
class Instruction:
    """One instruction of a Dockerfile, continuation lines joined."""

    name: str
    value: str


@frozen
class Recipe:
    """A Dockerfile, read."""

    instructions: tuple[Instruction, ...]

    @classmethod
    def read(cls, path: Path = DOCKERFILE) -> Recipe:
        """Parse a Dockerfile."""
        parser = DockerfileParser(fileobj=path.open("rb"))
        structure = [one for one in parser.structure if one["instruction"] != "COMMENT"]
        return cls(tuple(Instruction(name=one["instruction"], value=one["value"]) for one in structure))

    def all(self, name: str) -> list[str]:
        """The values of all instructions of a kind."""
        return [one.value for one in self.instructions if one.name == name]

    def last(self, name: str) -> str:
        """The value that counts in the end; nothing where there is none."""
        return (self.all(name) or [""])[-1]

    def command(self, name: str) -> list[str]:
        """An ENTRYPOINT, CMD or HEALTHCHECK as arguments; empty unless it is in exec form."""
        text = self.last(name).partition("CMD")[2] if name == "HEALTHCHECK" else self.last(name)
        try:
            arguments = json.loads(text)
        except ValueError:
            return []
        return arguments if isinstance(arguments, list) else []

    def defaults(self) -> dict[str, str]:
        """ARG and ENV with their values."""
        words = [word for name in ("ARG", "ENV") for value in self.all(name) for word in shlex.split(value)]
        return dict(word.partition("=")[::2] for word in words)


def faults(recipe: Recipe) -> Iterator[str]:
    """What the image would lack, or have and should not."""
    defaults = recipe.defaults()
    if recipe.all("FROM") != ["${BASE}"] or ":" not in defaults.get("BASE", ""):
        yield "FROM must be the argument BASE, with a tag as its default, so that a build can pin it by digest"
    user = recipe.last("USER").partition(":")[0]
    if not user.isdigit() or user == "0":
        yield f"USER is {user or 'root'!r}; a number other than 0 lets a cluster see that it is not root"
    yield from (f"{name} has no exec form" for name in ("ENTRYPOINT", "CMD", "HEALTHCHECK") if not recipe.command(name))
    yield from (f"{name} looks like a secret baked in" for name in defaults if _SECRET.search(name))
    yield from (f"{name} is no setting" for name in defaults if name.startswith("OURVIDZ_") and name not in _settings())
    if recipe.all("ADD") or recipe.all("COPY"):
        yield "ADD and COPY leave a layer; mount what a step needs"
    for step in recipe.all("RUN"):
        if "pip install" in step and not _MOUNT.search(step):
            yield f"this step keeps what pip downloads, or copies what it installs: {step}"
    installs = [step for step in recipe.all("RUN") if "pip install" in step]
    if len(installs) != 2 or "requirements.txt" not in installs[0] or "--no-deps" not in installs[1]:
        yield "what others made must be a layer of its own, before the layer of our wheels"


def context_faults(recipe: Recipe, ignore: Path = Path(f"{DOCKERFILE}.dockerignore")) -> Iterator[str]:
    """What a build would send to the builder and should not, or should and would not."""
    lines = [line for line in ignore.read_text("utf-8").splitlines() if line and not line.startswith("#")]
    sent = {line.removeprefix("!") for line in lines[1:]}
    if lines[:1] != ["*"] or not all(line.startswith("!") for line in lines[1:]):
        yield f"{ignore.name} must begin with * and name only what is sent, so that nothing else can be"
    mounted = {options["source"] for step in recipe.all("RUN") for options in _mounts(step) if "source" in options}
    for source in sorted(mounted):
        if not any(one == source or one.startswith(f"{source}/") for one in sent):
            yield f"{source} is mounted and {ignore.name} keeps it out"
    for one in sorted(sent):
        if not any(one == source or one.startswith(f"{source}/") for source in mounted):
            yield f"{ignore.name} sends {one}, which no step uses"


def lint(path: Path = DOCKERFILE) -> Iterator[str]:
    """What hadolint says."""
    command = [str(Path(sys.executable).with_name("hadolint")), "--no-color", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    yield from (done.stdout + done.stderr).splitlines()


def rehearse(recipe: Recipe, directory: Path) -> Path:
    """Run the RUN steps in a new virtual environment below ``directory``; answers where its commands are.

    :raises subprocess.CalledProcessError: a step failed; its output was shown.
    """
    venv.create(directory / "environment", with_pip=True)
    commands = directory / "environment" / "bin"
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OURVIDZ_", "PYTHON", "VIRTUAL"))}
    environ = {**kept, **recipe.defaults(), "HOME": str(directory), "PATH": f"{commands}:{os.environ['PATH']}"}
    for step in recipe.all("RUN"):
        script = _rehearsed(step, directory)
        print(f"RUN {script}", flush=True)
        if script:
            subprocess.run(["bash", "-euo", "pipefail", "-c", script], env=environ, cwd=directory, check=True)
    return commands


def _rehearsed(step: str, directory: Path) -> str:
    """A step as it can be run here: what it mounts is copied, and the system stays as it is."""
    script = _MOUNT.sub("", step)
    for options in _mounts(step):
        if options["type"] == "bind":
            source, place = ROOT / options["source"], directory / options["target"].lstrip("/")
            place.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, place, dirs_exist_ok=True)
            else:
                shutil.copy(source, place)
            script = re.sub(rf"(?<![\w./]){re.escape(options['target'])}\b", str(place), script)
    if script.startswith(_OF_THE_SYSTEM):
        return ""
    if script.startswith("apt-get"):
        simulated = script.replace("apt-get update &&", "").replace("apt-get install", "apt-get install --simulate")
        return simulated.strip() if shutil.which("apt-get") else ""
    return script


def _mounts(step: str) -> list[dict[str, str]]:
    return [dict(option.partition("=")[::2] for option in mount.split(",")) for mount in _MOUNT.findall(step)]


def _settings() -> set[str]:
    return {variable_of(field.name) for field in Settings.__attrs_attrs__}


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, and rehearse where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rehearse", action="store_true", help="run its steps in a new virtual environment")
    options = parser.parse_args(arguments)
    recipe = Recipe.read()
    found = [*faults(recipe), *context_faults(recipe), *lint()]
    for fault in found:
        print(fault, file=sys.stderr)
    if options.rehearse and not found:
        with tempfile.TemporaryDirectory() as directory:
            commands = rehearse(recipe, Path(directory))
            subprocess.run([commands / "ourvidz", "plugins", "list"], check=True)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
