"""A job on several GPUs that loses one of them: what the ranks of a plugin have to survive, in a real engine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import psutil
import pytest

from ourvidz_core.engine.host import EngineProcess
from ourvidz_core.errors import EngineUnusable
from ourvidz_core.plugins.loading import load_registry
from ourvidz_core.settings import engine_environment, load
from ourvidz_core.wire.artifacts import FinishedGeneration
from ourvidz_core.wire.payloads import Payload


def outlive_lost_ranks(
    payload: Payload, environment: Mapping[str, str], *, module: str, work_dir: Path, timeout_seconds: float = 300.0
) -> FinishedGeneration:
    """Run the job of ``payload``, kill its other ranks at the first step, and run it again, to what is answered.

    The plugins are those that are installed, ``environment`` is set for the engine, and ``module`` is the
    program of the ranks, as :class:`ourvidz_core.engine.ranks.Followers` gets it. Fails unless the job
    hears of the loss, has as many ranks the second time, and nobody is left when the engine is closed.
    """
    registry = load_registry(load({}))
    job = registry.get(payload.type).parse_job(payload)
    engine = EngineProcess(registry, {**engine_environment(load({})), **environment})
    killed = set[int]()

    def kill_ranks(*_: object) -> None:
        for process in _ranks_of(engine, module):
            killed.add(process.pid)
            process.kill()

    try:
        with pytest.raises(EngineUnusable, match=r"rank \d+ .* died: signal SIGKILL"):
            engine.run(job, work_dir=work_dir, timeout_seconds=timeout_seconds, on_progress=kill_ranks)
        finished = engine.run(job, work_dir=work_dir, timeout_seconds=timeout_seconds)
        ranks = _ranks_of(engine, module)
    finally:
        engine.close()
    assert len(ranks) == len(killed), f"{len(killed)} ranks were killed, and {len(ranks)} took their place"
    _, left = psutil.wait_procs(ranks, timeout=10.0)
    assert not left, f"ranks outlived their engine: {left}"
    return finished


def _ranks_of(engine: EngineProcess, module: str) -> list[psutil.Process]:
    assert engine.pid is not None
    children = psutil.Process(engine.pid).children(recursive=True)
    return [process for process in children if module in process.cmdline()]
