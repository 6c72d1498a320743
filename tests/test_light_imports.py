"""Listing what is installed imports nothing heavy, and nothing of ours needs torch to be imported."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import ourvidz_core

HEAVY = ("torch", "diffusers", "transformers", "redis", "requests", "PIL", "numpy", "av")
PACKAGE = Path(ourvidz_core.__file__).parent


def imported_by(program: str) -> list[str]:
    """The heavy modules that a fresh process has after ``program``."""
    listing = (
        f"import sys, json; print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"{program}\n{listing}"], check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stderr.splitlines()[-1])


@pytest.mark.parametrize(
    "program",
    [
        pytest.param("import ourvidz_core", id="import ourvidz_core"),
        pytest.param(
            "from ourvidz_core.cli.main import main; assert main(['plugins', 'list']) == 0", id="plugins list"
        ),
        pytest.param("from ourvidz_core.cli.main import main; assert main(['job-types']) == 0", id="job-types"),
        pytest.param("from ourvidz_core.cli.main import main; assert main(['--help']) == 0", id="help"),
        # It lives as long as the machine, beside workers that need the memory.
        pytest.param("import ourvidz_core.orchestrator.supervisor, ourvidz_core.cli.up", id="the orchestrator"),
    ],
)
def test_nothing_heavy_is_imported(program: str) -> None:
    assert imported_by(program) == []


def imports_at_module_level(tree: ast.Module) -> set[str]:
    """The top-level packages that a module imports when it is imported itself."""
    found: set[str] = set()
    waiting: list[ast.stmt] = list(tree.body)
    while waiting:
        statement = waiting.pop()
        if isinstance(statement, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in statement.names}
        elif isinstance(statement, ast.ImportFrom) and statement.module:
            found.add(statement.module.partition(".")[0])
        elif isinstance(statement, ast.If) and ast.unparse(statement.test) == "TYPE_CHECKING":
            waiting += statement.orelse
        elif isinstance(statement, ast.ClassDef):
            waiting += statement.body
        elif isinstance(statement, ast.If | ast.Try | ast.With):
            waiting += [inner for inner in ast.walk(statement) if isinstance(inner, ast.Import | ast.ImportFrom)]
    return found


MODULES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("module", MODULES, ids=[str(module.relative_to(PACKAGE)) for module in MODULES])
def test_no_module_of_the_framework_needs_torch_to_be_imported(module: Path) -> None:
    imported = imports_at_module_level(ast.parse(module.read_text("utf-8")))

    assert not imported & {"torch", "diffusers", "transformers"}
