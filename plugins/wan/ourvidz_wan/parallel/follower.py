"""A rank beside the engine: holds transformers and predicts what rank 0 asks for, until rank 0 is gone.

Started by ``parallel.ranks`` as ``python -m ourvidz_wan.parallel.follower`` with one end of a pipe.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

#: Says that the process is there and not stopped.
BEAT_SECONDS = 1.0


class Follower:
    """The loop of one rank that is not the engine."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._sending = threading.Lock()
        self._messages: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        threading.Thread(target=self._listen, name="follower-listen", daemon=True).start()
        threading.Thread(target=self._beat, name="follower-beat", daemon=True).start()

    def follow(self) -> None:
        """Do what is asked; what goes wrong is said, and ends the process."""
        try:
            self._follow()
        except BaseException as error:
            self._say(kind="failed", error_type=type(error).__name__, message=str(error))
            raise

    def _follow(self) -> None:
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

        first = self._messages.get()
        device = torch.device(first["device"])
        if device.type == "cuda":
            torch.cuda.set_device(device)
        elif first["threads"]:
            torch.set_num_threads(first["threads"])
        transformers: dict[str, tuple[Any, Groups]] = {}
        branches: list[dict[str, Any]] = []
        with torch.no_grad():
            while True:
                message = self._messages.get()
                match message["kind"]:
                    case "load":
                        transformer = load_transformer(
                            Path(message["ckpt_dir"]),
                            TASKS[message["task"]],
                            device=device,
                            dtype=getattr(torch, message["dtype"]),
                        )
                        prepare_transformer(transformer, device)
                        self._say(kind="done")
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

    def _say(self, **message: Any) -> None:
        with self._sending:
            self._connection.send_bytes(json.dumps(message).encode())

    def _listen(self) -> None:
        while True:
            try:
                self._messages.put(json.loads(self._connection.recv_bytes()))
            except (EOFError, OSError):
                # Rank 0 is gone, and an exchange with it would never end.
                os._exit(0)

    def _beat(self) -> None:
        while True:
            time.sleep(BEAT_SECONDS)
            try:
                self._say(kind="alive")
            except OSError:
                os._exit(0)


def _wait(works: Any) -> None:
    for work in works:
        work.wait()


def main(descriptor: int) -> None:
    """Follow the process that has the other end of the pipe ``descriptor``."""
    os.set_inheritable(descriptor, False)
    try:
        Follower(Connection(descriptor)).follow()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        # At once: an interpreter that ends in order waits for exchanges that nobody joins any more.
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]))
