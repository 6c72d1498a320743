"""A rank that does as it is told, for the tests of what starts ranks and watches them."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator

from ourvidz_core.engine.follower import Follower, follow
from ourvidz_core.errors import ModelUnavailable


class Freezing(list[bytes]):
    """Pictures of which the first arrives, and then the process is stopped."""

    def __len__(self) -> int:
        return 2

    def __iter__(self) -> Iterator[bytes]:
        yield b"a picture"
        os.kill(os.getpid(), signal.SIGSTOP)
        yield b"another"


def obey(follower: Follower) -> None:
    """Answer, fail or end."""
    start = follower.take()
    while True:
        message = follower.take()
        match message["kind"]:
            case "echo":
                seen = {"visible": os.environ.get("CUDA_VISIBLE_DEVICES"), "key": os.environ.get("OURVIDZ_ACME_KEY")}
                follower.say(kind="echo", blobs=message.get("blobs", []), start=start, **seen)
            case "load":
                raise ModelUnavailable("there is no such model")
            case "allocate":
                raise MemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
            case "stumble":
                raise RuntimeError("CUDA error: misaligned address")
            case "freeze":
                follower.say(kind="echo", blobs=Freezing())
            case "end":
                os._exit(3)
            case "leave":
                return


if __name__ == "__main__":
    follow(int(sys.argv[1]), obey)
