"""When workers are started and stopped: whatever happens, in whatever order."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ourvidz_core.orchestrator.slots import RUNNING, Fleet, Patience, Slot, SlotState

PATIENCE = Patience(first_seconds=1.0, longest_seconds=60.0, reset_seconds=300.0)
NAMES = ("a", "b", "c")
names = st.sampled_from((*NAMES, "d"))


@given(
    first=st.floats(0.01, 100),
    factor=st.floats(1, 1000),
    failures=st.integers(1, 10_000),
)
def test_waits_grow_and_never_exceed_the_longest(first: float, factor: float, failures: int) -> None:
    patience = Patience(first_seconds=first, longest_seconds=first * factor)
    waits = [patience.delay(number) for number in (failures, failures + 1)]
    assert first <= waits[0] <= waits[1] <= first * factor
    assert patience.delay(1) == first


class FleetMachine(RuleBasedStateMachine):
    """Three workers that start, get ready and end as they like, and an operator who asks for anything at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.fleet = Fleet.of(NAMES, PATIENCE, self.now)
        #: Processes that run, those of them that were told to end, and those that the last plan has to replace.
        self.processes: set[str] = set()
        self.told: set[str] = set()
        self.outdated: set[str] = set()
        self.starts_after_the_end = 0
        self.planned = set(NAMES)

    @rule(seconds=st.floats(0.0, 400.0))
    def let_time_pass(self, seconds: float) -> None:
        self.now += seconds
        self.fleet.tick(self.now)

    @rule()
    def start_what_is_due(self) -> None:
        for slot in self.fleet.due(self.now):
            assert slot.name not in self.processes, "a slot has two processes"
            slot.started(self.now)
            self.processes.add(slot.name)
            self.starts_after_the_end += self.fleet.is_ending

    @rule(name=names)
    def a_worker_gets_ready(self, name: str) -> None:
        if name in self.processes:
            self.fleet.slots[name].became_ready(self.now)

    @precondition(lambda self: self.processes)
    @rule(data=st.data(), code=st.sampled_from([0, 1, -9]))
    def a_worker_ends(self, data: st.DataObject, code: int) -> None:
        self.ends(data.draw(st.sampled_from(sorted(self.processes))), code)

    def ends(self, name: str, code: int) -> None:
        for some in (self.processes, self.told, self.outdated):
            some.discard(name)
        self.fleet.slots[name].exited(self.now, code, ["the end"])

    @rule(planned=st.sets(names, min_size=1))
    def roll(self, planned: set[str]) -> None:
        self.fleet.roll(sorted(planned), self.now)
        if not self.fleet.is_ending:
            self.planned, self.outdated = planned, set(self.processes)

    @rule()
    def replace_the_next(self) -> None:
        slot = self.fleet.next_to_roll(self.now)
        if slot is not None:
            assert slot.name in self.processes
            assert slot.name not in self.told, "it was told to end before"
            self.told.add(slot.name)

    @rule()
    def end(self) -> None:
        for slot in self.fleet.end(self.now):
            assert slot.name in self.processes
            self.told.add(slot.name)

    @invariant()
    def a_slot_has_a_process_exactly_when_its_state_says_so(self) -> None:
        assert self.processes == {name for name, slot in self.fleet.slots.items() if slot.state in RUNNING}

    @invariant()
    def nobody_is_told_to_end_unless_it_drains(self) -> None:
        draining = {name for name, slot in self.fleet.slots.items() if slot.state is SlotState.DRAINING}
        assert self.told == draining

    @invariant()
    def a_rolling_restart_replaces_one_at_a_time(self) -> None:
        if not self.fleet.is_ending:
            assert len(self.told) <= 1

    @invariant()
    def nothing_starts_after_the_end_was_asked_for(self) -> None:
        assert not self.starts_after_the_end

    @invariant()
    def no_worker_is_given_up_before_the_end(self) -> None:
        stopped = {name for name, slot in self.fleet.slots.items() if slot.state is SlotState.STOPPED}
        assert self.fleet.is_ending or not stopped & self.planned
        assert self.fleet.is_ending or self.planned <= self.fleet.slots.keys()

    @invariant()
    def no_wait_is_longer_than_the_longest(self) -> None:
        for slot in self.fleet.slots.values():
            if slot.state is SlotState.WAITING:
                assert slot.start_at - slot.since <= PATIENCE.longest_seconds

    @invariant()
    def it_is_over_when_it_is_ending_and_nobody_is_left(self) -> None:
        assert self.fleet.is_over == (self.fleet.is_ending and not self.processes)

    def teardown(self) -> None:
        """Where nothing more happens, the last plan comes true, or the end."""
        for _ in range(4 * len(self.fleet.slots)):
            for name in sorted(self.told):
                self.ends(name, 0)
            self.replace_the_next()
            self.now = max(self.now, self.fleet.next_start() or 0.0)
            self.start_what_is_due()
            for name in self.processes:
                self.fleet.slots[name].became_ready(self.now)
        assert self.outdated == set()
        assert self.told == set()
        if self.fleet.is_ending:
            assert self.fleet.is_over
        else:
            states = {name: slot.state for name, slot in self.fleet.slots.items()}
            assert states == dict.fromkeys(self.planned, SlotState.READY)


TestFleet = FleetMachine.TestCase
TestFleet.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def run_and_fail(slot: Slot, now: float, *, after: float) -> float:
    """Start the slot's process, get it ready, and let it end by itself ``after`` seconds later."""
    slot.started(now)
    slot.became_ready(now)
    slot.exited(now + after, 1, ["Traceback", "KeyError: 'x'"])
    return now + after


