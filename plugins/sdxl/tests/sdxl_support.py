"""What the tests share: messages as the producer sends them, and what is made of them."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
from numpy.typing import NDArray
from ourvidz_sdxl.job_types import JOB_TYPES
from ourvidz_sdxl.plugin import generate, parse_job
from ourvidz_sdxl.settings import SdxlSettings
from PIL import Image

from ourvidz_core.testing.doubles import RecordingContext
from ourvidz_core.wire.artifacts import Artifact, Generation
from ourvidz_core.wire.job_types import JobType
from ourvidz_core.wire.jobs import Job, Reference, References
from ourvidz_core.wire.payloads import Payload, structure_payload

if TYPE_CHECKING:
    from ourvidz_sdxl.pipeline import SdxlPipeline

REPOSITORY = Path(__file__).resolve().parents[3]
PAYLOADS = REPOSITORY / "examples" / "payloads"
TYPES: Mapping[str, JobType] = {job_type.name: job_type for job_type in JOB_TYPES}


def payload(job_type: str = "sdxl_image_fast", **changes: Any) -> Payload:
    """A message with ``changes`` to its keys."""
    message = {
        "id": "00000000-0000-4000-8000-000000000001",
        "type": job_type,
        "user_id": "11111111-1111-4111-8111-111111111111",
        "prompt": "a lighthouse on a rocky coast",
        **changes,
    }
    return structure_payload(message)


def produced(name: str) -> Payload:
    """A message that the real producer emitted."""
    return structure_payload(json.loads((PAYLOADS / f"{name}.json").read_bytes()))


def parsed(message: Payload) -> Job:
    """What the plugin makes of a message."""
    return parse_job(TYPES[message.type], message)


def job(job_type: str = "sdxl_image_fast", *, reference: Path | None = None, **changes: Any) -> Job:
    """A parsed message, its reference image as if it had been fetched."""
    made = parsed(payload(job_type, **changes))
    if reference is None:
        return made
    references = References(single=Reference(url="https://images.example.test/r.png", path=reference))
    return attrs.evolve(made, references=references)


def pixels(artifact: Artifact) -> NDArray[np.int16]:
    """What the file shows, in numbers that can be subtracted."""
    return np.asarray(Image.open(artifact.path).convert("RGB")).astype(np.int16)


def made(a_job: Job, context: RecordingContext) -> Generation:
    """What the plugin makes of a job."""
    generation = generate(a_job, context)
    assert isinstance(generation, Generation)
    assert generation.finish is not None
    return attrs.evolve(generation, artifacts=generation.finish(), finish=None)


def warm_model(context: RecordingContext) -> SdxlPipeline:
    """The model that ``context`` uses, once a job has loaded it."""
    return context.models.get(f"sdxl:{context.settings(SdxlSettings).model}", _not_loaded)


def _not_loaded() -> SdxlPipeline:
    raise AssertionError("no job has loaded the model yet")


def load_example(name: str) -> ModuleType:
    """A script of ``examples/models`` as a module."""
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "examples" / "models" / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
