"""How a plugin says which part of a warm model works now, and on how much.

The engine keeps all models in one memory budget. It can serve a device that is too small for
everything only if it is told what is needed when: see :class:`Residence`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Protocol, TypeVar

from attrs import frozen

Result = TypeVar("Result")


@frozen(kw_only=True)
class Work:
    """One kind of operation with a model. Works that are equal take the same memory."""

    #: What is done, such as ``denoise``; the plugin's own word.
    name: str
    #: What its memory depends on, such as width and height, or frames, height and width.
    shape: tuple[int, ...] = ()
    #: How many pictures or texts are worked on at once.
    rows: int = 1


class Residence(Protocol):
    """One warm model's place on the device."""

    def use(self, *parts: str, work: Work | None = None) -> AbstractContextManager[None]:
        """While it is open, ``parts`` are on the device and stay there; without any, the whole model.

        Others leave for it where memory is short: those in use never, the rest by when they were last used.
        With ``work`` room is made for the operation, too, by what it took before, and what it takes
        now is measured and remembered. May be opened again inside.

        :raises GenerationError: the model is not warm, or has no such part.
        """
        ...

    def run(self, function: Callable[[], Result], *parts: str, work: Work | None = None) -> Result:
        """Call ``function`` with ``parts`` in use; once more with all else off the device where memory ran out.

        What the second call raises goes through: the caller may have a smaller way.
        """
        ...

    def stream(
        self, function: Callable[[], Iterable[Result]], *parts: str, work: Work | None = None
    ) -> Iterator[Result]:
        """What ``function`` yields, as it comes, with ``parts`` in use until the end.

        Where memory runs out it begins once more with all else off the device, and what the caller has already is
        left out: ``function`` must yield the same each time.
        """
        ...

    def rows(self, work: Work, *parts: str) -> int:
        """How many of ``work``'s rows fit at once beside ``parts``, by what was measured; at least one.

        All of them where nothing is known yet.
        """
        ...
