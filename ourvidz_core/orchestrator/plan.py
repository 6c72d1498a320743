"""Which workers there shall be: from flags or from the tables of the settings file, with their share of each GPU."""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
from attrs import field, frozen

from ourvidz_core.doctor.gpus import GpuReport
from ourvidz_core.errors import PayloadError, SettingsError
from ourvidz_core.settings import variable_of
from ourvidz_core.wire.job_types import JobType
from ourvidz_core.wire.payloads import structure

VISIBLE = "CUDA_VISIBLE_DEVICES"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
#: Of its share, what a worker's models and their work may take; the rest is for the CUDA context and for gaps.
_WARM_SHARE = 0.9


@frozen(kw_only=True)
class WorkerTable:
    """A table ``[[ourvidz.workers]]`` of the settings file."""

    name: str
    #: Queues to take jobs from; all unless said.
    queues: tuple[str, ...] = ()
    #: Numbers of the GPUs that it sees; all unless said. It generates on the first.
    gpus: tuple[int, ...] = ()
    #: Environment variables that differ from the orchestrator's own.
    environment: Mapping[str, str] = field(factory=dict)


@frozen(kw_only=True)
class PlannedWorker:
    """One worker to run."""

    name: str
    #: What it is called in the queue's books and on the board.
    worker_name: str
    queues: tuple[str, ...]
    #: Numbers of its GPUs; none where it was given none.
    gpus: tuple[str, ...] = ()
    #: The command after ``ourvidz``.
    arguments: tuple[str, ...]
    environment: Mapping[str, str] = field(factory=dict, repr=False)
    #: Its share of the memory of its GPU; None where none was measured.
    memory_gb: float | None = None


def tables_of(values: Sequence[Mapping[str, Any]]) -> list[WorkerTable]:
    """The tables of the settings file, checked.

    :raises SettingsError: one says something that it may not, and which.
    """
    tables = []
    for number, value in enumerate(values, start=1):
        known = attrs.fields_dict(WorkerTable)
        if unknown := [key for key in value if key not in known]:
            raise SettingsError(
                f"[[ourvidz.workers]] number {number} has {', '.join(unknown)}; it may have {', '.join(known)}"
            )
        try:
            tables.append(structure(value, WorkerTable, path=f"[[ourvidz.workers]] number {number}"))
        except PayloadError as error:
            raise SettingsError(error.message) from None
        for name, text in tables[-1].environment.items():
            if not name or "=" in name or "\0" in name + text:  # no process can be started with it
                raise SettingsError(f"[[ourvidz.workers]] number {number} has {name!r} in its environment")
    return tables


def tables_from_flags(
    queues: Sequence[str], *, workers: int | None, gpus: Sequence[int], per_queue: bool, gpus_per_worker: int = 1
) -> list[WorkerTable]:
    """A worker for all queues or one for each, ``workers`` times; each time on the next of ``gpus``, or next few.

    :raises SettingsError: the GPUs cannot be dealt out so.

    >>> [table.name for table in tables_from_flags(["a", "b"], workers=None, gpus=[0, 1], per_queue=True)]
    ['a-gpu0', 'a-gpu1', 'b-gpu0', 'b-gpu1']
    """
    if gpus_per_worker > 1 and (not gpus or len(gpus) % gpus_per_worker):
        raise SettingsError(
            f"{len(gpus)} GPUs cannot be dealt out in groups of {gpus_per_worker}; name others in --gpus"
        )
    groups = [tuple(gpus[first : first + gpus_per_worker]) for first in range(0, len(gpus), gpus_per_worker)]
    count = workers if workers is not None else max(len(groups), 1)
    tables = []
    for base, chosen in [(queue, (queue,)) for queue in queues] if per_queue else [("worker", tuple(queues))]:
        for number in range(count):
            name = base if count == 1 and not gpus else f"{base}-{number + 1}"
            mine = groups[number % len(groups)] if groups else ()
            if mine:
                name = f"{base}-gpu{'-'.join(map(str, mine))}"
                name += f"-{number // len(groups) + 1}" if count > len(groups) else ""
            tables.append(WorkerTable(name=name, queues=chosen, gpus=mine))
    return tables


