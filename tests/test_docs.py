"""Every page does what it says: plugins are installed, sessions are run, commands and settings exist."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from ourvidz_core.cli.main import cli
from ourvidz_core.settings import SETTINGS_FILE
from ourvidz_core.testing.distributions import make_distribution

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
BLOCK = re.compile(r"^( *)```(\w+)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
#: Shell in a README that is shown without a fence.
INDENTED = re.compile(r"(?:^ {4}(?:export|git|ourvidz|pip|python|wan_generate|OURVIDZ_\w+=).*\n?)+", re.MULTILINE)
GENERATED = "<!-- Made by docs/generate.py"
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for folder, pattern in (
        (ROOT, "*.md"),
        (DOCS, "**/*.md"),
        (ROOT, "plugins/*/README.md"),
        (ROOT, "examples/**/*.md"),
    )
    for path in folder.glob(pattern)
    if not path.read_text("utf-8").startswith((GENERATED, "```{include}"))
)


def blocks(page: str, *kinds: str) -> list[str]:
    """The fenced blocks of a page that are in one of the languages named."""
    found = BLOCK.findall((ROOT / page).read_text("utf-8"))
    return [re.sub(f"^{indent}", "", text, flags=re.MULTILINE) for indent, kind, text in found if kind in kinds]


def session(text: str) -> list[tuple[str, str]]:
    """The commands of a console block, each with the output that the page shows."""
    shown: list[tuple[str, str]] = []
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        command, _, output = part.partition("\n")
        shown.append((command, output))
    return shown


def shell(page: str) -> Iterator[str]:
    """All shell of a page: blocks, commands of sessions, and what READMEs indent."""
    yield from blocks(page, "sh", "bash")
    for text in blocks(page, "console"):
        yield "\n".join(command for command, _ in session(text))
    yield from (re.sub(r"^ {4}", "", text, flags=re.MULTILINE) for text in INDENTED.findall(without_blocks(page)))


def without_blocks(page: str) -> str:
    return BLOCK.sub("", (ROOT / page).read_text("utf-8"))


def commands(script: str) -> Iterator[list[str]]:
    """The simple commands of a script, as words, without the variables that are set for them."""
    for line in script.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words:
            end = next((index for index, word in enumerate(words) if word in {"|", "&&", "||", "&", ";"}), len(words))
            command, words = words[:end], words[end + 1 :]
            while command and re.match(r"\w+=", command[0]):
                command.pop(0)
            if command:
                yield command


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OURVIDZ_", "SUPABASE_"))}
    return {
        **kept,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(tmp_path / "site"),
        "OURVIDZ_STATE_DIR": str(tmp_path / "state"),
        "OURVIDZ_WORK_DIR": str(tmp_path / "work"),
    }


def assert_sessions_are_true(page: str, directory: Path, environ: dict[str, str]) -> None:
    """Type what the page types, in one shell, and see what the page shows."""
    typed = [pair for text in blocks(page, "console") for pair in session(text)]
    assert typed
    mark = "-- the next command --"
    script = "\n".join(f"{{ {command}\n}} 2>&1\necho '{mark}'" for command, _ in typed)
    done = subprocess.run(
        ["bash", "-c", script], cwd=directory, env=environ, capture_output=True, text=True, check=False
    )
    for (command, shown), printed in zip(typed, done.stdout.split(f"{mark}\n"), strict=False):
        # Plugins that are installed here and not allowed are listed as blocked; the page's reader has none.
        lines = [line for line in printed.splitlines() if " blocked " not in line]
        assert [line.split() for line in lines] == [line.split() for line in shown.splitlines()], command


def make_plugin_of(page: str, site: Path) -> str:
    """Install the plugin that a page shows; answers its name."""
    (source, *_), (project, *_) = blocks(page, "python"), blocks(page, "toml")
    declared = tomllib.loads(project)["project"]
    name: str = declared["name"]
    make_distribution(site, name, source, version=declared["version"])
    assert declared["entry-points"]["ourvidz"] == {name.replace("-", "_"): name.replace("-", "_")}
    return name


# -- pages that are run


def test_the_plugin_of_the_readme_prints_what_the_readme_says(tmp_path: Path, environ: dict[str, str]) -> None:
    name = make_plugin_of("README.md", tmp_path / "site")

    assert_sessions_are_true("README.md", tmp_path, {**environ, "OURVIDZ_ALLOW_PLUGINS": name})


STORAGE_PAGE = "docs/how-to/write-a-storage-backend.md"


def test_the_storage_of_its_page_stores_what_the_page_says(tmp_path: Path, environ: dict[str, str]) -> None:
    (source, _), (project,) = blocks(STORAGE_PAGE, "python"), blocks(STORAGE_PAGE, "toml")
    declared = tomllib.loads(project)["project"]
    example = tomllib.loads((ROOT / "examples/fsspec-storage/pyproject.toml").read_text("utf-8"))["project"]
    assert declared == {name: example[name] for name in declared}
    assert source == (ROOT / "examples/fsspec-storage/acme_fsspec_storage.py").read_text("utf-8")
    site = tmp_path / "site"
    make_distribution(site, declared["name"], "", version=declared["version"])
    (site / "acme_fsspec_storage.py").write_text(source, "utf-8")
    ((group, names),) = declared["entry-points"].items()
    lines = [f"[{group}]", *(f"{name} = {value}" for name, value in names.items())]
    (metadata,) = site.glob("acme_fsspec*.dist-info")
    (metadata / "entry_points.txt").write_text("\n".join(lines), "utf-8")
    plugin = make_plugin_of("README.md", site)
    allowed = f"{plugin},{declared['name']}"

    assert_sessions_are_true(STORAGE_PAGE, tmp_path, {**environ, "OURVIDZ_ALLOW_PLUGINS": allowed})


def test_the_storages_test_is_that_of_the_example() -> None:
    (_, test) = blocks(STORAGE_PAGE, "python")
    assert test in (ROOT / "examples/fsspec-storage/tests/test_fsspec_storage.py").read_text("utf-8")


# -- what all pages say


@pytest.mark.parametrize("page", PAGES)
def test_what_is_code_on_a_page_can_be_read(page: str) -> None:
    for source in blocks(page, "python"):
        compile(source, page, "exec")
    for text in blocks(page, "toml"):
        tomllib.loads(text)
    for text in blocks(page, "json"):
        one_value = not all(line.startswith("{") for line in text.splitlines())  # else one a line, as a log has them
        for value in [text] if one_value else text.splitlines():
            json.loads(value)
    for script in shell(page):
        done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{script}\n{done.stderr}"


@pytest.mark.parametrize("page", PAGES)
def test_every_command_on_a_page_exists_with_its_options(page: str) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    for command in (command for script in shell(page) for command in commands(script)):
        name, *arguments = command
        if name == "ourvidz":
            assert_is_a_command(arguments)
        elif name == "make":
            assert {word for word in arguments if "=" not in word} <= targets, command
        elif name == "python" and arguments[0].endswith(".py"):
            assert (ROOT / arguments[0]).is_file(), command


def assert_is_a_command(arguments: list[str]) -> None:
    """Parse a command line as ``ourvidz`` would, without running it. What it names need not be there."""
    command: click.Command = cli
    context = cli.make_context("ourvidz", arguments)
    try:
        while isinstance(command, click.Group):
            name, found, rest = command.resolve_command(context, [*context._protected_args, *context.args])
            assert found is not None
            command, context = found, found.make_context(name, list(rest), parent=context)
    except click.BadParameter as error:
        if "does not exist" not in error.message:
            raise


def test_every_setting_in_a_page_exists() -> None:
    reference = (DOCS / "reference/settings.md").read_text("utf-8")
    known = {SETTINGS_FILE, *re.findall(r"`(OURVIDZ_\w+)`", reference)}
    # The examples of a storage backend and of a policy have settings of their own.
    known |= {"OURVIDZ_STORAGE_URL", "OURVIDZ_STORAGE_OPTIONS"}
    known |= {"OURVIDZ_ACME_POLICY_WORDS", "OURVIDZ_ACME_POLICY_BLACK_SHARE"}
    for page in PAGES:
        for variable in re.findall(r"OURVIDZ_[A-Z0-9_]+[A-Z0-9]", (ROOT / page).read_text("utf-8")):
            assert variable in known, f"{page}: {variable}"


def test_every_known_failure_has_the_test_that_the_page_names() -> None:
    named = re.findall(r"`(test_\w+)` \|$", (DOCS / "explanation/known-failures.md").read_text("utf-8"), re.MULTILINE)
    assert len(named) >= 18
    sources = [
        path.read_text("utf-8") for folder in ("tests", "plugins") for path in (ROOT / folder).rglob("test_*.py")
    ]
    missing = [name for name in named if not any(f"def {name}(" in source for source in sources)]
    assert not missing


# -- the site


def test_the_generated_pages_are_up_to_date_and_all_links_lead_somewhere() -> None:
    done = subprocess.run(
        [sys.executable, str(DOCS / "generate.py"), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_readme_leads_to_every_page() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    for page in DOCS.glob("*/*.md"):
        included = re.match(r"```\{include\} (\S+)", page.read_text("utf-8"))
        shown = (page.parent / included[1]).resolve() if included else page
        assert f"]({shown.relative_to(ROOT).as_posix()})" in readme, f"README.md has no link to {page.name}"


def test_a_link_to_nowhere_and_a_font_from_elsewhere_are_noticed(tmp_path: Path) -> None:
    specification = importlib.util.spec_from_file_location("check_site", DOCS / "check_site.py")
    assert specification is not None
    assert specification.loader is not None
    check_site = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(check_site)
    (tmp_path / "a.html").write_text(
        '<link rel="stylesheet" href="https://fonts.example.test/a.css"><h1 id="here">A</h1>'
        '<a href="#here">here</a><a href="#there">there</a><a href="b.html">b</a><a href="https://example.test">e</a>'
    )

    assert sorted(check_site.faults(tmp_path)) == [
        "a.html fetches https://fonts.example.test/a.css",
        "a.html leads to #there, and a.html has no such place",
        "a.html leads to b.html, which is not there",
    ]
