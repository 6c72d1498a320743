"""What every plugin must do right, and what this one does."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from ourvidz_core.testing import ConformanceSuite, PluginHost

SMALL = "https://storage.example.test/small.png"
MESSAGE = {"id": "job-1", "type": "acme_upscale", "user_id": "user-1", "prompt": "", "config": {"image": SMALL}}


class TestConformance(ConformanceSuite):
    distribution = "acme-upscale"


@pytest.fixture
def host_plugins() -> list[str]:
    return ["acme-upscale"]


@pytest.fixture
def host_references() -> dict[str, bytes]:
    picture = io.BytesIO()
    Image.linear_gradient("L").resize((20, 10)).save(picture, "PNG")
    return {SMALL: picture.getvalue()}


def test_an_image_is_enlarged_by_the_factor(host: PluginHost) -> None:
    outcome = host.run({**MESSAGE, "config": {"image": SMALL, "factor": 4}})
    assert outcome.error is None
    (asset,) = outcome.assets
    with Image.open(host.assets_dir / asset.bucket / asset.path) as image:
        assert image.size == (80, 40)


def test_a_message_without_an_image_is_refused(host: PluginHost) -> None:
    outcome = host.run({**MESSAGE, "config": {}})
    assert outcome.error is not None
    assert "$.config.image" in outcome.error.message


def test_a_worker_reports_what_it_made(host: PluginHost) -> None:
    host.push(MESSAGE)
    host.work()
    started, completed = host.callbacks_of("job-1")
    assert (started["status"], completed["status"]) == ("processing", "completed")
    assert completed["assets"] == ["user-1/job-1_0.png"]
    assert completed["metadata"]["model"] == "lanczos"
