"""An engine runs plugins: what it says of its files and of whose they are is checked by the worker."""

from __future__ import annotations

import os
import pickle
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import attrs
import pytest
from PIL import Image

from ourvidz_core.engine.host import EngineProcess
from ourvidz_core.errors import JobError
from ourvidz_core.plugins.loading import load_registry
from ourvidz_core.settings import Settings
from ourvidz_core.testing.distributions import make_distribution
from ourvidz_core.testing.host import PluginHost, plugin_of
from ourvidz_core.wire.artifacts import Artifact, FinishedGeneration, Generation
from ourvidz_core.wire.jobs import Job
from ourvidz_core.wire.payloads import Payload

ACME = """
from ourvidz_core import JobType, hookimpl

@hookimpl
def register_job_types():
    yield JobType(name="acme", queue="acme_queue", content_type="image")
"""


@attrs.frozen
class LyingEngine:
    """Says what the test makes of a sound result."""

    lie: Callable[[FinishedGeneration, Path], FinishedGeneration]

    def run(self, job: Job, *, work_dir: Path, **_: object) -> FinishedGeneration:
        path = work_dir / "output_0.png"
        Image.linear_gradient("L").save(path)
        generation = Generation(artifacts=(Artifact(path=path, media_type="image/png"),))
        return self.lie(FinishedGeneration(job=job, generation=generation, seconds=1.0), work_dir)

    def close(self) -> None:
        """There is nothing to end."""


def naming(path_in: Callable[[Path], Path]) -> Callable[[FinishedGeneration, Path], FinishedGeneration]:
    def lie(finished: FinishedGeneration, work_dir: Path) -> FinishedGeneration:
        artifact = Artifact(path=path_in(work_dir), media_type="image/png")
        return attrs.evolve(finished, generation=Generation(artifacts=(artifact,)))

    return lie


def link_to_passwords(work_dir: Path) -> Path:
    path = work_dir / "output_1.png"
    path.symlink_to("/etc/passwd")
    return path


def told(lie: Callable[[FinishedGeneration, Path], FinishedGeneration], root: Path) -> tuple[dict, list[Path]]:
    with PluginHost(root, plugin_of(ACME), engine=LyingEngine(lie)) as host:
        outcome = host.run({"id": "job-1", "type": "acme", "prompt": "", "user_id": "u"})
        assert outcome.callback is not None
        return outcome.callback.to_json(), [path for path in host.assets_dir.rglob("*") if path.is_file()]


def test_an_engine_that_tells_the_truth_is_believed(tmp_path: Path) -> None:
    body, stored = told(lambda finished, _: finished, tmp_path)
    assert body["status"] == "completed"
    assert [path.name for path in stored] == ["job-1_0.png"]


@pytest.mark.parametrize(
    "path_in",
    [
        lambda work_dir: Path("/etc/passwd"),
        lambda work_dir: Path("/proc/self/environ"),
        lambda work_dir: work_dir / ".." / ".." / "secret.png",
        link_to_passwords,
    ],
    ids=["another file", "the worker's environment", "a path upwards", "a link"],
)
def test_no_file_outside_the_jobs_directory_is_stored(path_in: Callable[[Path], Path], tmp_path: Path) -> None:
    body, stored = told(naming(path_in), tmp_path)
    assert (body["status"], body["metadata"]["error_type"]) == ("failed", "ArtifactError")
    assert stored == []


@pytest.mark.parametrize("changes", [{"user_id": "victim"}, {"id": "job-2"}], ids=["user", "job"])
def test_no_file_is_stored_under_anothers_name(changes: dict[str, str], tmp_path: Path) -> None:
    body, stored = told(lambda finished, _: attrs.evolve(finished, job=attrs.evolve(finished.job, **changes)), tmp_path)
    assert (body["job_id"], body["status"]) == ("job-1", "failed")
    assert stored == []


# -- what is said over the pipe

FORGER = """
import os, stat, struct
from attrs import frozen
from ourvidz_core import Artifact, Generation, JobType, hookimpl

@frozen(kw_only=True)
class Config:
    says: str = ""

@hookimpl
def register_job_types():
    yield JobType(name="acme", queue="acme_queue", content_type="image", preset=Config(), timeout_seconds=20)

@hookimpl
def generate(job, context):
    if job.config.says:
        said = bytes.fromhex(job.config.says)
        for fd in range(3, 30):  # the pipe to the worker is among them
            try:
                if stat.S_ISSOCK(os.fstat(fd).st_mode): os.write(fd, said)
            except OSError: pass
    from PIL import Image
    path = context.output_path("png")
    Image.linear_gradient("L").save(path)
    return Generation(artifacts=(Artifact(path=path, media_type="image/png"),))
"""


def framed(message: bytes) -> bytes:
    """As ``multiprocessing.connection`` sends it."""
    return struct.pack("!i", len(message)) + message


FORGED = {
    "no JSON": framed(b"done!"),
    "no text": framed(b"\xff\xfe"),
    "no object": framed(b"[1]"),
    "no kind": framed(b"{}"),
    "an unknown kind": framed(b'{"kind": "Pay"}'),
    "a kind without its fields": framed(b'{"kind": "JobFinished"}'),
    "a worker's kind": framed(b'{"kind": "CancelJob"}'),
    "progress that is none": framed(b'{"kind": "Progress", "stage": 1, "step": "x", "total": {}}'),
    "an error of no class": framed(b'{"kind": "JobBroken", "class": "Settings", "message": 3}'),
    "a hundred thousand brackets": framed(b"[" * 100_000),
    "a pickle": framed(pickle.dumps({"kind": "JobFinished"})),
    "a size beyond the limit": struct.pack("!i", 2**31 - 1) + b"x",
    "a negative size": struct.pack("!i", -5),
}


@pytest.fixture(scope="module")
def forger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[EngineProcess, Path]]:
    site = tmp_path_factory.mktemp("site")
    make_distribution(site, "ourvidz-forger", FORGER)
    registry = load_registry(
        Settings(allow_plugins=["ourvidz-forger"]), [plugin_of(FORGER, distribution="ourvidz-forger")]
    )
    environ = {
        **os.environ,
        "PYTHONPATH": str(site),
        "OURVIDZ_ALLOW_PLUGINS": "ourvidz-forger",
        "OURVIDZ_DEVICE": "cpu",
    }
    engine = EngineProcess(registry, environ)
    yield engine, tmp_path_factory.mktemp("work")
    engine.close()


def run(forger: tuple[EngineProcess, Path], says: bytes) -> FinishedGeneration:
    engine, work_dir = forger
    registry = engine._registry
    payload = Payload(id="job-1", type="acme", prompt="", user_id="u", config={"says": says.hex()})
    return engine.run(registry.get("acme").parse_job(payload), work_dir=work_dir, timeout_seconds=20)


@pytest.mark.parametrize("what", FORGED)
def test_whatever_an_engine_says_is_an_error_of_that_job_and_the_next_one_runs(
    what: str, forger: tuple[EngineProcess, Path]
) -> None:
    with suppress(JobError):  # a forged message that is sound in form is taken at its word
        run(forger, FORGED[what])
    assert len(run(forger, b"").generation.artifacts) == 1
