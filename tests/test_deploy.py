"""The worker's image and the distributions that it is made of are what the documentation promises."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent


def script(name: str) -> ModuleType:
    """A script of deploy/, which is no package."""
    specification = importlib.util.spec_from_file_location(name, ROOT / "deploy" / f"{name}.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module  # attrs looks a class's module up
    specification.loader.exec_module(module)
    return module


dockerfiles = script("check_dockerfile")
distributions = script("dist")


def test_the_image_is_what_it_promises() -> None:
    assert list(dockerfiles.faults(dockerfiles.Recipe.read())) == []


def test_the_build_is_sent_what_it_uses_and_nothing_else(tmp_path: Path) -> None:
    recipe = dockerfiles.Recipe.read()
    assert list(dockerfiles.context_faults(recipe)) == []

    loose = tmp_path / "Dockerfile.dockerignore"
    loose.write_text("*\n!dist/*.whl\n!constraints.txt\n!.git\n", "utf-8")
    assert list(dockerfiles.context_faults(recipe, loose)) == [
        "dist/requirements.txt is mounted and Dockerfile.dockerignore keeps it out",
        "Dockerfile.dockerignore sends .git, which no step uses",
    ]


def test_hadolint_finds_nothing() -> None:
    assert list(dockerfiles.lint()) == []


@pytest.mark.parametrize(
    ("before", "after", "fault"),
    [
        pytest.param("USER 10001:10001", "USER root", "USER is 'root'", id="root by name"),
        pytest.param("USER 10001:10001", "", "USER is 'root'", id="root by default"),
        pytest.param("FROM ${BASE}", "FROM python:latest", "pin it by digest", id="a base that cannot be pinned"),
        pytest.param("HOME=", "SUPABASE_SERVICE_KEY=x HOME=", "SUPABASE_SERVICE_KEY looks like a secret", id="a key"),
        pytest.param(
            "OURVIDZ_STATE_DIR", "OURVIDZ_STAT_DIR", "OURVIDZ_STAT_DIR is no setting", id="a mistyped setting"
        ),
        pytest.param("USER", "COPY dist /dist\nUSER", "leave a layer", id="files that stay"),
        pytest.param("HEALTHCHECK", "ONBUILD HEALTHCHECK", "HEALTHCHECK has no exec form", id="nobody asks how it is"),
        pytest.param('["worker"]', "worker", "CMD has no exec form", id="a shell in between"),
        pytest.param("--no-deps", "", "a layer of its own", id="gigabytes with each release"),
    ],
)
def test_an_image_that_promises_less_is_noticed(before: str, after: str, fault: str, tmp_path: Path) -> None:
    text = dockerfiles.DOCKERFILE.read_text("utf-8")
    assert before in text
    changed = tmp_path / "Dockerfile"
    changed.write_text(text.replace(before, after), "utf-8")

    assert any(fault in found for found in dockerfiles.faults(dockerfiles.Recipe.read(changed)))


def test_all_distributions_agree_on_licence_python_and_typing() -> None:
    licence = (ROOT / "LICENSE").read_bytes()
    core = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert len(distributions.SOURCES) >= 7
    for source in distributions.SOURCES:
        project = tomllib.loads((source / "pyproject.toml").read_text("utf-8"))["project"]
        if project["name"].startswith("ourvidz-"):
            assert (source / "LICENSE").read_bytes() == licence, source
            assert (project["license"], project["license-files"]) == ("Apache-2.0", ["LICENSE"]), source
        assert project["requires-python"] == core["requires-python"], source
        assert (source / project["readme"]).is_file(), source


def wheel(tmp_path: Path, *names: str, metadata: str = "Name: ourvidz-acme\nVersion: 1\n") -> object:
    import zipfile

    path = tmp_path / "ourvidz_acme-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, "")
        archive.writestr("ourvidz_acme-1.dist-info/METADATA", metadata)
    return distributions.Wheel.read(path)


def test_a_wheel_that_lacks_something_or_carries_too_much_is_noticed(tmp_path: Path) -> None:
    bad = wheel(tmp_path, "ourvidz_acme/__init__.py", "ourvidz_acme/tests/test_a.py", "ourvidz_acme/.env")

    found = "\n".join(distributions.faults([bad]))

    for fault in (
        "metadata has no Summary",
        "metadata has no Description",
        "ourvidz_acme/tests/test_a.py does not belong",
        "ourvidz_acme/.env does not belong",
        "ourvidz_acme has no py.typed",
        "it carries no licence",
    ):
        assert fault in found


def test_what_others_made_is_listed_once_for_the_image(tmp_path: Path) -> None:
    needed = "Requires-Dist: pillow>=11\nRequires-Dist: av>=14; extra == 'video'\nRequires-Dist: ourvidz-core>=0.1\n"
    one = wheel(tmp_path, metadata=f"Name: ourvidz-acme\nVersion: 1\n{needed}")
    two = wheel(tmp_path, metadata="Name: ourvidz-core\nVersion: 1\nRequires-Dist: pillow>=12.3\n")
    example = wheel(tmp_path, metadata="Name: acme\nVersion: 1\nRequires-Dist: torch\n")

    assert distributions.requirements([one, two, example]) == "pillow>=11,>=12.3\n"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_steps_of_the_image_make_a_worker_that_works(tmp_path: Path) -> None:
    """Minutes: everything that the image installs is installed into a new environment, torch included."""
    import os
    import signal
    import time

    from ourvidz_core.delivery.embedded import EmbeddedRedis

    subprocess.run([sys.executable, ROOT / "deploy/dist.py", "--no-install"], check=True)
    recipe = dockerfiles.Recipe.read()
    commands = dockerfiles.rehearse(recipe, tmp_path)
    shown = subprocess.run([commands / "ourvidz", "plugins", "list"], capture_output=True, text=True, check=True).stdout
    assert shown.count(" loaded ") == 3, shown

    (tmp_path / "state").mkdir()
    redis = EmbeddedRedis(tmp_path / "redis")
    arguments = [word for word in [*recipe.command("ENTRYPOINT"), *recipe.command("CMD")] if word not in ("tini", "--")]
    environ = {
        **os.environ,
        **{name: value for name, value in recipe.defaults().items() if name.startswith("OURVIDZ_")},
        "PATH": f"{commands}:{os.environ['PATH']}",
        "REDIS_URL": redis.address,
        "OURVIDZ_STATE_DIR": str(tmp_path / "state"),
        "OURVIDZ_WORK_DIR": str(tmp_path / "work"),
    }
    arguments.append("--no-checks")  # there are no models here
    health = recipe.command("HEALTHCHECK")
    assert subprocess.run(health, env=environ, cwd=tmp_path, check=False).returncode, "somebody else answers there"
    worker = subprocess.Popen(arguments, env=environ, cwd=tmp_path)
    try:
        deadline = time.monotonic() + 120
        while subprocess.run(health, env=environ, cwd=tmp_path, check=False).returncode:
            assert worker.poll() is None, "the worker ended"
            assert time.monotonic() < deadline, "the worker did not become healthy"
            time.sleep(1)
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(60) == 0
    finally:
        worker.kill()
        redis.close()
