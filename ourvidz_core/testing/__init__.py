"""What a plugin's tests are made of: a conformance suite, a host, doubles, real servers, real distributions.

The pytest plugin ``pytest_ourvidz`` adds the fixture ``host``. Names are imported when
they are asked for: some of these modules are used without pytest.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ourvidz_core.testing.distributions import make_distribution
    from ourvidz_core.testing.doubles import FaultyStorage, RecordingContext, StubEngine
    from ourvidz_core.testing.host import PluginHost, plugin_module, plugin_of
    from ourvidz_core.testing.servers import (
        Answer,
        Bucket,
        FileServer,
        LocalServer,
        ReceivedRequest,
        SupabaseServer,
    )
    from ourvidz_core.testing.stand_in import stand_in_plugin
    from ourvidz_core.testing.storage import StorageSuite
    from ourvidz_core.testing.suite import ConformanceSuite

_HOMES = {
    "Answer": "servers",
    "Bucket": "servers",
    "ConformanceSuite": "suite",
    "FaultyStorage": "doubles",
    "FileServer": "servers",
    "LocalServer": "servers",
    "PluginHost": "host",
    "ReceivedRequest": "servers",
    "RecordingContext": "doubles",
    "StorageSuite": "storage",
    "StubEngine": "doubles",
    "SupabaseServer": "servers",
    "make_distribution": "distributions",
    "plugin_module": "host",
    "plugin_of": "host",
    "stand_in_plugin": "stand_in",
}

__all__ = [
    "Answer",
    "Bucket",
    "ConformanceSuite",
    "FaultyStorage",
    "FileServer",
    "LocalServer",
    "PluginHost",
    "ReceivedRequest",
    "RecordingContext",
    "StorageSuite",
    "StubEngine",
    "SupabaseServer",
    "make_distribution",
    "plugin_module",
    "plugin_of",
    "stand_in_plugin",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
