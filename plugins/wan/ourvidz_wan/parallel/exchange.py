"""The exchange of tensors between ranks, the same code on all of them: NCCL between GPUs, gloo between processors."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from attrs import frozen
from torch.distributed.device_mesh import DeviceMesh

from ourvidz_wan.parallel.plan import RankPlan

#: How long ranks wait for each other where nobody watches them: joining, and inside a prediction.
#: The first prediction may compile, and not every rank is as quick at that.
PATIENCE = timedelta(minutes=20)

Work = Any
#: Waits until all of these are done on the host's or the device's side; may raise to stop.
Await = Callable[[Sequence[Work]], None]


@frozen(kw_only=True)
class Groups:
    """How the ranks of one plan reach each other, as one of them sees it."""

    plan: RankPlan
    rank: int
    #: The first rank of each guidance group.
    leaders: Any
    #: diffusers' configuration of what shares a prediction; None where nothing is shared.
    context: Any


def join(*, rank: int, ranks: int, device: torch.device, meeting_point: Path) -> None:
    """Become one of ``ranks`` processes that meet at a file; returns when all are there."""
    if sys.platform == "linux":
        # All ranks are on this machine: nothing of this is for the network to see.
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    is_cuda = device.type == "cuda"
    dist.init_process_group(
        "nccl" if is_cuda else "gloo",
        store=dist.FileStore(str(meeting_point), ranks),
        rank=rank,
        world_size=ranks,
        timeout=PATIENCE,
        device_id=device if is_cuda else None,
    )


def leave() -> None:
    """Be a single process again. All ranks do so, or those that are left."""
    if dist.is_initialized():
        dist.destroy_process_group()


def make_groups(plan: RankPlan, device: torch.device) -> Groups:
    """The groups of ``plan``, which is for all ranks that joined; each of them calls this."""
    return Groups(
        plan=plan,
        rank=dist.get_rank(),
        leaders=dist.new_group(list(plan.leaders)),
        context=_context_config(plan, device) if plan.context > 1 else None,
    )


def _context_config(plan: RankPlan, device: torch.device) -> Any:
    from diffusers import ContextParallelConfig, ParallelConfig

    mesh = DeviceMesh(
        device.type,
        torch.arange(plan.ranks).view(plan.guidance, 1, plan.context),
        mesh_dim_names=("guidance", "ring", "ulysses"),
    )
    config = ParallelConfig(context_parallel_config=ContextParallelConfig(ulysses_degree=plan.context, mesh=mesh))
    config.setup(dist.get_rank(), plan.ranks, device, mesh=mesh)
    return config


def send_tensors(tensors: Mapping[str, torch.Tensor]) -> list[Work]:
    """Give every rank what rank 0 has."""
    return [dist.broadcast(tensor, src=0, async_op=True) for tensor in tensors.values()]


def receive_tensors(shapes: Mapping[str, Any], device: torch.device) -> dict[str, torch.Tensor]:
    """What rank 0 gave with :func:`send_tensors`; ``shapes`` are those of :func:`shapes_of`."""
    tensors = {
        name: torch.empty(shape, dtype=getattr(torch, dtype), device=device) for name, (shape, dtype) in shapes.items()
    }
    for work in send_tensors(tensors):
        work.wait()
    return tensors


def shapes_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Shapes and types, fit for JSON."""
    return {name: (list(tensor.shape), name_of(tensor.dtype)) for name, tensor in tensors.items()}


def name_of(dtype: torch.dtype) -> str:
    """What torch calls a type.

    >>> name_of(torch.bfloat16)
    'bfloat16'
    """
    return str(dtype).removeprefix("torch.")


def predict(
    transformer: Any,
    step: Mapping[str, torch.Tensor],
    branches: Sequence[Mapping[str, Any]],
    groups: Groups,
    await_all: Await,
) -> list[torch.Tensor]:
    """One prediction for each of ``branches``; rank 0 has all of them, the others their own."""
    plan, rank = groups.plan, groups.rank
    mine = plan.branches_of(rank, len(branches))
    _fit_sequence(transformer, step["hidden_states"], groups)
    predictions = {branch: transformer(**step, **branches[branch], return_dict=False)[0] for branch in mine}
    if plan.guidance == 1 or rank not in plan.leaders:
        return list(predictions.values())
    works = []
    for branch in range(1, len(branches)):
        if rank == 0:
            predictions[branch] = torch.empty_like(predictions[0], memory_format=torch.contiguous_format)
        if rank == 0 or branch in mine:
            predictions[branch] = predictions[branch].contiguous()
            source = plan.leaders[branch]
            works.append(dist.broadcast(predictions[branch], src=source, group=groups.leaders, async_op=True))
    await_all(works)
    return list(predictions.values())


def share_context(transformer: Any, groups: Groups) -> None:
    """From here on have the ranks of a guidance group share each prediction of ``transformer``.

    By the parts that ``enable_parallelism`` of diffusers is made of: that asks the machine for an
    accelerator, which the tests do not have, and cannot be taken back.
    """
    if groups.context is not None:
        from diffusers.hooks.context_parallel import apply_context_parallel

        _set_parallel_config(transformer, groups.context)
        apply_context_parallel(transformer, groups.context.context_parallel_config, _shared_parts(transformer))


def unshare_context(transformer: Any, groups: Groups) -> None:
    """From here on have ``transformer`` predict alone again."""
    if groups.context is not None:
        from diffusers.hooks.context_parallel import remove_context_parallel

        remove_context_parallel(transformer, _shared_parts(transformer))
        _set_parallel_config(transformer, None)


def _shared_parts(transformer: Any) -> dict[str, Any]:
    # The entry for the model itself is about one timestep for each token, which WAN 2.1 does not have.
    return {name: part for name, part in transformer._cp_plan.items() if name}


def _set_parallel_config(transformer: Any, config: Any) -> None:
    transformer._parallel_config = config
    for module in transformer.modules():
        processor: Any = getattr(module, "processor", None)
        if hasattr(processor, "_parallel_config"):
            processor._parallel_config = config


def _fit_sequence(transformer: Any, hidden_states: torch.Tensor, groups: Groups) -> None:
    """Uneven parts cost an exchange of their lengths, so that only videos pay it that need it."""
    if groups.context is not None:
        tokens = tokens_of(transformer, hidden_states)
        groups.context.context_parallel_config.ulysses_anything = tokens % groups.plan.context != 0


def tokens_of(transformer: Any, hidden_states: torch.Tensor) -> int:
    """How many patches the transformer makes of ``[1, channels, frames, height, width]``."""
    sides = zip(hidden_states.shape[2:], transformer.config.patch_size, strict=True)
    return math.prod(side // patch for side, patch in sides)
