"""The host that a plugin's tests get: its own settings, the real walk, the real worker."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from attrs import frozen

from ourvidz_core.delivery.embedded import EmbeddedRedis
from ourvidz_core.delivery.queue import Queue
from ourvidz_core.delivery.redis_queue import RedisQueue
from ourvidz_core.errors import PluginError, ReferenceUnavailable
from ourvidz_core.settings import load_section
from ourvidz_core.testing.fixtures import environment, isolated_host
from ourvidz_core.testing.host import plugin_of
from ourvidz_core.testing.stand_in import stand_in_plugin

MESSAGE = {"id": "job-1", "type": "stand_in", "user_id": "user-1", "prompt": "a toy"}
WITH_PICTURE = """
from PIL import Image
from ourvidz_core import Artifact, Generation, JobType, hookimpl

@hookimpl
def register_job_types():
    yield JobType(name="copy", queue="copy_queue", content_type="image")

@hookimpl
def generate(job, context):
    path = context.output_path("png")
    path.write_bytes(job.references.single.path.read_bytes())
    return Generation(artifacts=(Artifact(path=path, media_type="image/png"),))
"""


@frozen(kw_only=True)
class AcmeSettings:
    SECTION = "acme"

    model: str = "none"


def test_a_host_sees_the_settings_it_is_given_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OURVIDZ_ACME_MODEL", "of this machine")
    monkeypatch.setenv("REDIS_URL", "redis://of-this-machine")
    with environment({}):
        assert load_section(AcmeSettings).model == "none"
        assert "REDIS_URL" not in os.environ
    with environment({"OURVIDZ_ACME_MODEL": "of the test"}):
        assert load_section(AcmeSettings).model == "of the test"
    assert load_section(AcmeSettings).model == "of this machine"
    assert os.environ["REDIS_URL"] == "redis://of-this-machine"


def test_the_settings_of_the_machine_are_back_after_a_test_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OURVIDZ_ACME_MODEL", "of this machine")
    with pytest.raises(RuntimeError), environment({}):
        raise RuntimeError
    assert os.environ["OURVIDZ_ACME_MODEL"] == "of this machine"


@pytest.fixture(params=["in memory", "embedded Redis"])
def queue(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Queue | None]:
    if request.param == "in memory":
        yield None
        return
    server = EmbeddedRedis(tmp_path / "redis")
    queue = RedisQueue.connect(server.address, on_close=server.close)
    yield queue
    queue.close()


def test_a_worker_takes_all_that_waits_and_reports_each_job(tmp_path: Path, queue: Queue | None) -> None:
    with isolated_host(tmp_path, plugins=[stand_in_plugin()], environ={}, references={}, queue=queue) as host:
        host.push({**MESSAGE, "id": "wrong", "config": {"width": "wide"}})
        host.push({**MESSAGE, "id": "right", "config": {"width": 20}})
        host.work()
        (failed,) = host.callbacks_of("wrong")
        assert failed["metadata"]["error_type"] == "PayloadError"
        assert [body["status"] for body in host.callbacks_of("right")] == ["processing", "completed"]
        assert host.callbacks_of("nobody") == []
        host.push({**MESSAGE, "id": "later", "type": "stand_in_command"})
        host.work()
        assert host.callbacks_of("later")[-1]["assets"] == ["user-1/later_0.png"]
    assert (tmp_path / "assets/stand_in/user-1/right_0.png").is_file()
    assert not list((tmp_path / "work").glob("worker-*"))


def test_references_are_the_pictures_that_the_test_gives(tmp_path: Path) -> None:
    from PIL import Image

    Image.linear_gradient("L").save(tmp_path / "lake.png")
    references = {
        "https://a.test/lake.png": tmp_path / "lake.png",
        "https://a.test/gone.png": ReferenceUnavailable("it is gone"),
    }
    with isolated_host(tmp_path, plugins=[plugin_of(WITH_PICTURE)], environ={}, references=references) as host:
        outcomes = {
            name: host.run({**MESSAGE, "type": "copy", "config": {"image": f"https://a.test/{name}.png"}})
            for name in ("lake", "gone")
        }
    assert outcomes["lake"].error is None
    assert str(outcomes["gone"].error) == "it is gone"
    assert "lake" not in json.dumps(outcomes["lake"].callback.to_json())


def test_a_plugin_that_is_not_installed_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(PluginError, match=r"acme-nothing is not installed as a plugin; pip install --editable"),
        isolated_host(tmp_path, plugins=["acme-nothing"], environ={}, references={}),
    ):
        pass
