"""Work directories: one for each job, and nobody's but its worker's to remove."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from ourvidz_core.worker.workspace import Workspace


def test_two_jobs_never_share_a_directory(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    with workspace.job_directory() as one, workspace.job_directory() as other:
        assert one != other
        (one / "output_0.mp4").write_bytes(b"one")
        assert not (other / "output_0.mp4").exists()
    workspace.close()


def test_a_jobs_directory_goes_with_it_and_takes_nobody_elses_files(tmp_path: Path) -> None:
    workspace, neighbour = Workspace(tmp_path), Workspace(tmp_path)
    with neighbour.job_directory() as living:
        (living / "frame.png").write_bytes(b"still needed")
        try:
            with workspace.job_directory() as failing:
                (failing / "half.png").write_bytes(b"half")
                raise RuntimeError
        except RuntimeError:
            pass
        assert not failing.exists()
        assert (living / "frame.png").read_bytes() == b"still needed"
    workspace.close()
    neighbour.close()
    assert not list(tmp_path.glob("worker-*"))


def test_what_a_killed_worker_left_is_removed_by_the_next_and_a_living_ones_is_not(tmp_path: Path) -> None:
    script = (
        "from pathlib import Path; from ourvidz_core.worker.workspace import Workspace;"
        f" made = Workspace(Path({str(tmp_path)!r})); print(made.path, flush=True); input()"
    )
    killed = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    living = Workspace(tmp_path)
    assert killed.stdout is not None
    left = Path(killed.stdout.readline().strip())
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert left.is_dir()
    following = Workspace(tmp_path)
    assert not left.exists()
    assert living.path.is_dir()
    following.close()
    living.close()
