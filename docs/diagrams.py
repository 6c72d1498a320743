"""Draw the diagrams of the explanation pages from the code: what it imports, and what it does with a job.

``docs/generate.py`` writes them and checks that they are current. Nothing here is placed by hand: a module that
begins to import another gets its line, and a hook that is asked earlier moves up.
"""

from __future__ import annotations

import importlib
import inspect
import io
import sys
import tempfile
import tomllib
from collections.abc import Callable, Collection, Sequence
from html import escape
from importlib.metadata import entry_points
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import grimp
from attrs import define, evolve, field, frozen
from PIL import Image

from ourvidz_core.delivery.references import ReferenceSource, StubReferences
from ourvidz_core.delivery.storage import DirectoryStorage, Storage
from ourvidz_core.engine.checks import check_artifact
from ourvidz_core.engine.local import LocalEngine
from ourvidz_core.plugins import hookspecs
from ourvidz_core.plugins.loading import ENTRY_POINT_GROUP
from ourvidz_core.plugins.registry import OwnedJobType, Registry
from ourvidz_core.testing.host import PluginHost, plugin_module
from ourvidz_core.wire.events import GenerationProgressed
from ourvidz_core.wire.payloads import decode_message
from ourvidz_core.worker.reports import completed_report

ROOT = Path(__file__).parent.parent
_INK, _PALE, _PAPER = "#24313d", "#5b6b7a", "#ffffff"
_FILLS = {"owner": "#dbe9f6", "everyone": "#fdeeda", "core": "#eef0f2"}


# -- what is drawn


def imports_diagram() -> str:
    """A row for each room of the core, a column for each that it may import, a mark where it does."""
    names = _rooms()
    imports = _imports_between(names)
    first = 380
    drawing = _Drawing(width=first + 44.0 * len(names) + 20, height=110.0 + 44 * len(names))
    for column, name in enumerate(names):
        drawing.label(first + 18 + 44 * column, 60, name.removeprefix("ourvidz_core."), size=11, turned=True)
    for row, name in enumerate(names):
        top = 76.0 + 44 * row
        purpose = _shortened(_purpose_of(name), 62)
        drawing.box(20, top, 340, name.removeprefix("ourvidz_core."), purpose, _FILLS["owner"])
        for column, other in enumerate(names):
            drawing.cell(first + 44 * column, top, _cell_fill(name, other, imports))
    drawing.swatch(20, drawing.height - 24, _INK, "the row imports the column")
    drawing.swatch(250, drawing.height - 24, _FILLS["core"], "may not: imports point down, never up")
    return drawing.text("Which room of ourvidz_core imports which")


def _cell_fill(importer: str, imported: str, imports: Collection[tuple[str, str]]) -> str:
    if (importer, imported) in imports:
        return _INK
    rank = {name: row for row, layer in enumerate(_layers()) for name in layer}
    return _PAPER if rank[imported] > rank[importer] else _FILLS["core"]


def walk_diagram() -> str:
    """One job from message to report, in the order in which a run of the real runner called for it."""
    drawing = _Drawing(width=760)
    lanes = {"worker": 20.0, "engine": 390.0}
    for lane, left in lanes.items():
        drawing.label(left, 24, lane, bold=True)
    top = 36.0
    before: tuple[float, float] | None = None
    for step in _observed():
        left = lanes[step.lane]
        if before is not None:
            drawing.arrow(before, (left + 175, top))
        drawing.box(left, top, 350, step.name, _shortened(step.note, 66), _FILLS[step.who])
        drawing.label(left + 342, top + 16, " ".join(step.events), size=10, colour=_PALE, anchor="end")
        before = (left + 175, top + 40)
        top += 62
    meanings = {
        "owner": "hook: the owner of the job type",
        "everyone": "hook: the owner and every extension",
        "core": "the core alone",
    }
    for column, (who, meaning) in enumerate(meanings.items()):
        drawing.swatch(20 + 250 * column, top, _FILLS[who], meaning)
    drawing.height = top + 30
    return drawing.text("The walk of one job through worker and engine, with its events")


def _shortened(note: str, characters: int) -> str:
    plain = note.replace("``", "").rstrip(".")
    return plain if len(plain) <= characters else plain[: characters - 2].rpartition(" ")[0].rstrip(",:;") + " …"


# -- imports


def _layers() -> list[list[str]]:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]["contracts"]
    (layered,) = [contract for contract in contracts if contract["type"] == "layers"]
    return [[name.strip() for name in layer.split(":")] for layer in layered["layers"]]


def _rooms() -> list[str]:
    return [name for layer in _layers() for name in layer]


def _imports_between(names: Sequence[str]) -> list[tuple[str, str]]:
    """Which room imports which. What only a type checker reads is no import."""
    graph = grimp.build_graph("ourvidz_core", exclude_type_checking_imports=True, cache_dir=None)
    rooms = {module: name for name in names for module in (name, *graph.find_descendants(name))}
    pairs = {
        (room, rooms[imported])
        for module, room in rooms.items()
        for imported in graph.find_modules_directly_imported_by(module)
        if rooms.get(imported, room) != room
    }
    return sorted(pairs)


def _purpose_of(name: str) -> str:
    """The first line of a room's docstring."""
    return (importlib.import_module(name).__doc__ or "").partition("\n")[0]


# -- the walk

