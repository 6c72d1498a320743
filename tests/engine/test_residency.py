"""Models share a pretend device: what is used is there, what leaves waits beside it, and nothing is lost.

The device is main memory, too; what lies on it and what does not has other addresses, and really moves.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from attrs import define, evolve, field
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import nn

from ourvidz_core.engine.device_memory import GIB, DeviceMemory, Peak
from ourvidz_core.engine.models import ModelCache
from ourvidz_core.engine.working_memory import WorkingMemory
from ourvidz_core.errors import GenerationError, JobCancelled, OutOfMemory
from ourvidz_core.plugins.residency import Work
from ourvidz_core.settings import Settings

CPU = torch.device("cpu")
KIB = 1024
DENOISE = Work(name="denoise", shape=(64, 64), rows=4)


@define(eq=False)
class PretendDevice(DeviceMemory):
    """A device with a budget in KiB; operations say what they take of it."""

    budget_kib: float | None = None
    _peaks: list[Peak] = field(factory=list)

    def budget_bytes(self) -> int | None:
        return None if self.budget_kib is None else int(self.budget_kib * KIB)

    def used_bytes(self) -> int:
        return 0

    @contextlib.contextmanager
    def watch(self) -> Iterator[Peak]:
        self._peaks.append(Peak())
        try:
            yield self._peaks[-1]
        finally:
            self._peaks.pop()

    def take(self, kib: float) -> None:
        """An operation that is watched takes this much."""
        for peak in self._peaks:
            peak.bytes = max(peak.bytes, int(kib * KIB))


class Net(nn.Module):
    """Takes ``kib`` of the device."""

    def __init__(self, kib: int, seed: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(kib * 16, 16, generator=torch.Generator().manual_seed(seed)))
        self.requires_grad_(False)

    def forward(self) -> torch.Tensor:
        return self.weight.sum(0)


def never() -> nn.Module:
    raise AssertionError("the model was warm")


@pytest.fixture
def device() -> PretendDevice:
    return PretendDevice(budget_kib=10)


@pytest.fixture
def cache(device: PretendDevice) -> ModelCache:
    return cache_of(device)


def cache_of(device: PretendDevice, *, host_kib: float = 1000, memory: WorkingMemory | None = None) -> ModelCache:
    return ModelCache(
        device_memory=device,
        host_budget_gb=host_kib * KIB / GIB,
        working_memory=memory,
        find_device=lambda: CPU,
    )


def in_parts(**kib: int) -> SimpleNamespace:
    return SimpleNamespace(**{name: Net(size) for name, size in kib.items()})


def get_in_parts(cache: ModelCache, key: str, **kib: int) -> SimpleNamespace:
    return cache.get(key, lambda: in_parts(**kib), parts=vars)


def test_a_model_that_leaves_the_device_comes_back_without_being_loaded(cache: ModelCache) -> None:
    first = cache.get("a", lambda: Net(6))
    expected = first()
    cache.get("b", lambda: Net(6))
    assert dict(cache.on_device) == {"b": 6 * KIB}

    again = cache.get("a", never)

    assert again is first
    assert torch.equal(again(), expected)
    assert dict(cache.on_device) == {"a": 6 * KIB}


def test_what_turns_cost_is_counted(cache: ModelCache) -> None:
    cache.get("a", lambda: Net(6))
    for key in ("b", "a", "b"):
        cache.get(key, lambda: Net(6))
    seen = cache.traffic
    assert (seen.loads, seen.drops, seen.to_host, seen.to_device) == (2, 0, 3, 2)
    # What left a second time had left a copy.
    assert (seen.to_host_bytes, seen.to_device_bytes) == (12 * KIB, 12 * KIB)

    scarce = cache_of(PretendDevice(budget_kib=10), host_kib=0)
    for key in ("a", "b"):
        scarce.get(key, lambda: Net(6))
    assert (scarce.traffic.loads, scarce.traffic.drops, scarce.traffic.to_host) == (2, 1, 0)


def test_weights_are_measured_whatever_the_plugin_says(cache: ModelCache) -> None:
    cache.get("a", lambda: Net(6), vram_gb=99)
    cache.get("b", lambda: Net(4), vram_gb=4 * KIB / GIB)

    assert dict(cache.on_device) == {"a": 6 * KIB, "b": 4 * KIB}


def test_a_restart_makes_room_for_weights_that_it_knows(device: PretendDevice) -> None:
    memory = WorkingMemory()
    cache_of(device, memory=memory).get("b", lambda: Net(6))
    cache = cache_of(device, memory=memory)
    cache.get("a", lambda: Net(6))
    there: list[dict[str, int]] = []

    def load() -> Net:
        there.append(dict(cache.on_device))
        return Net(6)

    cache.get("b", load)

    assert there == [{}]


def test_the_part_that_is_used_is_there_and_the_one_before_makes_room(cache: ModelCache) -> None:
    model = get_in_parts(cache, "wan", text_encoder=7, transformer=5, vae=1)
    place = cache.residence("wan")

    with place.use("text_encoder"):
        assert "wan (text_encoder)" in cache.on_device
        assert sum(cache.on_device.values()) <= 10 * KIB
    with place.use("vae"), place.use("transformer"):
        assert set(cache.on_device) == {"wan (vae)", "wan (transformer)"}
    with place.use():
        assert set(cache.on_device) == {"wan (text_encoder)", "wan (transformer)", "wan (vae)"}
    assert cache.get("wan", never) is model  # type: ignore[comparison-overlap]


def test_what_is_in_use_stays_however_short_the_memory_is(cache: ModelCache) -> None:
    cache.get("a", lambda: Net(6))
    with cache.residence("a").use():
        cache.get("b", lambda: Net(6))
        assert set(cache.on_device) == {"a", "b"}
        cache.get("c", lambda: Net(1))
        assert set(cache.on_device) == {"a", "c"}


def test_room_is_made_for_the_work_too(device: PretendDevice, cache: ModelCache) -> None:
    cache.get("idle", lambda: Net(4))
    cache.get("a", lambda: Net(4))
    place = cache.residence("a")
    with place.use(work=DENOISE):
        assert set(cache.on_device) == {"idle", "a"}
        device.take(4)

    with place.use(work=DENOISE):
        assert set(cache.on_device) == {"a"}


def test_rows_are_those_that_fit_when_all_else_has_left(device: PretendDevice, cache: ModelCache) -> None:
    cache.get("idle", lambda: Net(4))
    cache.get("a", lambda: Net(4))
    place = cache.residence("a")
    assert place.rows(DENOISE) == 4
    with place.use(work=DENOISE):
        device.take(5)
    assert place.rows(DENOISE) == 4
    with place.use(work=DENOISE):
        device.take(8)

    # 2 KiB a row and a tenth for gaps, in 6 KiB.
    assert place.rows(DENOISE) == 2
    assert place.rows(evolve(DENOISE, shape=(64, 128))) == 1
    device.budget_kib = None
    assert place.rows(DENOISE) == 4


def test_what_a_cancelled_job_took_is_no_measurement(device: PretendDevice, cache: ModelCache) -> None:
    cache.get("a", lambda: Net(4))
    place = cache.residence("a")
    with place.use(work=DENOISE):
        device.take(8)

    def stop() -> None:
        device.take(1)
        raise JobCancelled("at its first step")

    for _ in range(3):
        with pytest.raises(JobCancelled):
            place.run(stop, work=DENOISE)

    assert place.rows(DENOISE) == 2


def test_a_model_that_its_plugin_keeps_elsewhere_is_left_there(device: PretendDevice) -> None:
    cache = ModelCache(device_memory=device, find_device=lambda: torch.device("cuda"))
    model = get_in_parts(cache, "wan", transformer=4, vae=4)

    with cache.residence("wan").use("vae"):
        assert model.vae.weight.device == CPU
    assert cache.get("b", lambda: Net(3)).weight.device == CPU
    assert sum(cache.on_device.values()) == 0


def test_the_memory_that_counts_is_that_of_the_settings_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    current, asked = [0], []
    for name, answer in {
        "is_available": lambda: True,
        "set_device": lambda device: current.append(device.index),
        "mem_get_info": lambda: asked.append(current[-1]) or (80 * GIB, 80 * GIB),
        "memory_allocated": lambda: asked.append(current[-1]) or 0,
        "memory_reserved": lambda: 0,
        "get_per_process_memory_fraction": lambda: 1.0,
        "get_device_name": lambda: "a card",
    }.items():
        monkeypatch.setattr(torch.cuda, name, answer)

    ModelCache.of(Settings(device="cuda:1", state_dir=tmp_path)).get("a", lambda: Net(3))

    assert set(asked) == {1}


def test_what_leaves_is_told_before_it_is_gone(cache: ModelCache) -> None:
    told: list[tuple[str, int]] = []
    model = in_parts(unet=6, vae=3)

    def forget(left: SimpleNamespace, part: str) -> None:
        told.append((part, vars(left)[part].weight.data_ptr()))

    was = model.unet.weight.data_ptr()
    cache.get("a", lambda: model, parts=vars, on_leave=forget)
    with cache.residence("a").use("vae"):
        cache.get("b", lambda: Net(6))

    assert told == [("unet", was)]
    cache.drop("a")
    assert [part for part, _ in told] == ["unet", "vae"]


class TestOutOfMemory:
    """The device is full although the books say otherwise."""

    @staticmethod
    def short_of_memory(cache: ModelCache, *, until: int) -> Callable[[], str]:
        def work() -> str:
            if len(cache.on_device) > until:
                raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")
            return "done"

        return work

    def test_work_is_tried_once_more_with_all_else_off_the_device(self, cache: ModelCache) -> None:
        for key in "abc":
            cache.get(key, lambda: Net(2))

        assert cache.residence("b").run(self.short_of_memory(cache, until=1)) == "done"
        assert set(cache.on_device) == {"b"}

    def test_what_still_fails_is_the_callers_and_is_remembered(self, cache: ModelCache) -> None:
        cache.get("a", lambda: Net(2))
        cache.get("b", lambda: Net(2))
        place = cache.residence("b")

        with pytest.raises(RuntimeError, match="out of memory"):
            place.run(self.short_of_memory(cache, until=0), work=DENOISE)

        assert place.rows(DENOISE) < DENOISE.rows

    def test_what_left_in_between_is_not_taken_off_what_the_second_call_took(self) -> None:
        @define(eq=False)
        class Counted(PretendDevice):
            used_kib: float = 0

            def used_bytes(self) -> int:
                return int(self.used_kib * KIB)

        device, memory = Counted(budget_kib=20), WorkingMemory()
        cache = cache_of(device, memory=memory)
        for key in ("a", "b"):
            cache.get(key, lambda: Net(6))
            device.used_kib += 6

        def work() -> None:
            device.take(device.used_kib)
            if "a" in cache.on_device:
                device.used_kib = 6
                raise torch.OutOfMemoryError("CUDA out of memory")
            device.take(6 + 10)

        cache.residence("b").run(work, work=DENOISE)

        figures = memory.figures("b", DENOISE)
        assert figures is not None
        assert figures.wanted == 11 * KIB
        assert cache.traffic.retries == 1

    def test_a_stream_that_runs_out_of_memory_goes_on_where_it_was(self, cache: ModelCache) -> None:
        cache.get("a", lambda: Net(2))
        cache.get("b", lambda: Net(2))
        short = self.short_of_memory(cache, until=1)

        def frames() -> Iterator[int]:
            yield from range(3)
            assert short() == "done"
            yield from range(3, 5)

        assert list(cache.residence("b").stream(frames, work=DENOISE)) == [0, 1, 2, 3, 4]
        assert set(cache.on_device) == {"b"}
        assert cache.traffic.retries == 1

    def test_a_stream_keeps_its_part_on_the_device_until_it_ends(self, cache: ModelCache) -> None:
        cache.get("a", lambda: Net(2))
        cache.get("b", lambda: Net(2))
        stream = cache.residence("b").stream(lambda: range(2))
        next(stream)
        cache.free_others()
        assert set(cache.on_device) == {"b"}
        assert list(stream) == [1]
        cache.free_others()
        assert not cache.on_device

    def test_a_stream_that_still_fails_is_the_callers(self, cache: ModelCache) -> None:
        cache.get("a", lambda: Net(2))
        cache.get("b", lambda: Net(2))
        short = self.short_of_memory(cache, until=0)
        with pytest.raises(RuntimeError, match="out of memory"):
            list(cache.residence("b").stream(lambda: iter([short()])))

    def test_another_error_is_not_tried_again(self, cache: ModelCache) -> None:
        cache.get("a", lambda: Net(2))
        cache.get("b", lambda: Net(2))
        calls = []

        def fail() -> None:
            calls.append(1)
            raise RuntimeError("a shape does not fit")

        with pytest.raises(RuntimeError, match="shape"):
            cache.residence("b").run(fail, work=DENOISE)
        assert (calls, set(cache.on_device)) == ([1], {"a", "b"})

    def test_a_load_is_tried_once_more_with_the_device_to_itself(self, cache: ModelCache) -> None:
        cache.get("a", lambda: Net(2))

        def load() -> Net:
            self.short_of_memory(cache, until=0)()
            return Net(2)

        cache.get("b", load)

        assert set(cache.on_device) == {"b"}
        assert cache.keys == ("a", "b")


def test_without_room_in_main_memory_a_model_is_dropped_and_loaded_anew(device: PretendDevice) -> None:
    cache = cache_of(device, host_kib=5)
    cache.get("a", lambda: Net(6))

    cache.get("b", lambda: Net(6))

    assert cache.keys == ("b",)
    cache.get("a", lambda: Net(6))


def test_main_memory_keeps_what_was_used_last(device: PretendDevice) -> None:
    cache = cache_of(device, host_kib=13)
    for key in "abcd":
        cache.get(key, lambda: Net(6))

    assert cache.keys == ("b", "c", "d")


def test_a_model_that_its_plugin_holds_is_not_dropped_for_main_memory(device: PretendDevice) -> None:
    cache = cache_of(device, host_kib=0)
    get_in_parts(cache, "wan", text_encoder=7, transformer=5)
    place = cache.residence("wan")

    for part in ("text_encoder", "transformer", "text_encoder"):
        with place.use(part):
            assert f"wan ({part})" in cache.on_device


def test_a_machine_whose_memory_is_spent_is_not_asked_for_more(device: PretendDevice) -> None:
    cache = ModelCache(device_memory=device, find_device=lambda: CPU, host_budget_gb=0, host_free=lambda: 7 * KIB)

    with pytest.raises(OutOfMemory, match=r"wan \(text_encoder\) has to leave"):
        get_in_parts(cache, "wan", text_encoder=7, transformer=5)

    assert "wan (text_encoder)" in cache.on_device


@pytest.mark.parametrize(
    ("key", "part", "words"),
    [("other", "vae", "other is not warm"), ("wan", "ave", "no part 'ave'; it has transformer, vae")],
)
def test_a_mistake_in_a_plugin_is_named(cache: ModelCache, key: str, part: str, words: str) -> None:
    get_in_parts(cache, "wan", transformer=1, vae=1)

    with pytest.raises(GenerationError, match=words), cache.residence(key).use(part):
        pass


def test_what_operations_took_is_known_after_a_restart(device: PretendDevice, tmp_path: Path) -> None:
    for expected in (4, 2):
        cache = cache_of(device, memory=WorkingMemory(tmp_path / "memory.json"))
        cache.get("a", lambda: Net(4))
        place = cache.residence("a")
        assert place.rows(DENOISE) == expected
        with place.use(work=DENOISE):
            device.take(8)


SIZES = {"a": (3, 2), "b": (5,), "c": (1, 4, 2), "d": (7,)}


class Pool(RuleBasedStateMachine):
    """Whatever jobs do, one after another and one inside the other."""

    @initialize(budget=st.integers(4, 24), host=st.integers(0, 24))
    def begin(self, budget: int, host: int) -> None:
        self.device = PretendDevice(budget_kib=budget)
        self.cache = cache_of(self.device, host_kib=host)
        self.open: list[tuple[contextlib.ExitStack, set[str]]] = []
        self.held: dict[str, tuple[SimpleNamespace, list[torch.Tensor]]] = {}

    @rule(key=st.sampled_from(sorted(SIZES)), data=st.data())
    def use(self, key: str, data: st.DataObject) -> None:
        sizes = {f"p{number}": size for number, size in enumerate(SIZES[key])}
        model = self.cache.get(key, lambda: in_parts(**sizes), parts=vars)
        part = data.draw(st.sampled_from(sorted(sizes)))
        stack = contextlib.ExitStack()
        if len(self.open) < 3:
            stack.enter_context(self.cache.residence(key).use(part, work=DENOISE))
            self.open.append((stack, {f"{key} ({part})"}))
            there = self.cache.on_device
            assert sum(there.values()) <= self.device.budget_kib * KIB or set(there) <= self.locked
            self.device.take(data.draw(st.integers(0, 6)))
        if key not in self.held or self.held[key][0] is not model:
            self.held[key] = (model, [net() for net in vars(model).values()])

    @precondition(lambda self: self.open)
    @rule()
    def finish(self) -> None:
        stack, _ = self.open.pop()
        stack.close()

    @rule()
    def free_others(self) -> None:
        self.cache.free_others()
        assert set(self.cache.on_device) == self.locked

    @property
    def locked(self) -> set[str]:
        return {name for _, names in self.open for name in names}

    @invariant()
    def what_is_in_use_is_on_the_device(self) -> None:
        if hasattr(self, "cache"):
            assert self.locked <= set(self.cache.on_device)

    @invariant()
    def every_model_computes_what_it_always_did(self) -> None:
        if hasattr(self, "cache"):
            for model, expected in self.held.values():
                for net, result in zip(vars(model).values(), expected, strict=True):
                    assert torch.equal(net(), result)

    def teardown(self) -> None:
        while getattr(self, "open", []):
            self.finish()


Pool.TestCase.settings = settings(
    max_examples=25, stateful_step_count=20, deadline=None, suppress_health_check=[HealthCheck.filter_too_much]
)
TestPool = Pool.TestCase


@settings(max_examples=50, deadline=None)
@given(
    uses=st.lists(st.sampled_from("abcdef"), min_size=1, max_size=20),
    sizes=st.lists(st.integers(1, 6), min_size=6, max_size=6),
)
def test_what_stays_was_used_later_than_what_left(uses: list[str], sizes: list[int]) -> None:
    cache = cache_of(PretendDevice(budget_kib=12))
    size_of = dict(zip("abcdef", sizes, strict=True))
    for key in uses:
        cache.get(key, lambda key=key: Net(size_of[key]))  # type: ignore[misc]

    latest = list(dict.fromkeys(reversed(uses)))
    stays = [key for key in latest if key in cache.on_device]
    assert stays == latest[: len(stays)]
    assert sum(size_of[key] for key in stays) <= 12
    assert cache.keys == tuple(reversed(latest))
