"""Warm models within one memory budget: what is in use stays, what was used longest ago leaves.

What leaves the device waits in pinned main memory, and is dropped only where that has no room either.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

from attrs import define, evolve, field

from ourvidz_core.engine.device_memory import (
    GIB,
    HOST_MOST,
    HOST_SHARE,
    DeviceMemory,
    Peak,
    host_bytes_free,
    is_out_of_memory,
)
from ourvidz_core.engine.working_memory import FILE_NAME, WorkingMemory
from ourvidz_core.errors import GenerationError, OutOfMemory
from ourvidz_core.plugins.residency import Residence, Work
from ourvidz_core.settings import Settings

if TYPE_CHECKING:
    import torch

    from ourvidz_core.engine.weights import Weights

logger = logging.getLogger(__name__)

Model = TypeVar("Model")
Result = TypeVar("Result")

#: The part of a model whose parts have no names.
WHOLE = "model"


@define(kw_only=True)
class Traffic:
    """What keeping to the budget has cost so far: what was loaded and dropped, and the parts that moved."""

    loads: int = 0
    #: Whole models, because main memory had no room either.
    drops: int = 0
    to_host: int = 0
    #: Less than what left, where a copy was kept.
    to_host_bytes: int = 0
    #: Of these what went to memory that could be pinned, and the time it took with the pinning.
    pinned_bytes: int = 0
    to_host_seconds: float = 0.0
    to_device: int = 0
    to_device_bytes: int = 0
    to_device_seconds: float = 0.0
    #: Operations that ran out of memory and were called again with the device to themselves.
    retries: int = 0


@define(kw_only=True, eq=False)
class _Part:
    """What moves at once."""

    model: str
    name: str
    #: None where no weights of torch were found that are ours to move.
    weights: Weights | None = None
    #: On a machine without a GPU nothing moves.
    can_move: bool = False
    #: What its plugin said, where nothing can be measured.
    stated_bytes: int = 0
    used_at: int = 0
    locks: int = 0

    @property
    def is_on_device(self) -> bool:
        return self.weights is None or not self.can_move or self.weights.is_on_device

    @property
    def bytes(self) -> int:
        return self.stated_bytes if self.weights is None else self.weights.size_bytes

    @property
    def host_bytes(self) -> int:
        return self.weights.host_bytes if self.weights is not None and self.can_move else 0

    def __str__(self) -> str:
        return self.model if self.name == WHOLE else f"{self.model} ({self.name})"


@define(kw_only=True, eq=False)
class _Warm:
    """A loaded model and its parts."""

    model: Any
    parts: Mapping[str, _Part]
    #: Whether its plugin says which part it uses when.
    is_in_parts: bool
    on_leave: Callable[[Any, str], None] | None = field(default=None)

    @property
    def is_locked(self) -> bool:
        return any(part.locks for part in self.parts.values())


class ModelCache:
    """Models by key, least recently used first. Used by one thread.

    ``find_device`` says where weights belong, None where they cannot be moved; ``host_free`` what is left of main
    memory (bytes).
    """

    def __init__(
        self,
        budget_gb: float | None = None,
        *,
        host_budget_gb: float | None = None,
        working_memory: WorkingMemory | None = None,
        device_memory: DeviceMemory | None = None,
        find_device: Callable[[], torch.device | None] = lambda: _cuda_device("auto"),
        host_free: Callable[[], int] = host_bytes_free,
    ) -> None:
        self._memory = device_memory if device_memory is not None else DeviceMemory(budget_gb)
        self._host_budget_gb = host_budget_gb
        self._working_memory = working_memory if working_memory is not None else WorkingMemory()
        self._find_device = find_device
        self._host_free = host_free
        self._warm: OrderedDict[str, _Warm] = OrderedDict()
        #: Room that was made for operations that are going on (bytes).
        self._reserved: list[int] = []
        self._uses = 0
        self.traffic = Traffic()

    @classmethod
    def of(cls, settings: Settings) -> ModelCache:
        """The models of an engine; what it measures is kept in the state directory."""
        memory = DeviceMemory(settings.vram_budget_gb)
        return cls(
            host_budget_gb=settings.host_memory_budget_gb,
            device_memory=memory,
            working_memory=WorkingMemory(settings.state_dir / FILE_NAME, device=lambda: memory.device),
            find_device=lambda: _cuda_device(settings.device),
        )

    @property
    def keys(self) -> tuple[str, ...]:
        """What is warm, on the device or beside it, least recently used first."""
        return tuple(self._warm)

    @property
    def on_device(self) -> Mapping[str, int]:
        """The parts on the device and their bytes, least recently used first."""
        return {str(part): part.bytes for part in self._by_age() if part.is_on_device}

    def get(
        self,
        key: str,
        load: Callable[[], Model],
        *,
        vram_gb: float = 0.0,
        parts: Callable[[Model], Mapping[str, Any]] | None = None,
        on_leave: Callable[[Model, str], None] | None = None,
    ) -> Model:
        """The model under ``key``, loaded now if it is not there; see ``Models.get``."""
        if key not in self._warm:
            self._load(key, load, int(vram_gb * GIB), parts, on_leave)
        self._warm.move_to_end(key)
        warm = self._warm[key]
        if not warm.is_in_parts:
            with self._locked(warm.parts.values()):
                self._bring(warm.parts.values(), 0)
        return cast(Model, warm.model)

    def residence(self, key: str) -> Residence:
        """The place of the model under ``key`` on the device; see ``Models.residence``."""
        return _Place(self, key)

    def drop(self, key: str) -> None:
        """Forget the model under ``key``, if it is there, and free its memory."""
        warm = self._warm.pop(key, None)
        if warm is not None:
            for part in warm.parts.values():
                _tell(warm, part)
                # Nothing here may still hold the model while its memory is freed.
                part.weights = None
            del warm
            self._memory.release()

    def clear(self) -> None:
        """Forget every model."""
        for key in self.keys:
            self.drop(key)

    @contextlib.contextmanager
    def using(self, key: str, names: Sequence[str], work: Work | None) -> Iterator[None]:
        """See ``Residence.use``."""
        parts = self._parts(key, names)
        self._warm.move_to_end(key)
        with self._locked(parts):
            figures = None if work is None else self._working_memory.figures(key, work)
            wanted = 0 if figures is None else figures.wanted
            self._bring(parts, wanted)
            room = self._room(parts)
            if figures is not None and room is not None and room < figures.least:
                logger.warning("%s needs %s for %s and has %s", key, _gib(figures.least), work, _gib(room))
            self._reserved.append(wanted)
            try:
                if work is None:
                    yield
                else:
                    with self._measured(key, work, room):
                        yield
            finally:
                self._reserved.remove(wanted)

    def rows(self, key: str, names: Sequence[str], work: Work) -> int:
        """See ``Residence.rows``."""
        room = self._room(self._parts(key, names))
        if room is None:
            return work.rows
        for rows in range(work.rows, 1, -1):
            figures = self._working_memory.figures(key, evolve(work, rows=rows))
            if figures is None or figures.wanted <= room:
                return rows
        return 1

    def free_others(self) -> bool:
        """Take everything off the device that is not in use. Whether there was anything."""
        freed = False
        while (part := self._next_to_leave()) is not None:
            self._leave(part)
            freed = True
        return freed

    def has_made_room_after(self, error: Exception) -> bool:
        """Whether ``error`` is a lack of memory, and something has left the device for it."""
        return is_out_of_memory(error) and self.free_others()

    def release(self) -> None:
        """Give the device's unused memory back."""
        self._memory.release()

    def _load(
        self,
        key: str,
        load: Callable[[], Model],
        stated_bytes: int,
        named: Callable[[Model], Mapping[str, Any]] | None,
        on_leave: Callable[[Model, str], None] | None,
    ) -> None:
        if "torch" in sys.modules:
            self._find_device()  # before anything is counted there
        self._make_room(self._working_memory.weights_of(key) or stated_bytes)
        before = self._memory.used_bytes()
        model = self._loaded(key, load)
        self.traffic.loads += 1
        found = self._found_parts(key, model, named)
        if all(part.weights is None for part in found.values()):
            taken = self._memory.used_bytes() - before
            next(iter(found.values())).stated_bytes = taken if taken > 0 else stated_bytes
        self._warm[key] = _Warm(
            model=model,
            parts=found,
            is_in_parts=named is not None,
            on_leave=cast("Callable[[Any, str], None] | None", on_leave),
        )
        self._working_memory.note_weights(key, sum(part.bytes for part in found.values()))
        # A model that came in whole is wanted whole; one in parts may begin to leave.
        with self._locked(part for part in found.values() if named is None or not part.can_move):
            self._make_room(0)

    def _loaded(self, key: str, load: Callable[[], Model]) -> Model:
        try:
            return load()
        except Exception as error:
            if not self.has_made_room_after(error):
                raise
        # Only here has the exception let go of the tensors in its frames.
        self._memory.release()
        logger.info("the device had too little memory to load %s; it is tried again alone", key)
        return load()

    def _found_parts(
        self, key: str, model: Model, named: Callable[[Model], Mapping[str, Any]] | None
    ) -> dict[str, _Part]:
        if "torch" not in sys.modules:
            return {WHOLE: _Part(model=key, name=WHOLE)}
        device = self._find_device()
        groups: Mapping[str, object] = {WHOLE: model} if named is None else named(model)
        found = {name: _part(key, name, group, device) for name, group in groups.items()}
        if not any(part.is_on_device for part in found.values()):
            # What its plugin loaded elsewhere stays there: the device is not for this model.
            return {name: _Part(model=key, name=name) for name in found}
        return found

    def _parts(self, key: str, names: Sequence[str]) -> list[_Part]:
        warm = self._warm.get(key)
        if warm is None:
            raise GenerationError(f"the model {key} is not warm; ask for it with context.models.get in this job first")
        unknown = sorted(set(names) - set(warm.parts))
        if unknown:
            raise GenerationError(f"the model {key} has no part {unknown[0]!r}; it has {', '.join(warm.parts)}")
        return [warm.parts[name] for name in names or warm.parts]

    @contextlib.contextmanager
    def _locked(self, parts: Iterable[_Part]) -> Iterator[None]:
        held = list(parts)
        for part in held:
            part.locks += 1
        try:
            yield
        finally:
            for part in held:
                part.locks -= 1

    def _bring(self, parts: Iterable[_Part], working_bytes: int) -> None:
        """Have ``parts``, which are locked, on the device, and room for their work beside them."""
        held = list(parts)
        for part in held:
            self._uses += 1
            part.used_at = self._uses
        missing = [part for part in held if not part.is_on_device]
        self._make_room(sum(part.bytes for part in missing) + working_bytes)
        for part in missing:
            self._move_in(part)

    def _move_in(self, part: _Part) -> None:
        weights = part.weights
        if weights is None:
            return
        started = time.monotonic()
        self.traffic.to_device_bytes += self._copied_in(weights)
        self.traffic.to_device_seconds += time.monotonic() - started
        self.traffic.to_device += 1

    def _copied_in(self, weights: Weights) -> int:
        try:
            return weights.to_device()
        except Exception as error:
            if not self.has_made_room_after(error):
                raise
        # Only here has the exception let go of the tensors in its frames.
        self._memory.release()
        return weights.to_device()

    def _make_room(self, needed: int) -> None:
        budget = self._memory.budget_bytes()
        if budget is None:
            return
        while self._used() + needed > budget:
            part = self._next_to_leave()
            if part is None:
                return
            logger.info("%s leaves the device: %s are needed, the budget is %s", part, _gib(needed), _gib(budget))
            self._leave(part)

    def _used(self) -> int:
        held = sum(part.bytes for part in self._all_parts() if part.is_on_device) + sum(self._reserved)
        return max(held, self._memory.used_bytes())

    def _room(self, parts: Sequence[_Part]) -> int | None:
        """What an operation on ``parts`` could have if all that may leave had left."""
        budget = self._memory.budget_bytes()
        if budget is None:
            return None
        staying = sum(part.bytes for part in self._all_parts() if part.locks or part in parts)
        # What lies there beside weights: remembered texts, the buffers of CUDA graphs.
        on_device = sum(part.bytes for part in self._all_parts() if part.is_on_device)
        beside = max(self._memory.used_bytes() - on_device - sum(self._reserved), 0)
        return max(budget - staying - beside - sum(self._reserved), 0)

    def _next_to_leave(self) -> _Part | None:
        """The part that was used longest ago. One that takes nothing on the device makes no room by leaving."""
        return next(
            (part for part in self._by_age() if part.is_on_device and part.bytes and self._may_leave(part)), None
        )

    def _may_leave(self, part: _Part) -> bool:
        # What cannot move is dropped, and with it the parts beside it.
        return not (part.locks if part.can_move else self._warm[part.model].is_locked)

    def _leave(self, part: _Part) -> None:
        if not part.can_move or not self._make_host_room(part):
            self._drop_for_room(part.model)
        elif part.weights is not None:
            _tell(self._warm[part.model], part)
            started = time.monotonic()
            copied = part.weights.to_host()
            self.traffic.to_host_seconds += time.monotonic() - started
            self.traffic.to_host_bytes += copied
            self.traffic.pinned_bytes += copied if part.weights.is_pinned else 0
            self.traffic.to_host += 1
            self._memory.trim()

    def _drop_for_room(self, key: str) -> None:
        self.drop(key)
        self.traffic.drops += 1

    def _make_host_room(self, part: _Part) -> bool:
        """Whether main memory takes ``part``. Spare copies leave it first, then models by age."""
        budget = self._host_budget()
        needed = 0 if part.host_bytes else part.bytes
        for other in self._by_age():
            if self._host_used() + needed <= budget:
                return True
            if other is not part and other.weights is not None and other.is_on_device:
                other.weights.forget_copy()
        newest = next(reversed(self._warm))
        for key in self.keys:
            if self._host_used() + needed <= budget:
                return True
            if key not in (part.model, newest) and not self._warm[key].is_locked and self._host_bytes_of(key):
                logger.info("model %s is dropped: main memory has no room for it", key)
                self._drop_for_room(key)
        if self._host_used() + needed <= budget:
            return True
        # The model that was asked for last is in its plugin's hands: it may be moved, not dropped.
        is_held = part.model == newest or self._warm[part.model].is_locked
        if is_held and needed > (free := int(self._host_free() * HOST_MOST)):
            raise OutOfMemory(
                f"{part} has to leave the device and takes {_gib(needed)}, main memory has {_gib(free)} for it;"
                " this model needs a machine with more memory or a larger device"
            )
        return is_held

    def _host_budget(self) -> int:
        if self._host_budget_gb is not None:
            return int(self._host_budget_gb * GIB)
        return int((self._host_free() + self._host_used()) * HOST_SHARE)

    def _host_used(self) -> int:
        return sum(part.host_bytes for part in self._all_parts())

    def _host_bytes_of(self, key: str) -> int:
        return sum(part.host_bytes for part in self._warm[key].parts.values())

    @contextlib.contextmanager
    def _measured(self, key: str, work: Work, room: int | None) -> Iterator[None]:
        before = self._memory.used_bytes()
        peak = Peak()
        try:
            with self._memory.watch() as peak:
                yield
        except Exception as error:
            # How far another failure, or somebody who cancels, let it come says nothing of the whole.
            if is_out_of_memory(error) and room is not None:
                self._working_memory.note(key, work, max(peak.bytes - before, room + 1))
            raise
        if (taken := peak.bytes - before) > 0:
            self._working_memory.note(key, work, taken)

    def _all_parts(self) -> Iterator[_Part]:
        return (part for warm in self._warm.values() for part in warm.parts.values())

    def _by_age(self) -> list[_Part]:
        return sorted(self._all_parts(), key=lambda part: part.used_at)


