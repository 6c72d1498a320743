"""Rank 0's side: deals out the images of a job, draws its own and gathers the others'."""

from __future__ import annotations

import atexit
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from attrs import define, evolve, field, frozen
from PIL.Image import Image
from torch import Tensor

from ourvidz_core.engine.follower import Message
from ourvidz_core.engine.protocol import decode_error
from ourvidz_core.engine.ranks import SILENT_SECONDS, Followers, devices_of, elsewhere
from ourvidz_core.errors import EngineUnusable, JobError
from ourvidz_sdxl.parallel.messages import read_pictures, say_request
from ourvidz_sdxl.parallel.plan import GPUS_VARIABLE
from ourvidz_sdxl.pipeline import DrawnImages, ImageRequest, SdxlPipeline
from ourvidz_sdxl.references import Samplings

logger = logging.getLogger(__name__)

#: A rank that was stopped ends its step in this time: it may be compiling.
STOP_SECONDS = 300.0
#: Pixels that are drawn come in this time: the last of them are still decoded.
ARRIVE_SECONDS = 60.0
_POLL_SECONDS = 0.1


@define(eq=False)
class _Part:
    """What one rank draws of a job, as far as it has come."""

    rank: int
    drawn: Message | None = None
    images: list[Image] | None = None
    error: JobError | None = None
    #: Nobody wants it any more.
    is_stopped: bool = False

    @property
    def is_answered(self) -> bool:
        return self.drawn is not None or self.error is not None

    @property
    def has_arrived(self) -> bool:
        return self.images is not None or self.error is not None


