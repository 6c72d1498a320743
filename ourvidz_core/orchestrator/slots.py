"""When a worker is started, stopped and started again: decisions without a process, a clock or a signal.

Each worker has a slot. What happens to its process is told to the slot, with the time;
what shall happen is asked of it. At every moment a slot has one process or none.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from enum import StrEnum

from attrs import define, field, frozen

#: From this many failures in a row it is a crash loop.
LOOP_FAILURES = 3


class SlotState(StrEnum):
    """What a slot's process is doing."""

    #: There is none; the next one is due at ``start_at``.
    WAITING = "waiting"
    #: It runs and takes no jobs yet.
    STARTING = "starting"
    READY = "ready"
    #: It was told to stop, and finishes what it has.
    DRAINING = "draining"
    #: There is none, and there will be none.
    STOPPED = "stopped"


#: The states in which there is a process.
RUNNING = frozenset({SlotState.STARTING, SlotState.READY, SlotState.DRAINING})


@frozen(kw_only=True)
class Patience:
    """How long a worker that ended by itself waits for its next start."""

    first_seconds: float = 1.0
    longest_seconds: float = 60.0
    #: A worker that was ready for this long has not failed to start; the next wait is the first again.
    reset_seconds: float = 300.0

    def delay(self, failures: int) -> float:
        """The wait after ``failures`` in a row: doubling, and never above the longest.

        >>> [Patience().delay(failures) for failures in (1, 2, 3, 20)]
        [1.0, 2.0, 4.0, 60.0]
        """
        return min(self.longest_seconds, self.first_seconds * 2.0 ** min(max(failures, 1) - 1, 64))


@frozen(kw_only=True)
class Exit:
    """How a process ended that nobody had told to."""

    at: float
    #: As ``subprocess`` gives it: an exit status, or minus the number of a signal.
    returncode: int
    #: The end of its log.
    last_lines: tuple[str, ...] = ()


@define(kw_only=True)
class Slot:
    """One worker's place. Times are those of one clock, in seconds."""

    name: str
    patience: Patience = field(factory=Patience)
    state: SlotState = SlotState.WAITING
    #: When the next process is due; counts while it is waiting.
    start_at: float = 0.0
    #: When the state last changed.
    since: float = 0.0
    #: How often a process was started after the first.
    restarts: int = -1
    #: Ends in a row that nobody asked for.
    failures: int = 0
    #: When the first of them was.
    failing_since: float | None = None
    last_exit: Exit | None = None
    _starts_again: bool = False

    @property
    def is_looping(self) -> bool:
        """Whether it ends again and again soon after its start."""
        return self.failures >= LOOP_FAILURES

    def is_due(self, now: float) -> bool:
        """Whether a process shall be started now."""
        return self.state is SlotState.WAITING and now >= self.start_at

    def started(self, now: float) -> None:
        """A process was started."""
        if self.state is not SlotState.WAITING:
            raise ValueError(f"{self.name} is {self.state} and cannot have another process")
        self.restarts += 1
        self._change(SlotState.STARTING, now)

    def became_ready(self, now: float) -> None:
        """The process takes jobs."""
        if self.state is SlotState.STARTING:
            self._change(SlotState.READY, now)

    def tick(self, now: float) -> None:
        """Forget failures that are long over."""
        if self.state is SlotState.READY and now - self.since >= self.patience.reset_seconds:
            self.failures, self.failing_since = 0, None

    def drain(self, now: float, *, starts_again: bool) -> bool:
        """Have the process end, for good or to make room for its successor. Answers whether it must be told to."""
        if self.state in RUNNING:
            must_be_told = self.state is not SlotState.DRAINING
            self._starts_again = starts_again
            if must_be_told:
                self._change(SlotState.DRAINING, now)
            return must_be_told
        if self.state is SlotState.WAITING:
            if starts_again:
                self.start_at = min(self.start_at, now)
            else:
                self._change(SlotState.STOPPED, now)
        return False

    def exited(self, now: float, returncode: int, last_lines: Iterable[str] = ()) -> None:
        """The process is gone."""
        if self.state not in RUNNING:
            raise ValueError(f"{self.name} is {self.state} and had no process that could end")
        if self.state is SlotState.DRAINING:
            self.start_at = now
            self._change(SlotState.WAITING if self._starts_again else SlotState.STOPPED, now)
            return
        self.tick(now)
        self.failures += 1
        self.failing_since = now if self.failing_since is None else self.failing_since
        self.last_exit = Exit(at=now, returncode=returncode, last_lines=tuple(last_lines))
        self.start_at = now + self.patience.delay(self.failures)
        self._change(SlotState.WAITING, now)

    def _change(self, state: SlotState, now: float) -> None:
        self.state, self.since = state, now


