"""A rank beside the engine: draws the images that rank 0 deals it, and sends their pixels.

Started by ``parallel.ranks`` as ``python -m ourvidz_sdxl.parallel.follower`` with one end of a pipe.
"""

from __future__ import annotations

import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from ourvidz_core.engine.follower import Follower, follow


def draw_for_others(follower: Follower) -> None:
    """Do what rank 0 asks for, until it says that it was the last."""
    # Only now: it takes seconds, and the beats shall not wait for it.
    from attrs import evolve

    from ourvidz_core.engine.models import ModelCache
    from ourvidz_core.errors import JobError
    from ourvidz_core.logs import set_up
    from ourvidz_core.settings import load, load_section
    from ourvidz_sdxl.settings import SdxlSettings
    from ourvidz_sdxl.warm import warm_pipeline

    start, settings, ours = follower.take(), load(), load_section(SdxlSettings)
    set_up(settings, is_engine=True)
    if start["threads"]:
        import torch

        torch.set_num_threads(start["threads"])
    models = ModelCache.of(evolve(settings, device=start["device"]))

    def warm(path: str) -> Any:
        return warm_pipeline(models, Path(path), ours, start["device"])

    while True:
        message = follower.take()
        match message["kind"]:
            case "load":
                with suppress(JobError):  # said where something shall be drawn
                    warm(message["model"])
            case "draw":
                _draw(follower, message, warm, ours)
            case "make room":
                models.free_others()
                models.release()
            case "stop":
                pass  # it came after the end
            case "leave":
                return
            case unknown:
                raise ValueError(f"rank 0 asked for {unknown!r}")


def _draw(follower: Follower, message: dict[str, Any], warm: Any, settings: Any) -> None:
    from ourvidz_core.engine.protocol import encode_error
    from ourvidz_core.errors import JobCancelled, JobError
    from ourvidz_core.redaction import redact
    from ourvidz_sdxl.parallel.messages import read_request
    from ourvidz_sdxl.references import Samplings

    def stop_if_called(*_step: Any) -> None:
        # Whatever rank 0 says before it was answered means that it wants no answer.
        if follower.is_called:
            raise JobCancelled("rank 0 has stopped this job")

    number, request = message["number"], read_request(message)
    with redact.without_prompts(request.prompt, request.negative_prompt):
        try:
            drawn = warm(message["model"]).draw(request, sampling=Samplings(settings), on_step=stop_if_called)
        except JobError as error:
            follower.say(kind="broken", number=number, error=encode_error(error))
            return
    follower.say(kind="drawn", number=number, batch_sizes=drawn.batch_sizes, is_compiled=drawn.is_compiled)
    # Beside the next job, as the engine writes its files.
    threading.Thread(target=_send, args=[follower, number, drawn.pictures], name="follower-send", daemon=True).start()


def _send(follower: Follower, number: int, pictures: Any) -> None:
    from ourvidz_core.engine.protocol import encode_error
    from ourvidz_core.errors import JobError
    from ourvidz_sdxl.parallel.messages import say_pictures

    try:
        follower.say(kind="pictures", number=number, **say_pictures([picture.image() for picture in pictures]))
    except JobError as error:
        follower.say(kind="broken", number=number, error=encode_error(error))
    except Exception as error:  # this thread has nobody else to tell
        follower.give_up(error)


if __name__ == "__main__":
    follow(int(sys.argv[1]), draw_for_others)
