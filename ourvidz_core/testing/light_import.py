"""Load one plugin in a fresh process in which heavy libraries cannot be imported, and say which were asked for.

``python -m ourvidz_core.testing.light_import DISTRIBUTION`` prints a JSON
object as its last line: each heavy library, with the plugin's line that led to it.
"""

from __future__ import annotations

import contextlib
import json
import sys
import traceback
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from ourvidz_core.plugins.loading import installed_plugins

#: What takes seconds or a device to import.
HEAVY = frozenset({"torch", "torchvision", "diffusers", "transformers", "tensorflow", "jax", "onnxruntime"})


class HeavyImports:
    """A finder that refuses heavy libraries and remembers who asked."""

    def __init__(self) -> None:
        self.places: dict[str, str] = {}

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,  # noqa: ARG002 - the protocol's
        target: ModuleType | None = None,  # noqa: ARG002 - the protocol's
    ) -> ModuleSpec | None:
        """See :class:`importlib.abc.MetaPathFinder`."""
        library = fullname.partition(".")[0]
        if library not in HEAVY:
            return None
        self.places.setdefault(library, _place())
        raise ImportError(f"{library} is not imported while plugins are only listed", name=library)


def _place() -> str:
    """The outermost line that is the plugin's: below the loader, outside the import machinery."""
    frames = traceback.extract_stack()
    loader = max(index for index, frame in enumerate(frames) if frame.filename == __file__ and frame.name == "main")
    for frame in frames[loader + 1 :]:
        is_machinery = "importlib" in frame.filename or "contextlib" in frame.filename
        if not is_machinery and frame.line:
            return f"{frame.filename}:{frame.lineno}: {frame.line}"
    return "its entry point"


def main(distribution: str) -> None:
    """Load the plugin of ``distribution`` and print what it asked for."""
    heavy = HeavyImports()
    sys.meta_path.insert(0, heavy)
    plugin = next(found for found in installed_plugins() if found.distribution == distribution)
    with contextlib.redirect_stdout(sys.stderr), contextlib.suppress(Exception, SystemExit):
        module: Any = plugin.load()
        tuple(getattr(module, "register_job_types", tuple)())
    print(json.dumps(heavy.places))  # noqa: T201 - the parent reads it


if __name__ == "__main__":
    main(sys.argv[1])
