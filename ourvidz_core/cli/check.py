"""``ourvidz plugins check``: the conformance checks on what is installed, each plugin in a process of its own."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from packaging.utils import canonicalize_name

from ourvidz_core.cli.common import open_settings, print_json, table
from ourvidz_core.errors import PluginError, SettingsError
from ourvidz_core.plugins.loading import installed_plugins
from ourvidz_core.plugins.trust import refusal_of

if TYPE_CHECKING:
    from ourvidz_core.settings import Settings

_LAST_CHARACTERS = 200


@click.command("check")
@click.argument("name", required=False)
@click.option("--no-run", "is_light", is_flag=True, help="Generate nothing: look at imports, names and messages only.")
@click.option(
    "--messages",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Directory of messages, *.json, to use in place of the samples of their job types.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def check_plugins(name: str | None, is_light: bool, messages: Path | None, as_json: bool) -> int:
    """Check that the installed plugins, or the one named NAME, do what every plugin must.

    The samples of their job types are generated, in time, out of time and out of memory;
    what needs a model that is not here is skipped. Ends with 1 where a check failed.
    """
    settings = open_settings(at_least=logging.ERROR)
    given = [_read(path) for path in sorted(messages.glob("*.json"))] if messages else []
    results = [
        result
        for distribution in _chosen(name, settings)
        for result in _check(distribution, settings, given, is_light=is_light)
    ]
    if as_json:
        print_json(results)
    else:
        rows = [(result["distribution"], result["check"], result["status"], result["reason"]) for result in results]
        click.echo(table(("DISTRIBUTION", "CHECK", "RESULT", "WHY NOT"), rows))
        for line in _flaws(results):
            click.echo(line)
    return 1 if any(result["status"] == "failed" for result in results) else 0


def _chosen(name: str | None, settings: Settings) -> list[str]:
    installed = [plugin.distribution for plugin in installed_plugins()]
    allowed = [distribution for distribution in installed if not refusal_of(distribution, settings)]
    if name is None:
        if not allowed:
            raise PluginError("no plugins are installed; pip install ourvidz-sdxl, for example")
        return allowed
    chosen = [distribution for distribution in installed if canonicalize_name(distribution) == canonicalize_name(name)]
    if not chosen:
        raise PluginError(f"{name} is not installed as a plugin; installed are: {', '.join(installed) or 'none'}")
    if (reason := refusal_of(chosen[0], settings)) is not None:
        raise PluginError(f"{chosen[0]} is not imported: {reason}")
    return chosen


def _check(
    distribution: str, settings: Settings, messages: list[dict[str, Any]], *, is_light: bool
) -> list[dict[str, Any]]:
    """The results of one plugin. Its process has the environment of an engine, which holds no secret."""
    from ourvidz_core.settings import engine_environment

    with tempfile.TemporaryDirectory() as scratch:
        results, request = Path(scratch) / "results.jsonl", Path(scratch) / "request.json"
        asked = {"distribution": distribution, "messages": messages, "is_light": is_light}
        request.write_text(json.dumps({**asked, "results": str(results), "scratch": scratch}), "utf-8")
        done = subprocess.run(
            [sys.executable, "-m", "ourvidz_core.testing.conformance", str(request)],
            env=engine_environment(settings),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            check=False,
        )
        lines = results.read_text("utf-8").splitlines() if results.exists() else []
    found = [json.loads(line) for line in lines]
    if done.returncode != 0:
        found.append(_died(distribution, done))
    return found


def _died(distribution: str, done: subprocess.CompletedProcess[bytes]) -> dict[str, Any]:
    from ourvidz_core.engine.processes import ending_of

    said = done.stderr.decode("utf-8", "replace").strip()[-_LAST_CHARACTERS:]
    flaw = {
        "problem": f"the process that checked it ended with {ending_of(done.returncode)}: {said or 'it said nothing'}",
        "cure": "raise an error instead of ending the process; native code that crashes belongs into a command",
        "job_type": None,
    }
    return {"distribution": distribution, "check": "survives", "status": "failed", "flaws": [flaw], "reason": ""}


def _flaws(results: Iterable[dict[str, Any]]) -> Iterable[str]:
    for result in results:
        for flaw in result["flaws"]:
            where = f"{flaw['job_type']}: " if flaw["job_type"] else ""
            yield f"\n{result['distribution']}, {result['check']}: {where}{flaw['problem']}\n  -> {flaw['cure']}"


def _read(path: Path) -> dict[str, Any]:
    try:
        message = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise SettingsError(f"{path} is not JSON: {error}") from error
    if not isinstance(message, dict) or not isinstance(message.get("type"), str):
        raise SettingsError(f"{path} is not a message: it must be an object with a type")
    return message