@define
class Fleet:
    """All slots, and what concerns more than one: a rolling restart with a new plan, and the end."""

    slots: dict[str, Slot]
    _patience: Patience = field(factory=Patience)
    is_ending: bool = False
    #: The slot whose process is being replaced; the next one's turn comes when that is ready or has left.
    rolling: str | None = None
    _to_roll: deque[str] = field(factory=deque)
    #: The workers that there shall be; other slots leave when their turn comes.
    _planned: frozenset[str] = frozenset()

    @classmethod
    def of(cls, names: Iterable[str], patience: Patience, now: float) -> Fleet:
        """A fleet of which every worker is due now."""
        fleet = cls({}, patience)
        fleet.roll(names, now)
        return fleet

    @property
    def is_over(self) -> bool:
        """Whether there is no process, and none to come."""
        return all(slot.state is SlotState.STOPPED for slot in self.slots.values())

    def due(self, now: float) -> list[Slot]:
        """The slots that shall get a process now."""
        return [slot for slot in self.slots.values() if slot.is_due(now)]

    def next_start(self) -> float | None:
        """When the next process is due."""
        return min((slot.start_at for slot in self.slots.values() if slot.state is SlotState.WAITING), default=None)

    def roll(self, names: Iterable[str], now: float) -> None:
        """Have these workers, and replace the process of each that there is, one after the other.

        New ones are due now; those that are missing end when their turn comes. Asked again meanwhile,
        it begins anew with the one whose turn it is.
        """
        if self.is_ending:
            return
        self._forget_the_stopped()
        planned = list(names)
        self._planned = frozenset(planned)
        self._to_roll = deque(self.slots)
        if self.rolling is not None:
            self._to_roll.remove(self.rolling)
            present = self.slots[self.rolling]
            if present.state is SlotState.DRAINING:
                present.drain(now, starts_again=present.name in self._planned)
            else:
                self._to_roll.appendleft(present.name)
                self.rolling = None
        for name in planned:
            if name not in self.slots:
                self.slots[name] = Slot(name=name, patience=self._patience, start_at=now, since=now)

    def next_to_roll(self, now: float) -> Slot | None:
        """The slot whose process shall be told to end now."""
        if self.is_ending:
            return None
        self._forget_the_stopped()
        if self.rolling is not None and self.slots[self.rolling].state is SlotState.READY:
            self.rolling = None
        while self.rolling is None and self._to_roll:
            self.rolling = self._to_roll.popleft()
            slot = self.slots[self.rolling]
            if slot.drain(now, starts_again=slot.name in self._planned):
                return slot
            self._forget_the_stopped()
        return None

    def end(self, now: float) -> list[Slot]:
        """End everything for good. Answers the slots whose processes must be told to."""
        self.is_ending, self.rolling = True, None
        self._to_roll.clear()
        return [slot for slot in self.slots.values() if slot.drain(now, starts_again=False)]

    def tick(self, now: float) -> None:
        """Let time pass."""
        for slot in self.slots.values():
            slot.tick(now)

    def _forget_the_stopped(self) -> None:
        """Those have left; wanted again, they are new."""
        self.slots = {name: slot for name, slot in self.slots.items() if slot.state is not SlotState.STOPPED}
        if self.rolling not in self.slots:
            self.rolling = None