def plan_workers(
    tables: Sequence[WorkerTable],
    queues: Sequence[str],
    *,
    environ: Mapping[str, str],
    health_address: str = "off",
    arguments: Sequence[str] = (),
    host: str | None = None,
) -> list[PlannedWorker]:
    """The workers of ``tables``; ``queues`` are all that there are.

    The first answers at ``health_address``, each other one at the next port.

    :raises SettingsError: a name is used twice or cannot be one, a queue is nobody's, a GPU is not to be seen.
    """
    # Two orchestrators of one machine need names of their own, or their workers have one place on the board.
    whose = host or environ.get(variable_of("worker_name")) or socket.gethostname()
    planned: list[PlannedWorker] = []
    for table in tables:
        if not _NAME.fullmatch(table.name):
            raise SettingsError(f"{table.name!r} cannot be a worker's name: letters, digits, '_', '.' and '-'")
        if any(table.name == other.name for other in planned):
            raise SettingsError(f"two workers are called {table.name}; rename one")
        if unknown := [queue for queue in table.queues if queue not in queues]:
            raise SettingsError(
                f"worker {table.name}: no loaded plugin owns jobs of queue {', '.join(unknown)};"
                f" the queues are {', '.join(queues) or 'none'}"
            )
        chosen = table.queues or tuple(queues)
        worker_name = f"{whose}-{table.name}"
        planned.append(
            PlannedWorker(
                name=table.name,
                worker_name=worker_name,
                queues=chosen,
                gpus=tuple(map(str, table.gpus)),
                arguments=("worker", f"--queues={','.join(chosen)}", *arguments),
                environment={
                    variable_of("worker_name"): worker_name,
                    variable_of("health_address"): _health_address(health_address, len(planned)),
                    **_device_environment(table, environ),
                    **table.environment,
                },
            )
        )
    return planned


def share_memory(
    planned: Sequence[PlannedWorker], report: GpuReport, job_types: Sequence[JobType], *, device: str, is_checked: bool
) -> list[PlannedWorker]:
    """Each worker with its share of what is free on its GPU: what its largest job type needs, and of the rest as much
    as its neighbours.

    :raises SettingsError: they need more than is free. Not where ``is_checked`` is false.
    """
    if device == "cpu" or not report.gpus:
        if is_checked and (wanting := [worker.name for worker in planned if worker.gpus]):
            reason = "OURVIDZ_DEVICE is cpu" if device == "cpu" else report.trouble
            raise SettingsError(f"{', '.join(wanting)} shall have a GPU, and there is none here: {reason}")
        return list(planned)
    free_gb = {str(gpu.index): gpu.free_gb for gpu in report.gpus}
    shared = dict[str, PlannedWorker]()
    for gpu in sorted({_gpu_of(worker, device) for worker in planned}):
        if gpu not in free_gb:
            raise SettingsError(f"there is no GPU {gpu} here; there are {', '.join(free_gb)}")
        here = [worker for worker in planned if _gpu_of(worker, device) == gpu]
        needs = {worker.name: _need_gb(worker, job_types) for worker in here}
        rest = free_gb[gpu] - sum(needs.values())
        if rest < 0 and is_checked:
            said = ", ".join(f"{name} {need:g}" for name, need in needs.items())
            raise SettingsError(
                f"GPU {gpu} has {free_gb[gpu]:.1f} GiB free and its workers need {sum(needs.values()):g} ({said})."
                " Let one worker serve these queues in turn, use more GPUs, or end what holds the memory"
                " (nvidia-smi); --no-checks starts them all the same"
            )
        for worker in here:
            memory_gb = max(needs[worker.name] + rest / len(here), free_gb[gpu] / len(here) if rest < 0 else 0.0)
            budget = {variable_of("vram_budget_gb"): f"{max(memory_gb * _WARM_SHARE, 0.1):.1f}"}
            shared[worker.name] = attrs.evolve(
                worker, memory_gb=round(memory_gb, 1), environment={**budget, **worker.environment}
            )
    return [shared[worker.name] for worker in planned]


def _health_address(first: str, number: int) -> str:
    host, _, port = first.rpartition(":")
    return f"{host}:{int(port) + number}" if port.isdecimal() and int(port) else first


def _device_environment(table: WorkerTable, environ: Mapping[str, str]) -> dict[str, str]:
    if not table.gpus:
        return {}
    # Numbers count what this process sees, and the variable counts what the machine has.
    visible = [item for item in environ.get(VISIBLE, "").split(",") if item]
    if visible and max(table.gpus) >= len(visible):
        raise SettingsError(f"worker {table.name}: GPU {max(table.gpus)} is not among {VISIBLE}={environ[VISIBLE]}")
    names = [visible[number] if visible else str(number) for number in table.gpus]
    return {VISIBLE: ",".join(names), variable_of("device"): "cuda"}


def _gpu_of(worker: PlannedWorker, device: str) -> str:
    """The GPU that a worker generates on."""
    if worker.gpus:
        return worker.gpus[0]
    return device.partition(":")[2] or "0"


def _need_gb(worker: PlannedWorker, job_types: Sequence[JobType]) -> float:
    return max((job_type.vram_gb for job_type in job_types if job_type.queue in worker.queues), default=0.0)
