"""What holds for every suite of the repository."""

from __future__ import annotations

import gc
import logging
from collections.abc import Generator, Iterator

import pytest

#: Begun first, so that at the end no process works on one of them alone while the others have nothing left.
LONGEST_FILES = (
    "test_worker.py",
    "test_demo_models.py",
    "test_enhanced_worker.py",
    "test_queue.py",
    "test_cli.py",
    "test_chaos.py",
    "test_engine_process.py",
    "test_wan_subprocesses.py",
    "test_wan_generate.py",
    "test_wan_payloads.py",
    "test_sdxl_generation.py",
    "test_sdxl_references.py",
    "test_commands.py",
    "test_up.py",
    "test_sdxl_payloads.py",
    "test_wan_plugin.py",
    "test_enhanced_policy.py",
)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """No garbage is collected while everything is imported, for hardly any of it is garbage: a fifth of that time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files in the order that ends soonest; what is in one file keeps its order."""
    places = {name: place for place, name in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """A command that sets up logging for its process must not decide what a later test can see."""
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    yield
    root.setLevel(level)
    root.handlers[:] = handlers


@pytest.fixture(autouse=True, scope="module")
def old_objects_left_alone() -> None:
    """Each host that closes collects garbage, a quarter of a second where torch is imported; what is here stays."""
    gc.collect()
    gc.freeze()
