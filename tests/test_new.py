"""``ourvidz new`` makes what installs, runs and passes its tests, or says what is wrong before it writes."""

from __future__ import annotations

import contextlib
import importlib
import os
import socket
import subprocess
import threading
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import stamina
from hypothesis import given, settings
from hypothesis import strategies as st

import ourvidz_core
from ourvidz_core.cli.main import main
from ourvidz_core.cli.new import KINDS, package_of
from ourvidz_core.errors import PluginError
from ourvidz_core.plugins.loading import installed_plugins
from ourvidz_core.plugins.versions import incompatibility_of
from ourvidz_core.testing.conformance import CHECKS, CheckStatus, Subject, run_check
from ourvidz_core.wire.job_types import JobType
from tests.environments import make_environment

#: Checks that have something to look at in a plugin of that kind.
LOOKED_AT = {
    "model": {"run", "callback", "out-of-memory", "time-out"},
    "command": {"run", "callback", "out-of-memory", "time-out", "exit-status", "safe-argv"},
    "server": {"run", "callback", "out-of-memory", "time-out"},
    "extension": {"run", "callback", "out-of-memory", "time-out", "exit-status", "safe-argv", "events"},
}


@pytest.fixture
def make(tmp_path: Path, site: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Makes a project of a kind and lets Python find it, as an editable installation does."""

    def make_one(kind: str) -> Path:
        project = tmp_path / f"acme-{kind}"
        assert main(["new", project.name, "--kind", kind, "--directory", str(project)]) == 0
        declared = tomllib.loads((project / "pyproject.toml").read_text("utf-8"))["project"]
        metadata = site / f"acme_{kind}-0.1.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {declared['name']}\nVersion: {declared['version']}\n"
            + "".join(f"Requires-Dist: {each}\n" for each in declared["dependencies"])
        )
        ((name, module),) = declared["entry-points"]["ourvidz"].items()
        (metadata / "entry_points.txt").write_text(f"[ourvidz]\n{name} = {module}\n")
        (site / name).symlink_to(project / name)
        importlib.invalidate_caches()
        return project

    return make_one


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_plugin_does_what_every_plugin_must(
    kind: str, make: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(kind)
    plugin = next(plugin for plugin in installed_plugins() if plugin.distribution == f"acme-{kind}")
    if kind == "server":
        server = importlib.import_module("acme_server.server").make_server()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("OURVIDZ_ACME_SERVER_URL", f"http://127.0.0.1:{server.server_port}")
    subject = Subject(plugin, root=tmp_path / "checks")
    results = [run_check(subject, name) for name in CHECKS if name != "light-import"]
    if kind == "server":
        server.shutdown()
        server.server_close()
    assert [str(flaw) for result in results for flaw in result.flaws] == []
    passed = {result.check for result in results if result.status is CheckStatus.PASSED}
    assert passed == {"loads", "names", "samples", "wrong-values", "unknown-keys"} | LOOKED_AT[kind]


def test_a_new_plugin_needs_a_core_with_these_hooks(make: Callable[[str], Path]) -> None:
    declared = tomllib.loads((make("extension") / "pyproject.toml").read_text("utf-8"))["project"]
    needed = declared["dependencies"]
    assert incompatibility_of("acme-extension", needed, ourvidz_core.__version__) is None
    assert incompatibility_of("acme-extension", needed, f"{int(ourvidz_core.__version__.split('.')[0]) + 1}.0")


def test_the_package_and_the_job_type_are_named_after_the_distribution(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["new", "Acme.Sharp-Upscale", "--directory", str(tmp_path / "here")]) == 0
    assert str(tmp_path / "here/acme_sharp_upscale/plugin.py") in capsys.readouterr().out.splitlines()
    plugin = (tmp_path / "here/acme_sharp_upscale/plugin.py").read_text("utf-8")
    assert 'name="acme_sharp_upscale"' in plugin
    declared = tomllib.loads((tmp_path / "here/pyproject.toml").read_text("utf-8"))["project"]
    assert declared["name"] == "Acme.Sharp-Upscale"
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and "$" in path.read_text("utf-8")]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("acme upscale", "'acme upscale' cannot name a distribution: use letters, digits"),
        ("-acme", "No such option"),
        ("acme-", "with a letter or digit at each end"),
        ("../acme", "cannot name a distribution"),
        ("", "cannot name a distribution"),
        ("4k-upscale", "'4k-upscale' would have the package 4k_upscale, which Python cannot import"),
        ("class", "which Python cannot import"),
        ("json", "'json' would hide Python's own module json"),
        ("pillow", "is installed here already; choose another name"),
        ("Ourvidz.Core", "is installed here already"),
        ("yaml-" + "x" * 60, "a job type is named after it; use 58 at most"),
        ("_pytest", "cannot name a distribution"),
        ("conftest-of-acme", None),
        ("pytest-ourvidz", "'pytest-ourvidz' would hide the module pytest_ourvidz at "),
    ],
)
def test_a_name_that_cannot_be_is_refused_before_anything_is_written(
    name: str,
    says: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["new", name]) == (0 if says is None else 2)
    assert (says or "") in capsys.readouterr().err
    assert bool(list(tmp_path.iterdir())) is (says is None)


@given(st.text(alphabet="aZ09-_. \xe9/", max_size=70))
@settings(max_examples=50)
def test_whatever_name_is_taken_makes_a_package_and_a_job_type(name: str) -> None:
    try:
        package = package_of(name)
    except PluginError:
        return
    assert package.isidentifier()
    assert JobType(name=package, queue=f"{package}_queue", content_type="image").bucket == package


def test_a_directory_that_holds_something_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "acme-new").mkdir()
    (tmp_path / "acme-new/mine.txt").write_text("mine")
    assert main(["new", "acme-new"]) == 2
    assert "acme-new is not empty; name another directory with --directory" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "acme-new").iterdir()] == ["mine.txt"]
    (tmp_path / "empty").mkdir()
    assert main(["new", "acme-new", "--directory", "empty"]) == 0


@contextlib.contextmanager
def served(environ: dict[str, str]) -> Iterator[None]:
    """The model server that a project comes with, until the block ends."""
    python = Path(environ["PATH"].split(os.pathsep)[0]) / "python"
    server = subprocess.Popen([python, "-m", "acme_server.server"], env=environ)
    try:
        for attempt in stamina.retry_context(on=OSError, attempts=None, timeout=20, wait_initial=0.05, wait_max=0.2):
            with attempt:
                socket.create_connection(("127.0.0.1", 8765)).close()
        yield
    finally:
        server.kill()
        server.wait()


@pytest.fixture(scope="module")
def environ(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_environment(tmp_path_factory.mktemp("installed") / "environment")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_new_project_installs_runs_and_passes_its_tests(kind: str, tmp_path: Path, environ: dict[str, str]) -> None:
    def sh(command: str, directory: Path = tmp_path / f"acme-{kind}") -> str:
        done = subprocess.run(
            ["bash", "-ec", command], cwd=directory, env=environ, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    environ = {**environ, "OURVIDZ_ALLOW_PLUGINS": f"acme-{kind}"}
    sh(f"ourvidz new acme-{kind} --kind {kind}", tmp_path)
    sh('pip install --quiet --editable ".[test]"')
    assert f"acme-{kind}" in sh("ourvidz plugins list")
    assert " failed" not in sh("pytest -q")
    if kind == "server":
        with served(environ):
            assert '"status": "completed"' in sh("ourvidz run --json job.json")
    elif kind != "extension":
        assert '"status": "completed"' in sh("ourvidz run --json job.json")
