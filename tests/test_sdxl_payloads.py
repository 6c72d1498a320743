"""The producer's own SDXL messages, byte for byte, from a Redis list to stored pictures and one callback each."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

from ourvidz_core.engine.provenance import DIGITAL_SOURCE_TYPE
from ourvidz_core.testing.fixtures import isolated_host
from ourvidz_core.testing.servers import FileServer
from tests.deployment import EXAMPLE_HOST, Run, names, payload, run_payloads

pytest.importorskip("ourvidz_sdxl")

# One module-wide fixture runs every message.
pytestmark = pytest.mark.timeout(300)

ALL = names("sdxl_*.json")
BLOB = "sdxl_image_fast_ref_blob_upload"
AGAIN = ["sdxl_image_fast_n3", "sdxl_image_fast_ref_style"]
REFERENCE = "/object/sign/reference_images/u/1752950000000-ref.png"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from examples.models import tiny_sdxl

    directory = tmp_path_factory.mktemp("sdxl") / "model"
    tiny_sdxl.save_directory(tiny_sdxl.build_pipeline(), directory)
    return directory


@pytest.fixture(scope="module")
def picture() -> bytes:
    buffer = io.BytesIO()
    Image.radial_gradient("L").resize((480, 832)).convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def run(model: Path, picture: bytes, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """All messages, by one worker."""
    directory = tmp_path_factory.mktemp("payloads")
    with FileServer({REFERENCE: picture}) as server:
        return run_payloads(directory, ALL, "sdxl_queue", server, OURVIDZ_SDXL_MODEL=str(model))


@pytest.mark.parametrize("name", [name for name in ALL if name != BLOB])
def test_a_message_of_the_producer_completes_with_the_pictures_it_asked_for(run: Run, name: str) -> None:
    asked = payload(name)
    assert [body["status"] for body in run.all(name)] == ["processing", "completed"]
    body = run.last(name)
    count = asked["config"]["num_images"]
    assert body["assets"] == [f"{asked['user_id']}/{asked['id']}_{index}.png" for index in range(count)]
    assert body["metadata"]["num_images"] == count
    assert body["metadata"]["steps"] <= {"fast": 15, "high": 25}[asked["type"].rpartition("_")[2]]
    assert {"size", "sample_steps", "sample_shift"} <= set(body["metadata"]["ignored_config"])
    assert [picture.size for picture in run.pictures(name)] == [(128, 128)] * count


def test_a_seed_of_zero_is_honoured(run: Run) -> None:
    assert run.last("sdxl_image_fast_seed0")["metadata"]["seed"] == 0


def test_three_images_are_three_different_images(run: Run) -> None:
    pictures = [picture.convert("RGB").tobytes() for picture in run.pictures("sdxl_image_fast_n3")]
    assert len(set(pictures)) == 3


def test_a_reference_that_only_a_browser_has_fails_the_job_with_its_reason(run: Run) -> None:
    body = run.last(BLOB)
    assert body["status"] == "failed"
    assert body["assets"] == []
    assert body["metadata"]["error_type"] == "ReferenceRefused"
    assert "blob:" in body["error_message"]


@pytest.mark.parametrize("name", ["sdxl_image_fast_ref_style", "sdxl_image_fast_regenerate"])
def test_a_reference_is_applied_and_the_method_named(run: Run, name: str) -> None:
    metadata = run.last(name)["metadata"]
    assert (metadata["reference_applied"], metadata["reference_method"]) == (True, "img2img")
    assert metadata["reference_mode"] == "single"


def test_another_set_up_stores_identical_bytes_under_identical_paths(
    run: Run, model: Path, picture: bytes, tmp_path: Path
) -> None:
    import torch

    torch.set_num_threads(1)
    with isolated_host(
        tmp_path,
        plugins=["ourvidz-sdxl"],
        environ={"OURVIDZ_SDXL_MODEL": str(model)},
        references={f"{EXAMPLE_HOST.decode()}{REFERENCE}?token=t": picture},
    ) as host:
        for name in AGAIN:
            host.run(payload(name))
        stored = [path for path in host.assets_dir.rglob("*") if path.is_file()]
        assert len(run.objects) == 8
        assert len(stored) == 4
        for path in stored:
            bucket, _, key = path.relative_to(host.assets_dir).as_posix().partition("/")
            assert path.read_bytes() == run.objects[bucket, key].body


def test_a_picture_says_what_made_it(run: Run) -> None:
    (picture,) = run.pictures("sdxl_image_high")
    facts = picture.text
    assert facts["prompt"].startswith("a lighthouse")
    assert facts["seed"] == str(run.last("sdxl_image_high")["metadata"]["seed"])
    assert facts["digital_source_type"] == DIGITAL_SOURCE_TYPE
    assert DIGITAL_SOURCE_TYPE in facts["XML:com.adobe.xmp"]
