"""Write the pages and diagrams that are made from the code, or check that they are up to date.

``python docs/generate.py`` writes; ``--check`` ends with 1 where a page differs, or where
a link between pages leads nowhere.
"""

from __future__ import annotations

import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints
from urllib.parse import urlsplit

import attrs
import click
import diagrams
import wire_tables
from ourvidz_sdxl.settings import SdxlSettings
from ourvidz_wan.config import WanSettings
from ourvidz_wan_enhanced.settings import EnhancerSettings

import ourvidz_core.errors
from ourvidz_core.cli.main import cli
from ourvidz_core.observe.catalog import SPECS
from ourvidz_core.plugins import hookspecs
from ourvidz_core.settings import WELL_KNOWN_NAMES, Settings, load, load_section, variable_of

DOCS = Path(__file__).parent
REFERENCE = DOCS / "reference"
_NOTE = "<!-- Made by docs/generate.py from the code. Change the code, then run `make docs`. -->\n\n"
_LINK = re.compile(r"\]\(([^)#\s]+)")
#: The settings of the plugins in this repository; another plugin documents its own.
PLUGIN_SECTIONS: tuple[Any, ...] = (SdxlSettings, WanSettings, EnhancerSettings)
_OF_THIS_MACHINE = {
    "state_dir": "the user's state directory",
    "work_dir": "in the system's temporary directory",
    "worker_name": "host name and process id",
}


def settings_page() -> str:
    """A table of all settings, and one for each plugin of this repository."""
    parts = ["# Settings\n", (inspect.getdoc(ourvidz_core.settings) or "") + "\n", _settings_table(Settings, load({}))]
    for section in PLUGIN_SECTIONS:
        name = section.SECTION
        parts += [
            f"\n## ourvidz-{name.replace('_', '-')}\n",
            f"{inspect.getdoc(section)}\n",
            _settings_table(section, load_section(section, {}), name),
        ]
    return "\n".join(parts) + "\n"


def _settings_table(cls: Any, defaults: object, section: str = "") -> str:
    lines = ["| variable | default | meaning |", "|---|---|---|"]
    for field in attrs.fields(cls):
        names = [variable_of(field.name, section)]
        if not section and field.name in WELL_KNOWN_NAMES:
            names.append(WELL_KNOWN_NAMES[field.name])
        shown = " or ".join(f"`{name}`" for name in names)
        lines.append(f"| {shown} | {_default(field.name, getattr(defaults, field.name))} | {_help(field, cls)} |")
    return "\n".join(lines)


def cli_page() -> str:
    """The help of every command."""
    parts = ["# Command line\n", (inspect.getdoc(sys.modules["ourvidz_core.cli.main"]) or "") + "\n"]
    cli.list_commands = lambda _: sorted(cli.commands)  # type: ignore[method-assign]  # a plugin documents its own
    for name, command in _commands(cli, "ourvidz"):
        context = click.Context(command, info_name=name, max_content_width=100, terminal_width=100)
        parts.append(f"## {name}\n\n```text\n{command.get_help(context)}\n```\n")
    return "\n".join(parts)


def hooks_page() -> str:
    """Every hook with its signature and its specification."""
    parts = ["# Hooks\n", (inspect.getdoc(hookspecs) or "") + "\n"]
    for name, hook in vars(hookspecs).items():
        options: dict[str, Any] | None = getattr(hook, f"{hookspecs.PROJECT}_spec", None)
        if options is None:
            continue
        signature = str(inspect.signature(hook)).replace("'", "")
        answers = "The first answer that is not None counts." if options["firstresult"] else "Every answer counts."
        if signature.endswith("-> None"):
            answers = "It answers nothing."
        warnings = [options["warn_on_impl"], *(options["warn_on_impl_args"] or {}).values()]
        answers += "".join(f"\n\n**Deprecated**: {warning}." for warning in warnings if warning is not None)
        parts.append(f"## {name}\n\n```text\n{name}{signature}\n```\n\n{inspect.getdoc(hook)}\n\n{answers}\n")
    return "\n".join(parts)