def test_a_worker_that_ends_again_and_again_is_a_crash_loop_and_is_still_started() -> None:
    slot, now, waits = Slot(name="a", patience=PATIENCE), 0.0, []
    for _ in range(12):
        now = run_and_fail(slot, now, after=1.0)
        waits.append(slot.start_at - now)
        now = slot.start_at
        assert slot.is_due(now)
    assert waits[:7] == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0]
    assert slot.is_looping
    assert slot.failures == 12
    assert slot.failing_since == 1.0
    assert slot.last_exit is not None
    assert slot.last_exit.last_lines == ("Traceback", "KeyError: 'x'")


@pytest.mark.parametrize("up_seconds", [299.0, 300.0])
def test_a_worker_that_was_up_long_enough_begins_with_the_first_wait_again(up_seconds: float) -> None:
    slot, now = Slot(name="a", patience=PATIENCE), 0.0
    for _ in range(4):
        now = run_and_fail(slot, now, after=0.0)
        now = slot.start_at
    now = run_and_fail(slot, now, after=up_seconds)
    assert slot.start_at - now == (1.0 if up_seconds >= 300.0 else 16.0)
    assert slot.is_looping == (up_seconds < 300.0)


def ready_fleet(*names: str) -> Fleet:
    """A fleet of which every worker takes jobs."""
    fleet = Fleet.of(names, PATIENCE, 0.0)
    for slot in fleet.due(0.0):
        slot.started(0.0)
        slot.became_ready(0.0)
    return fleet


def ends_next(fleet: Fleet, now: float) -> str:
    """The worker that is told to end now, and does."""
    slot = fleet.next_to_roll(now)
    assert slot is not None
    slot.exited(now, 0)
    return slot.name


def test_a_rolling_restart_waits_until_the_new_worker_is_ready_even_if_that_takes_several_starts() -> None:
    fleet = ready_fleet("a", "b")
    fleet.roll(["a", "b"], 1.0)
    first = fleet.next_to_roll(1.0)
    assert first is not None
    assert first.name == "a"
    first.exited(2.0, 0)
    for now in (2.0, 5.0):
        first.started(now)
        assert fleet.next_to_roll(now) is None, "b went before a's successor was ready"
        first.exited(now + 1, 2, ["wrong setting"])
    first.started(60.0)
    first.became_ready(61.0)
    second = fleet.next_to_roll(61.0)
    assert second is not None
    assert second.name == "b"


def test_a_new_plan_starts_what_is_new_and_ends_what_is_gone_when_its_turn_comes() -> None:
    fleet = ready_fleet("a", "b")
    fleet.roll(["b", "c"], 1.0)
    assert [slot.name for slot in fleet.due(1.0)] == ["c"]
    assert ends_next(fleet, 1.0) == "a"
    assert ends_next(fleet, 2.0) == "b"
    assert sorted(fleet.slots) == ["b", "c"]


def test_a_worker_that_is_planned_again_while_it_leaves_is_started_again() -> None:
    waiting = Fleet.of(["a", "b"], PATIENCE, 0.0)
    waiting.roll(["b"], 0.0)
    assert waiting.next_to_roll(0.0) is None
    waiting.roll(["a", "b"], 0.0)
    assert [slot.name for slot in waiting.due(0.0)] == ["b", "a"]

    running = ready_fleet("a", "b")
    running.roll(["b"], 1.0)
    leaving = running.next_to_roll(1.0)
    assert leaving is running.slots["a"]
    running.roll(["a", "b"], 2.0)
    leaving.exited(3.0, 0)
    assert [slot.name for slot in running.due(3.0)] == ["a"]
    assert running.next_to_roll(3.0) is None, "b went before a's successor was ready"

    gone = ready_fleet("a", "b")
    gone.roll(["b"], 1.0)
    assert ends_next(gone, 1.0) == "a"
    gone.roll(["a", "b"], 2.0)
    assert [slot.name for slot in gone.due(2.0)] == ["a"]


def test_a_worker_that_does_not_get_ready_holds_up_no_new_plan() -> None:
    fleet = ready_fleet("a", "b")
    fleet.roll(["a", "b"], 1.0)
    assert ends_next(fleet, 1.0) == "a"
    for now in (1.0, 3.0):
        fleet.slots["a"].started(now)
        fleet.slots["a"].exited(now, 2, ["wrong setting"])
    assert fleet.due(4.0) == []
    fleet.roll(["a", "b"], 4.0)
    assert fleet.next_to_roll(4.0) is None
    assert [slot.name for slot in fleet.due(4.0)] == ["a"], "it waits although the settings are others now"
    fleet.slots["a"].started(4.0)
    fleet.roll(["b"], 5.0)
    assert ends_next(fleet, 5.0) == "a"
    assert ends_next(fleet, 6.0) == "b"
    assert sorted(fleet.slots) == ["b"]


def test_a_worker_that_is_told_to_leave_while_it_makes_room_has_no_successor() -> None:
    fleet = ready_fleet("a", "b")
    fleet.roll(["a", "b"], 1.0)
    going = fleet.next_to_roll(1.0)
    assert going is fleet.slots["a"]
    fleet.roll(["b"], 2.0)
    going.exited(3.0, 0)
    assert fleet.due(3.0) == []
    assert ends_next(fleet, 3.0) == "b"


def test_what_was_told_to_end_is_not_a_failure() -> None:
    slot = Slot(name="a", patience=PATIENCE)
    slot.started(0.0)
    assert slot.drain(1.0, starts_again=True)
    slot.exited(2.0, -15)
    assert (slot.failures, slot.last_exit, slot.is_due(2.0)) == (0, None, True)