#: What the core does beside asking hooks, by the function that does it, and whose docstring says what that is.
_CORE_STEPS: dict[CodeType, tuple[str, Callable[..., Any]]] = {
    done_by.__code__: (label, told_by)
    for label, done_by, told_by in (
        ("decode the message", decode_message, decode_message),
        ("fetch references", StubReferences.fetch, ReferenceSource.fetch),
        ("check each artifact", check_artifact, check_artifact),
        ("store each artifact", DirectoryStorage.store, Storage.store),
        ("report", completed_report, completed_report),
    )
}
_HOOKS: dict[CodeType, str] = {
    getattr(OwnedJobType, name).__code__: name
    for name, hook in vars(hookspecs).items()
    if hasattr(hook, "ourvidz_spec") and hasattr(OwnedJobType, name)
}
_ENGINE = LocalEngine.run.__code__
_EVENTS = Registry.report.__code__


@frozen(kw_only=True)
class _Step:
    """Something that was seen to happen to a job."""

    name: str
    note: str
    lane: str
    who: str
    events: tuple[str, ...] = ()


@define
class _Observer:
    """Writes down what a run calls, in order: a profiler that knows a dozen functions."""

    steps: list[_Step] = field(factory=list)
    lane: str = "worker"

    def __call__(self, frame: FrameType, what: str, _: Any) -> None:
        code = frame.f_code
        if code is _ENGINE:
            self.lane = "engine" if what == "call" else "worker"
        elif what == "call" and code is _EVENTS:
            self._hear(frame.f_locals["event"])
        elif what == "call" and code in _HOOKS:
            hook = getattr(hookspecs, _HOOKS[code])
            self._see(_HOOKS[code], hook, "owner" if hook.ourvidz_spec["firstresult"] else "everyone")
        elif what == "call" and code in _CORE_STEPS:
            self._see(*_CORE_STEPS[code], "core")

    def _see(self, name: str, function: Callable[..., Any], who: str) -> None:
        note = (inspect.getdoc(function) or "").splitlines()[0]
        self.steps.append(_Step(name=name, note=note, lane=self.lane, who=who))

    def _hear(self, event: object) -> None:
        if not isinstance(event, GenerationProgressed):
            self.steps[-1] = evolve(self.steps[-1], events=(*self.steps[-1].events, type(event).__name__))


def _observed() -> Sequence[_Step]:
    """The steps of a job of the example plugin, which has one reference and makes one image."""
    (entry_point,) = entry_points(group=ENTRY_POINT_GROUP, name="acme_upscale")
    picture = io.BytesIO()
    Image.linear_gradient("L").resize((8, 8)).save(picture, "PNG")
    url = "https://storage.example.test/small.png"
    message = {"id": "a", "type": "acme_upscale", "prompt": "", "user_id": "u", "config": {"image": url}}
    observer = _Observer()
    with (
        tempfile.TemporaryDirectory() as root,
        PluginHost(Path(root), plugin_module(entry_point.load()), references={url: picture.getvalue()}) as host,
    ):
        sys.setprofile(observer)
        try:
            outcome = host.run(message)
        finally:
            sys.setprofile(None)
    assert outcome.error is None, outcome.error
    return observer.steps


# -- drawing


@define
class _Drawing:
    """An SVG that grows downwards. It needs no script, no style sheet and no font from elsewhere."""

    width: float
    height: float = 0.0
    _parts: list[str] = field(factory=list)

    def box(self, left: float, top: float, width: float, name: str, note: str, fill: str) -> None:
        self._parts.append(
            f'<rect x="{left:g}" y="{top:g}" width="{width:g}" height="40" rx="5" fill="{fill}" stroke="{_PALE}"/>'
        )
        self.label(left + 10, top + 17, name, bold=True)
        self.label(left + 10, top + 32, note, size=10, colour=_PALE)

    def label(
        self,
        left: float,
        top: float,
        text: str,
        *,
        bold: bool = False,
        size: int = 13,
        colour: str = _INK,
        anchor: str = "start",
        turned: bool = False,
    ) -> None:
        weight = ' font-weight="600"' if bold else ""
        turn = f' transform="rotate(-45 {left:g} {top:g})"' if turned else ""
        self._parts.append(
            f'<text x="{left:g}" y="{top:g}" font-size="{size}" fill="{colour}" text-anchor="{anchor}"{weight}{turn}>'
            f"{escape(text)}</text>"
        )

    def arrow(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        (left, top), (right, bottom) = start, end
        middle = (top + bottom) / 2
        path = f"M{left:g} {top:g} C{left:g} {middle:g} {right:g} {middle:g} {right:g} {bottom:g}"
        self._parts.append(f'<path d="{path}" fill="none" stroke="{_PALE}" marker-end="url(#tip)"/>')

    def cell(self, left: float, top: float, fill: str) -> None:
        self._parts.append(
            f'<rect x="{left:g}" y="{top:g}" width="40" height="40" rx="5" fill="{fill}" stroke="{_FILLS["core"]}"/>'
        )

    def swatch(self, left: float, top: float, fill: str, meaning: str) -> None:
        self._parts.append(f'<rect x="{left:g}" y="{top:g}" width="14" height="14" rx="3" fill="{fill}"/>')
        self.label(left + 20, top + 11, meaning, size=11)

    def text(self, title: str) -> str:
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width:g} {self.height:g}"'
            f' width="{self.width:g}" font-family="system-ui, sans-serif" role="img"><title>{escape(title)}</title>'
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7"'
            f' orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="{_PALE}"/></marker></defs>'
            f'<rect width="100%" height="100%" fill="{_PAPER}"/>'
        )
        return "\n".join([head, *self._parts, "</svg>", ""])