def errors_page() -> str:
    """The tree of errors, and what each is."""
    text = inspect.getdoc(ourvidz_core.errors) or ""
    head, _, rest = text.partition("::\n\n")
    tree, _, tail = rest.partition("\n\n``JobError")
    parts = ["# Errors\n", f"{head}\n```text\n{textwrap.dedent(tree)}\n```\n", f"``JobError{tail}\n"]
    parts += ["| error | tried again | meaning |", "|---|---|---|"]
    for name, cls in vars(ourvidz_core.errors).items():
        if isinstance(cls, type) and issubclass(cls, ourvidz_core.errors.JobError):
            meaning = (inspect.getdoc(cls) or "").splitlines()[0]
            parts.append(f"| `{name}` | {'yes' if cls.is_transient else 'no'} | {meaning} |")
    return "\n".join(parts) + "\n"


def metrics_page() -> str:
    """Every metric of a worker."""
    parts = ["# Metrics\n", "What a worker serves at `/metrics`; see [how to monitor workers](../how-to/monitor.md).\n"]
    parts += ["| metric | kind | labels | meaning |", "|---|---|---|---|"]
    for spec in SPECS:
        labels = ", ".join(f"`{label}`" for label in spec.labels) or "none"
        parts.append(f"| `{spec.shown_name}` | {spec.kind.value} | {labels} | {spec.meaning} |")
    return "\n".join(parts) + "\n"


PAGES = {
    "settings.md": settings_page,
    "cli.md": cli_page,
    "hooks.md": hooks_page,
    "errors.md": errors_page,
    "metrics.md": metrics_page,
}
DIAGRAMS = {"imports.svg": diagrams.imports_diagram, "walk.svg": diagrams.walk_diagram}


def made() -> Iterator[tuple[Path, str]]:
    """Each file that is made from the code, and what belongs into it."""
    for name, make in PAGES.items():
        yield REFERENCE / name, _NOTE + _as_markdown(make())
    wire_format = REFERENCE / "wire-format.md"
    yield wire_format, wire_tables.fill(wire_format.read_text("utf-8"))
    for name, draw in DIAGRAMS.items():
        yield DOCS / "explanation" / name, draw()


def broken_links() -> Iterator[str]:
    """Links of pages and READMEs that lead to no file. Addresses elsewhere are looked at, not asked."""
    root = DOCS.parent
    for page in [
        *DOCS.rglob("*.md"),
        *root.glob("*.md"),
        *root.glob("plugins/*/README.md"),
        *root.glob("examples/**/*.md"),
    ]:
        for target in _LINK.findall(page.read_text("utf-8")):
            if not _is_well_formed(target) if ":" in target else not (page.parent / target).exists():
                yield f"{page.relative_to(root)}: {target} leads nowhere"


def _is_well_formed(url: str) -> bool:
    parts = urlsplit(url)
    return parts.scheme == "https" and "." in (parts.hostname or "") and not parts.username


def main() -> int:
    """Write or check."""
    is_check = "--check" in sys.argv
    faults = list(broken_links()) if is_check else []
    REFERENCE.mkdir(exist_ok=True)
    for path, text in made():
        if not is_check:
            path.write_text(text, "utf-8")
        elif not path.exists() or path.read_text("utf-8") != text:
            faults.append(f"{path.relative_to(DOCS.parent)} does not say what the code does; run make docs")
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


def _as_markdown(text: str) -> str:
    """Docstrings are written with the markup of Sphinx."""
    text = re.sub(r":\w+:`~?([\w.]+)`", r"`\1`", text)
    return re.sub(r"(?<!`)``(?!`)", "`", text)


def _commands(command: click.Command, name: str) -> Iterator[tuple[str, click.Command]]:
    yield name, command
    if isinstance(command, click.Group):
        for child_name in sorted(command.commands):
            yield from _commands(command.commands[child_name], f"{name} {child_name}")


def _default(name: str, value: object) -> str:
    if name in _OF_THIS_MACHINE:
        return _OF_THIS_MACHINE[name]
    if value in (None, "", [], {}):
        return "none"
    if isinstance(value, bool):
        return f"`{value}`".lower()
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def _help(field: attrs.Attribute[Any], cls: Any) -> str:
    text: str = field.metadata["typed-settings"]["help"]
    secret = " Secret." if "SecretStr" in str(get_type_hints(cls)[field.name]) else ""
    return text.replace("|", "\\|") + "." + secret


if __name__ == "__main__":
    sys.exit(main())
