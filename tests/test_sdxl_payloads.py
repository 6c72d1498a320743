"""The producer's own SDXL messages, byte for byte, from a Redis list to stored pictures and one callback each."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import redis
from attrs import frozen
from PIL import Image

from ourvidz_core.delivery.embedded import EmbeddedRedis
from ourvidz_core.delivery.redis_queue import RedisQueue
from ourvidz_core.engine.provenance import DIGITAL_SOURCE_TYPE
from ourvidz_core.testing.servers import FileServer, StoredObject, SupabaseServer

pytest.importorskip("ourvidz_sdxl")

# One module-wide fixture runs every message twice.
pytestmark = pytest.mark.timeout(300)

ROOT = Path(__file__).parent.parent
PAYLOADS = sorted((ROOT / "examples/payloads").glob("sdxl_*.json"))
EXAMPLE_HOST = b"https://storage.example.test"
BLOB = "sdxl_image_fast_ref_blob_upload"


@frozen
class Run:
    """What one fresh set-up made of all messages."""

    callbacks: Mapping[str, list[dict]]
    objects: Mapping[tuple[str, str], StoredObject]
    dead: int

    def last(self, name: str) -> dict:
        return self.callbacks[message_id(name)][-1]

    def pictures(self, name: str) -> list[Image.Image]:
        body = self.last(name)
        objects = [self.objects[body["metadata"]["bucket"], asset] for asset in body["assets"]]
        return [Image.open(io.BytesIO(stored.body)) for stored in objects]


def message_id(name: str) -> str:
    return json.loads((ROOT / "examples/payloads" / f"{name}.json").read_text("utf-8"))["id"]


def run_all(directory: Path, model: Path, server: FileServer) -> Run:
    embedded = EmbeddedRedis(directory / "redis")
    with SupabaseServer() as supabase, redis.Redis.from_url(embedded.address) as client:
        for path in PAYLOADS:
            # The one change: the example host does not exist, so its paths are served from here.
            client.lpush("sdxl_queue", path.read_bytes().replace(EXAMPLE_HOST, server.url.encode()))
        environ = {name: value for name, value in os.environ.items() if not name.startswith(("OURVIDZ_", "SUPABASE_"))}
        done = subprocess.run(
            [sys.executable, "-m", "ourvidz_core", "worker", "--queues", "sdxl_queue", "--drain"],
            env={
                **environ,
                "OMP_NUM_THREADS": "1",  # two threads of one small model wait for each other more than they work
                "REDIS_URL": embedded.address,
                "SUPABASE_URL": supabase.url,
                "SUPABASE_SERVICE_KEY": supabase.key,
                "OURVIDZ_SDXL_MODEL": str(model),
                "OURVIDZ_REFERENCE_ALLOWED_HOSTS": server.host,
                "OURVIDZ_STATE_DIR": str(directory / "state"),
                "OURVIDZ_WORK_DIR": str(directory / "work"),
            },
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        callbacks: dict[str, list[dict]] = {}
        for request in supabase.callbacks:
            callbacks.setdefault(request.json()["job_id"], []).append(request.json())
        queue = RedisQueue(client)
        depth = queue.depth("sdxl_queue")
        assert (depth.waiting, depth.in_flight, depth.retrying, depth.callbacks) == (0, 0, 0, 0)
        dead = depth.dead
    embedded.close()
    return Run(callbacks, dict(supabase.objects), dead)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Run]:
    """Two runs that share nothing but the model's files and the reference image."""
    directory = tmp_path_factory.mktemp("payloads")
    model = directory / "model"
    subprocess.run([sys.executable, str(ROOT / "examples/models/tiny_sdxl.py"), str(model)], check=True)
    picture = io.BytesIO()
    Image.radial_gradient("L").resize((480, 832)).convert("RGB").save(picture, "PNG")
    paths = {"/object/sign/reference_images/u/1752950000000-ref.png": picture.getvalue()}
    with FileServer(paths) as server:
        return run_all(directory / "one", model, server), run_all(directory / "two", model, server)


@pytest.mark.parametrize("name", [path.stem for path in PAYLOADS if path.stem != BLOB])
def test_a_message_of_the_producer_completes_with_the_pictures_it_asked_for(runs: tuple[Run, Run], name: str) -> None:
    run, _ = runs
    payload = json.loads((ROOT / "examples/payloads" / f"{name}.json").read_text("utf-8"))
    assert [body["status"] for body in run.callbacks[payload["id"]]] == ["processing", "completed"]
    body = run.last(name)
    count = payload["config"]["num_images"]
    assert body["assets"] == [f"{payload['user_id']}/{payload['id']}_{index}.png" for index in range(count)]
    assert body["metadata"]["num_images"] == count
    assert body["metadata"]["steps"] <= {"fast": 15, "high": 25}[payload["type"].rpartition("_")[2]]
    assert {"size", "sample_steps", "sample_shift"} <= set(body["metadata"]["ignored_config"])
    assert [picture.size for picture in run.pictures(name)] == [(128, 128)] * count


def test_a_seed_of_zero_is_honoured(runs: tuple[Run, Run]) -> None:
    assert runs[0].last("sdxl_image_fast_seed0")["metadata"]["seed"] == 0


def test_three_images_are_three_different_images(runs: tuple[Run, Run]) -> None:
    pictures = [picture.convert("RGB").tobytes() for picture in runs[0].pictures("sdxl_image_fast_n3")]
    assert len(set(pictures)) == 3


def test_a_reference_that_only_a_browser_has_fails_the_job_with_its_reason(runs: tuple[Run, Run]) -> None:
    body = runs[0].last(BLOB)
    assert body["status"] == "failed"
    assert body["assets"] == []
    assert body["metadata"]["error_type"] == "ReferenceRefused"
    assert "blob:" in body["error_message"]


@pytest.mark.parametrize("name", ["sdxl_image_fast_ref_style", "sdxl_image_fast_regenerate"])
def test_a_reference_is_applied_and_the_method_named(runs: tuple[Run, Run], name: str) -> None:
    metadata = runs[0].last(name)["metadata"]
    assert (metadata["reference_applied"], metadata["reference_method"]) == (True, "img2img")
    assert metadata["reference_mode"] == "single"


def test_two_fresh_set_ups_store_identical_bytes_under_identical_paths(runs: tuple[Run, Run]) -> None:
    one, two = runs
    assert one.objects.keys() == two.objects.keys()
    assert len(one.objects) == 8
    assert all(one.objects[key].body == two.objects[key].body for key in one.objects)


def test_a_picture_says_what_made_it(runs: tuple[Run, Run]) -> None:
    (picture,) = runs[0].pictures("sdxl_image_high")
    facts = picture.text
    assert facts["prompt"].startswith("a lighthouse")
    assert facts["seed"] == str(runs[0].last("sdxl_image_high")["metadata"]["seed"])
    assert facts["digital_source_type"] == DIGITAL_SOURCE_TYPE
    assert DIGITAL_SOURCE_TYPE in facts["XML:com.adobe.xmp"]
