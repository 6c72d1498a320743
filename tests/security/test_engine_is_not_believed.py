"""An engine runs plugins: what it says of its files and of whose they are is checked by the worker."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import attrs
import pytest
from PIL import Image

from ourvidz_core.testing.host import PluginHost, plugin_of
from ourvidz_core.wire.artifacts import Artifact, FinishedGeneration, Generation
from ourvidz_core.wire.jobs import Job

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
