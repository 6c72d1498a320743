"""The producer's own SDXL messages, byte for byte, from a Redis list to stored pictures and one callback each."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from ourvidz_core.engine.provenance import DIGITAL_SOURCE_TYPE
from ourvidz_core.testing.servers import FileServer
from tests.deployment import Run, names, payload, run_payloads

pytest.importorskip("ourvidz_sdxl")

# One module-wide fixture runs every message.
pytestmark = pytest.mark.timeout(300)

ALL = names("sdxl_*.json")
BLOB = "sdxl_image_fast_ref_blob_upload"
AGAIN = ["sdxl_image_fast_n3", "sdxl_image_fast_ref_style"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Run]:
    """All messages, and some again in a run that shares nothing but the model's files and the reference image."""
    from examples.models import tiny_sdxl

    directory = tmp_path_factory.mktemp("payloads")
    model = directory / "model"
    tiny_sdxl.save_directory(tiny_sdxl.build_pipeline(), model)
    picture = io.BytesIO()
    Image.radial_gradient("L").resize((480, 832)).convert("RGB").save(picture, "PNG")
    paths = {"/object/sign/reference_images/u/1752950000000-ref.png": picture.getvalue()}
    with FileServer(paths) as server:
        one, two = (
            run_payloads(directory / name, chosen, "sdxl_queue", server, OURVIDZ_SDXL_MODEL=str(model))
            for name, chosen in (("one", ALL), ("two", AGAIN))
        )
    return one, two


@pytest.mark.parametrize("name", [name for name in ALL if name != BLOB])
def test_a_message_of_the_producer_completes_with_the_pictures_it_asked_for(runs: tuple[Run, Run], name: str) -> None:
    run, _ = runs
    asked = payload(name)
    assert [body["status"] for body in run.all(name)] == ["processing", "completed"]
    body = run.last(name)
    count = asked["config"]["num_images"]
    assert body["assets"] == [f"{asked['user_id']}/{asked['id']}_{index}.png" for index in range(count)]
    assert body["metadata"]["num_images"] == count
    assert body["metadata"]["steps"] <= {"fast": 15, "high": 25}[asked["type"].rpartition("_")[2]]
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
    assert len(one.objects) == 8
    assert len(two.objects) == 4
    assert all(one.objects[key].body == two.objects[key].body for key in two.objects)


def test_a_picture_says_what_made_it(runs: tuple[Run, Run]) -> None:
    (picture,) = runs[0].pictures("sdxl_image_high")
    facts = picture.text
    assert facts["prompt"].startswith("a lighthouse")
    assert facts["seed"] == str(runs[0].last("sdxl_image_high")["metadata"]["seed"])
    assert facts["digital_source_type"] == DIGITAL_SOURCE_TYPE
    assert DIGITAL_SOURCE_TYPE in facts["XML:com.adobe.xmp"]
