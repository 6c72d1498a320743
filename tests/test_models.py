"""Warm models stay while the budget lasts, and leave for good."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from ourvidz_core.engine.device_memory import GIB, DeviceMemory, host_bytes_free
from ourvidz_core.engine.models import ModelCache
from ourvidz_core.errors import OutOfMemory


class Model:
    """Refers to itself, as a pipeline and its parts do."""

    def __init__(self) -> None:
        self.me = self


def never() -> Model:
    raise AssertionError("the model was warm")


def test_a_warm_model_is_not_loaded_again() -> None:
    cache = ModelCache()

    first = cache.get("a", Model)

    assert cache.get("a", never) is first


def test_the_model_that_was_used_longest_ago_leaves_first() -> None:
    cache = ModelCache(budget_gb=10)
    for key in "abc":
        cache.get(key, Model, vram_gb=3)
    cache.get("a", never)

    cache.get("d", Model, vram_gb=4)

    assert cache.keys == ("c", "a", "d")


def test_a_model_that_leaves_is_gone_before_the_next_one_loads() -> None:
    cache = ModelCache(budget_gb=10)
    gone = weakref.ref(cache.get("a", Model, vram_gb=8))
    alive: list[object] = []

    def load() -> Model:
        alive.append(gone())
        return Model()

    cache.get("b", load, vram_gb=8)

    assert alive == [None]


@pytest.mark.parametrize("forget", [lambda cache: cache.drop("a"), lambda cache: cache.clear()], ids=["drop", "clear"])
def test_a_model_that_is_forgotten_is_gone(forget: Callable[[ModelCache], None]) -> None:
    cache = ModelCache()
    gone = weakref.ref(cache.get("a", Model))

    forget(cache)

    assert gone() is None
    assert cache.keys == ()


def test_a_load_that_raises_leaves_nothing_behind() -> None:
    cache = ModelCache()

    def load() -> Model:
        raise OutOfMemory("too little")

    with pytest.raises(OutOfMemory):
        cache.get("a", load)

    assert cache.keys == ()
    assert isinstance(cache.get("a", Model), Model)


def test_a_model_above_the_whole_budget_is_tried_alone() -> None:
    cache = ModelCache(budget_gb=10)
    cache.get("a", Model, vram_gb=3)

    cache.get("b", Model, vram_gb=99)

    assert cache.keys == ("b",)


def test_without_a_device_and_a_budget_everything_stays() -> None:
    cache = ModelCache()
    for key in "abc":
        cache.get(key, Model, vram_gb=1000)

    assert cache.keys == ("a", "b", "c")


def test_forgetting_what_is_not_there_is_no_fault() -> None:
    ModelCache().drop("a")


def test_main_memory_is_that_of_the_container_whose_file_pages_can_go(tmp_path: Path) -> None:
    for name, text in {
        "max": "9000",
        "current": "6000",
        "stat": "anon 1\nactive_file 100\ninactive_file 200\n",
    }.items():
        (tmp_path / f"memory.{name}").write_text(text)
    assert host_bytes_free(tmp_path) == 3300

    (tmp_path / "memory.max").write_text("max\n")
    assert host_bytes_free(tmp_path) > 9000


def test_without_a_budget_models_get_what_other_processes_leave_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    class Cuda:
        free, share = 20 * GIB, 1.0
        is_available = staticmethod(lambda: True)
        mem_get_info = classmethod(lambda cls: (cls.free, 80 * GIB))
        memory_reserved = staticmethod(lambda: 10 * GIB)
        get_per_process_memory_fraction = classmethod(lambda cls: cls.share)

    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=Cuda))

    assert DeviceMemory().budget_bytes() == 27 * GIB  # nine tenths of what is free and what is ours
    Cuda.free = 10 * GIB  # somebody else took the rest
    assert DeviceMemory().budget_bytes() == 18 * GIB
    Cuda.share = 0.125  # or this process is held to less
    assert DeviceMemory().budget_bytes() == 9 * GIB
    assert DeviceMemory(budget_gb=4).budget_bytes() == 4 * GIB
    assert DeviceMemory(budget_gb=400).budget_bytes() == 10 * GIB