class _Place:
    """The residence of one model in a cache."""

    def __init__(self, cache: ModelCache, key: str) -> None:
        self._cache = cache
        self._key = key

    def use(self, *parts: str, work: Work | None = None) -> contextlib.AbstractContextManager[None]:
        """See ``Residence.use``."""
        return self._cache.using(self._key, parts, work)

    def run(self, function: Callable[[], Result], *parts: str, work: Work | None = None) -> Result:
        """See ``Residence.run``."""
        with self.use(*parts, work=work):
            try:
                return function()
            except Exception as error:
                if not self._cache.has_made_room_after(error):
                    raise
        self._prepare_to_try_again(work)
        with self.use(*parts, work=work):
            return function()

    def stream(
        self, function: Callable[[], Iterable[Result]], *parts: str, work: Work | None = None
    ) -> Iterator[Result]:
        """See ``Residence.stream``."""
        given = 0
        with self.use(*parts, work=work):
            try:
                for result in function():
                    yield result
                    given += 1
                return
            except Exception as error:
                if not self._cache.has_made_room_after(error):
                    raise
        self._prepare_to_try_again(work)
        with self.use(*parts, work=work):
            yield from itertools.islice(function(), given, None)

    def _prepare_to_try_again(self, work: Work | None) -> None:
        """Only behind the handler has the exception let go of the tensors in its frames.

        What follows is measured anew, for what has left would be taken off what it takes.
        """
        self._cache.release()
        self._cache.traffic.retries += 1
        logger.info("the device had too little memory for %s of %s; it is tried again alone", work, self._key)

    def rows(self, work: Work, *parts: str) -> int:
        """See ``Residence.rows``."""
        return self._cache.rows(self._key, parts, work)


