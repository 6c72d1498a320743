"""A rank beside the engine: holds transformers and predicts what rank 0 asks for.

Started by ``parallel.ranks`` as ``python -m ourvidz_wan.parallel.follower`` with one end of a pipe.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ourvidz_core.engine.follower import Follower, follow


def predict_for_others(follower: Follower) -> None:
    """Do what rank 0 asks for, until it says that it was the last."""
    # Only now: it takes seconds, and the beats shall not wait for it.
    import torch

    from ourvidz_wan.acceleration import prepare_transformer
    from ourvidz_wan.checkpoints import load_transformer
    from ourvidz_wan.parallel.exchange import (
        Groups,
        join,
        leave,
        make_groups,
        predict,
        receive_tensors,
        share_context,
    )
    from ourvidz_wan.parallel.plan import RankPlan
    from ourvidz_wan.tasks import TASKS

    first = follower.take()
    device = torch.device(first["device"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif first["threads"]:
        torch.set_num_threads(first["threads"])
    transformers: dict[str, tuple[Any, Groups]] = {}
    branches: list[dict[str, Any]] = []
    with torch.no_grad():
        while True:
            message = follower.take()
            match message["kind"]:
                case "load":
                    transformer = load_transformer(
                        Path(message["ckpt_dir"]),
                        TASKS[message["task"]],
                        device=device,
                        dtype=getattr(torch, message["dtype"]),
                    )
                    prepare_transformer(transformer, device)
                    follower.say(kind="done")
                case "join":
                    join(
                        rank=first["rank"],
                        ranks=first["ranks"],
                        device=device,
                        meeting_point=Path(message["meeting_point"]),
                    )
                case "share":
                    groups = make_groups(RankPlan(**message["plan"]), device)
                    share_context(transformer, groups)
                    transformers[message["key"]] = transformer, groups
                    del transformer
                case "drop":
                    transformers.pop(message["key"], None)
                    if device.type == "cuda":
                        torch.cuda.empty_cache()
                case "begin":
                    transformer, groups = transformers[message["key"]]
                    tensors = receive_tensors(message["tensors"], device)
                    branches = [
                        {**plain, **{name: tensors[label] for name, label in labels.items()}}
                        for plain, labels in message["branches"]
                    ]
                case "step":
                    step = receive_tensors(message["tensors"], device)
                    predict(transformer, step, branches, groups, _wait)
                case "leave":
                    leave()
                    return
                case unknown:
                    raise ValueError(f"rank 0 asked for {unknown!r}")


def _wait(works: Any) -> None:
    for work in works:
        work.wait()


if __name__ == "__main__":
    follow(int(sys.argv[1]), predict_for_others)