class DrawingRanks:
    """The ranks of this process: itself as rank 0, and the processes that it started, each with the same models.

    Used from one thread; pictures are waited for in any.
    """

    def __init__(self, gpus: int, device: str, *, silent_seconds: float = SILENT_SECONDS) -> None:
        """Start ``gpus - 1`` processes.

        :raises GenerationError: there are not so many GPUs.
        """
        self.gpus = gpus
        self._numbers = itertools.count()
        #: By rank and job, until their pictures are here.
        self._parts: dict[tuple[int, int], _Part] = {}
        #: Whatever leaves this process's GPU now leaves it for a job that all ranks have.
        self._is_at_work = False
        self.followers = Followers(
            "ourvidz_sdxl.parallel.follower",
            devices_of(gpus, device, variable=GPUS_VARIABLE),
            on_answer=self._hear,
            silent_seconds=silent_seconds,
            is_alone=True,
        )

    @contextmanager
    def loading(self, path: Path) -> Iterator[None]:
        """Have all other ranks load the model at ``path``, while this process does so within the block."""
        self.followers.tell_all(kind="load", model=str(path))
        with self._at_work():
            yield

    def make_room(self) -> None:
        """Have the weights leave the GPUs of all other ranks, unless it is for a job of theirs: they see to that."""
        if not self._is_at_work:
            self.followers.tell_all(kind="make room")

    def draw(
        self,
        model: SdxlPipeline,
        path: Path,
        requests: Sequence[ImageRequest],
        *,
        sampling: Samplings,
        on_step: Callable[[int, int, Tensor], None],
        progress: Callable[[int, int], None],
    ) -> DrawnImages:
        """Draw each of ``requests`` on a rank, the first with ``model`` here; all have its steps and its size.

        ``on_step`` is told of the steps here, and ``progress`` of the last of them again while others are waited for.
        What either raises stops all ranks within a step and leaves them ready for the next job.

        :raises EngineUnusable: a rank is gone; all are ended.
        """
        last = (0, requests[0].num_inference_steps)
        number = next(self._numbers)
        parts: list[_Part] = []

        def after_step(step: int, total: int, latents: Tensor) -> None:
            nonlocal last
            last = (step, total)
            on_step(step, total, latents)
            self._raise_if_broken(parts)

        try:
            self._await_stopped(lambda: progress(*last))
            for rank, request in enumerate(requests[1:], start=1):
                parts.append(self._begin(rank, number, path, request))
            with self._at_work():
                own = model.draw(requests[0], sampling=sampling, on_step=after_step)
            while not self.followers.wait_until(lambda: all(part.is_answered for part in parts), _POLL_SECONDS):
                progress(*last)
                self._raise_if_broken(parts)
            self._raise_if_broken(parts)
        except BaseException:
            for part in parts:
                part.is_stopped = True
                self.followers.tell(part.rank, kind="stop")
            if not self.followers.is_well:
                self.close()
            raise
        return self._joined(own, requests, parts)

    def await_arrival(self, part: _Part) -> list[Image]:
        """The pictures of ``part``.

        :raises GenerationError: they could not be made after all.
        """
        if not self.followers.wait_until(lambda: part.has_arrived, ARRIVE_SECONDS):
            name = self.followers.name(part.rank)
            raise EngineUnusable(f"{name} did not send its pictures within {ARRIVE_SECONDS:g} s")
        if part.error is not None:
            raise part.error
        return part.images or []

    def close(self) -> None:
        """End the other ranks."""
        self.followers.close()

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        self._is_at_work = True
        try:
            yield
        finally:
            self._is_at_work = False

    def _begin(self, rank: int, number: int, path: Path, request: ImageRequest) -> _Part:
        part = self._parts[rank, number] = _Part(rank)
        self.followers.tell(rank, kind="draw", number=number, model=str(path), **say_request(request))
        return part

    def _await_stopped(self, progress: Callable[[], None]) -> None:
        """Until no rank works on a job that was stopped before."""

        def is_free() -> bool:
            return all(part.is_answered for part in list(self._parts.values()))

        self.followers.check()
        for _ in range(round(STOP_SECONDS / _POLL_SECONDS)):
            if self.followers.wait_until(is_free, _POLL_SECONDS):
                return
            progress()
        late = next(part for part in list(self._parts.values()) if not part.is_answered)
        name = self.followers.name(late.rank)
        self.followers.fail(EngineUnusable(f"{name} did not end a job within {STOP_SECONDS:g} s after it was stopped"))

    def _raise_if_broken(self, parts: Sequence[_Part]) -> None:
        self.followers.check()
        for part in parts:
            if part.error is not None:
                raise part.error

    def _joined(self, own: DrawnImages, requests: Sequence[ImageRequest], parts: Sequence[_Part]) -> DrawnImages:
        pictures, batch_sizes, is_compiled = [*own.pictures], [*own.batch_sizes], own.is_compiled
        for part, request in zip(parts, requests[1:], strict=True):
            drawn = part.drawn or {}
            pictures += [_ComingPicture(ranks=self, part=part, index=index) for index in range(len(request.seeds))]
            batch_sizes += drawn["batch_sizes"]
            is_compiled = is_compiled and drawn["is_compiled"]
        return evolve(own, pictures=tuple(pictures), batch_sizes=tuple(batch_sizes), is_compiled=is_compiled)

    def _hear(self, rank: int, message: Message) -> None:
        key = rank, message["number"]
        part = self._parts[key]
        match message["kind"]:
            case "drawn":
                part.drawn = message
                return
            case "pictures":
                part.images = [] if part.is_stopped else read_pictures(message)
            case "broken":
                error = message["error"]
                said = f"{self.followers.name(rank)}: {error['message']}"
                part.error = elsewhere(decode_error({**error, "message": said}))
        del self._parts[key]


@frozen(kw_only=True)
class _ComingPicture:
    """A picture that another rank has drawn, or soon will have. Any thread may ask for it."""

    _ranks: DrawingRanks
    _part: _Part
    _index: int = field()

    def image(self) -> Image:
        """The picture; waits until it has arrived."""
        return self._ranks.await_arrival(self._part)[self._index]


_ranks: DrawingRanks | None = None


def make_room() -> None:
    """Another job needs the first GPU's memory; it may need that of the others, too."""
    if _ranks is not None and not _ranks.followers.is_closed:
        _ranks.make_room()


def ranks_of(gpus: int, device: str) -> DrawingRanks:
    """The ranks of this process, which live as long as it does.

    :raises GenerationError: it does not see so many GPUs.
    """
    global _ranks  # noqa: PLW0603 - one set of processes for all jobs
    if _ranks is not None and not _ranks.followers.is_closed:
        if _ranks.gpus == gpus:
            return _ranks
        _ranks.close()
    _ranks = DrawingRanks(gpus, device)
    atexit.register(_ranks.close)
    logger.info("the images of a job are dealt out to %d GPUs", gpus)
    return _ranks