class AlwaysResident:
    """The residence of a model that nobody moves: in a process of its own, or in a test."""

    def use(self, *parts: str, work: Work | None = None) -> contextlib.AbstractContextManager[None]:  # noqa: ARG002
        """It is there."""
        return contextlib.nullcontext()

    def run(self, function: Callable[[], Result], *parts: str, work: Work | None = None) -> Result:  # noqa: ARG002
        """Call ``function``."""
        return function()

    def stream(
        self,
        function: Callable[[], Iterable[Result]],
        *parts: str,  # noqa: ARG002
        work: Work | None = None,  # noqa: ARG002
    ) -> Iterator[Result]:
        """What ``function`` yields."""
        yield from function()

    def rows(self, work: Work, *parts: str) -> int:  # noqa: ARG002
        """All of them."""
        return work.rows


def _part(key: str, name: str, model: object, device: torch.device | None) -> _Part:
    import torch

    from ourvidz_core.engine.weights import Weights, modules_of

    modules = modules_of(model)
    if not modules:
        return _Part(model=key, name=name)
    weights = Weights(modules, torch.device("cpu") if device is None else device)
    return _Part(model=key, name=name, weights=weights, can_move=device is not None)


def _tell(warm: _Warm, part: _Part) -> None:
    if warm.on_leave is not None and part.is_on_device:
        warm.on_leave(warm.model, part.name)


def _cuda_device(name: str) -> torch.device | None:
    """The device that ``name`` of the settings means, if it is a GPU. From then on it is the current one, too."""
    import torch

    if name == "cpu" or not torch.cuda.is_available():
        return None
    device: torch.device = torch.device("cuda" if name == "auto" else name)
    if device.index is not None:
        torch.cuda.set_device(device)
    return device


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / GIB:.1f} GiB"
