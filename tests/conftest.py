"""What the tests of the framework share: plugins as real distributions, payloads, hosts and engines."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import stamina

from ourvidz_core.delivery.embedded import EmbeddedRedis
from ourvidz_core.engine.host import EngineProcess
from ourvidz_core.plugins.loading import load_registry
from ourvidz_core.settings import Settings
from ourvidz_core.testing.distributions import make_distribution
from ourvidz_core.testing.host import PluginHost
from ourvidz_core.wire.payloads import Payload

USER = "11111111-1111-4111-8111-111111111111"


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedRedis]:
    """A Redis that one file of tests has to itself."""
    server = EmbeddedRedis(tmp_path_factory.mktemp("redis"))
    yield server
    server.close()


@pytest.fixture
def payload() -> Callable[..., dict[str, object]]:
    """A right message with what the test says instead."""

    def make(**changes: object) -> dict[str, object]:
        return {"id": "job-1", "type": "acme", "prompt": "a toy", "user_id": USER, **changes}

    return make


@pytest.fixture
def a_payload() -> Payload:
    return Payload(id="job-1", type="acme", prompt="a toy", user_id=USER)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory of installed distributions, on the path of this process and of its children."""
    directory = tmp_path / "site"
    directory.mkdir()
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(directory))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(directory), os.environ.get("PYTHONPATH", "")]).rstrip(":"))
    yield directory
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "") or "").startswith(str(directory)):
            del sys.modules[name]


@pytest.fixture
def install(site: Path) -> Callable[..., None]:
    """Installs a plugin as pip leaves it: ``install(name, source)``."""

    def install_one(name: str, source: str, **more: str) -> None:
        make_distribution(site, name, source, **more)
        importlib.invalidate_caches()

    return install_one


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Callable[..., PluginHost]]:
    """Makes hosts that are closed after the test: ``host(plugin_of(source))``."""
    made: list[PluginHost] = []

    def make(*plugins: object, **parts: object) -> PluginHost:
        made.append(PluginHost(tmp_path / f"host-{len(made)}", *plugins, **parts))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def engine_of(site: Path) -> Iterator[Callable[..., EngineProcess]]:
    """Makes engine processes that load the distributions named, and ends them after the test."""
    made: list[EngineProcess] = []

    def make(*names: str, start_seconds: float = 20.0, **environ: str) -> EngineProcess:
        registry = load_registry(Settings(allow_plugins=list(names)))
        whole = {**os.environ, "OURVIDZ_ALLOW_PLUGINS": ",".join(names), "OURVIDZ_DEVICE": "cpu", **environ}
        made.append(EngineProcess(registry, whole, start_seconds=start_seconds))
        made[-1].registry = registry
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def impatient() -> Iterator[None]:
    """Clients are asked as often as ever, without the waits between."""
    stamina.set_testing(True, attempts=4)
    yield
    stamina.set_testing(False)
