"""The conformance checks pass what is right, and tell the author of what is wrong what to change."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from attrs import field, frozen

from ourvidz_core.cli.main import main
from ourvidz_core.plugins.loading import installed_plugins
from ourvidz_core.testing.conformance import CHECKS, CheckResult, CheckStatus, Subject
from ourvidz_core.testing.conformance import run_check as run_one
from ourvidz_core.testing.conformance.__main__ import main as check_one
from ourvidz_core.testing.suite import ConformanceSuite

IN_ENGINE = """
from attrs import evolve, frozen
from ourvidz_core import (
    Artifact, Command, Generation, Job, JobFailed, JobType, PayloadError, default_job, hookimpl,
)

@frozen(kw_only=True)
class Config:
    size: int = 32

@hookimpl
def register_job_types():
    yield JobType(
        name="broken", queue="broken_queue", content_type="image", preset=Config(),
        sample={"prompt": "a toy", "config": {"size": 16, "image": "https://a.test/x.png"}},
    )

@hookimpl
def generate(job, context):
    from PIL import Image
    model = context.models.get("broken", lambda: Image.linear_gradient("L"))
    context.progress(0, 1)
    path = context.output_path("png")
    model.resize((job.config.size, 16)).save(path)
    return Generation(artifacts=(Artifact(path=path, media_type="image/png", seed=job.seed),), facts={"model": "toy"})
"""
BY_COMMAND = """
import sys
from ourvidz_core import Command, Generation, JobType, hookimpl

PROGRAM = "import sys; from PIL import Image; Image.linear_gradient('L').save(sys.argv[2])"

@hookimpl
def register_job_types():
    yield JobType(name="broken", queue="broken_queue", content_type="image", sample={"prompt": "a toy"})

@hookimpl
def build_command(job, context):
    output = context.output_path("png")
    return Command(argv=(sys.executable, "-c", PROGRAM, f"--prompt={job.prompt}", output), outputs=(output,))

@hookimpl
def generate(job, command, context):
    return Generation(artifacts=context.run(command))
"""
WITH_STYLE = (
    BY_COMMAND.replace("import sys", "import sys\nfrom attrs import frozen", 1)
    .replace("@hookimpl", "@frozen(kw_only=True)\nclass Config:\n    style: str | None = None\n\n@hookimpl", 1)
    .replace('content_type="image"', 'content_type="image", preset=Config()')
    .replace(", output), outputs", ', output, f"--style={job.config.style}"), outputs')
)
EXTENSION = """
from ourvidz_core import JobFailed, hookimpl

@hookimpl(wrapper=True)
def generate(job):
    return (yield)

@hookimpl
def handle_event(event):
    if isinstance(event, JobFailed):
        print(event.error_type)
"""


@frozen
class Broken:
    """A right plugin with one thing changed, and what its author is told of that."""

    source: str
    old: str
    new: str
    check: str
    problem: str
    cure: str
    #: Checks that fail because of the same thing.
    also: frozenset[str] = field(default=frozenset(), converter=frozenset)

    @property
    def changed(self) -> str:
        assert self.old in self.source
        return self.source.replace(self.old, self.new)


BROKEN = {
    "it imports a heavy library at the top": Broken(
        IN_ENGINE,
        "from attrs",
        "import jax\nfrom attrs",
        "light-import",
        "importing it imports jax (",
        "import jax inside the function that uses it",
    ),
    "it needs what is not installed": Broken(
        IN_ENGINE,
        "from attrs",
        "import no_such_module\nfrom attrs",
        "loads",
        "No module named 'no_such_module'",
        "dependencies",
    ),
    "a hook is misspelt": Broken(
        IN_ENGINE, "def generate", "def generates", "loads", "there is no hook 'generates'", "arguments of a hook"
    ),
    "a job type has an impossible name": Broken(
        IN_ENGINE, 'name="broken"', 'name="Broken Type"', "loads", "'Broken Type'", "correct what register_job_types"
    ),
    "its sample is wrong": Broken(
        IN_ENGINE,
        '"size": 16',
        '"size": "16"',
        "samples",
        "its sample is refused: $.config.size: expected an integer, got '16'",
        "correct JobType(sample=",
    ),
    "it takes any value": Broken(
        IN_ENGINE,
        "size: int = 32",
        "size: int = 32\n\n@hookimpl\ndef parse_job(job_type, payload):\n"
        "    job = default_job(job_type, evolve(payload, config={}))\n"
        "    return evolve(job, ignored_config={k: 1 for k in payload.config if k != 'size'})",
        "wrong-values",
        "config.size = {'wrong': ['value']} is taken",
        "default_config(job_type, payload.config)",
    ),
    "it drops what it does not know": Broken(
        IN_ENGINE,
        "size: int = 32",
        "size: int = 32\n\n@hookimpl\ndef parse_job(job_type, payload):\n"
        "    return evolve(default_job(job_type, payload), ignored_config={})",
        "unknown-keys",
        "config.conformance_unknown is neither obeyed nor reported",
        "job = default_job(job_type, payload)",
    ),
    "it refuses what it does not know": Broken(
        IN_ENGINE,
        "size: int = 32",
        "size: int = 32\n\n@hookimpl\ndef parse_job(job_type, payload):\n"
        "    if payload.extras:\n        raise PayloadError('what is that?')",
        "unknown-keys",
        "ends in PayloadError: what is that?",
        "leave alone what you do not know",
    ),
    "a shell reads its command": Broken(
        BY_COMMAND,
        'argv=(sys.executable, "-c", PROGRAM, f"--prompt={job.prompt}", output)',
        "argv=('sh', '-c', f'{sys.executable} -c \"{PROGRAM}\" \"{job.prompt}\" {output}')",
        "safe-argv",
        "the command is text for sh",
        "Command(argv=('program', f'--prompt={job.prompt}', ...))",
    ),
    "a prompt stands alone": Broken(
        BY_COMMAND,
        'f"--prompt={job.prompt}"',
        "job.prompt",
        "safe-argv",
        "prompt stands alone on the command line",
        "f'--prompt={job.prompt}'",
    ),
    "a prompt is split into words": Broken(
        BY_COMMAND,
        'f"--prompt={job.prompt}", output',
        '"--prompt", output, *job.prompt.split()',
        "safe-argv",
        "read as an option: '--conformance-probe;'",
        "f'--prompt={job.prompt}'",
    ),
    "a text of the config stands alone": Broken(
        WITH_STYLE,
        'f"--style={job.config.style}"',
        '"--style", job.config.style or "plain"',
        "safe-argv",
        "config.style stands alone on the command line",
        "f'--style={job.config.style}'",
    ),
    "a message chooses the program": Broken(
        BY_COMMAND,
        'argv=(sys.executable, "-c", PROGRAM, f"--prompt={job.prompt}", output)',
        "argv=(f'/opt/{job.negative_prompt or 1}/run', output)",
        "safe-argv",
        "negative_prompt chooses the program that is run",
        "never by a message",
        also={"run"},
    ),
    "its file is not what it says": Broken(
        IN_ENGINE,
        ".save(path)",
        ".save(path, 'JPEG')",
        "run",
        "output_0.png is a JPEG file, not PNG",
        "declare the file as what it is",
    ),
    "it answers no generation": Broken(
        IN_ENGINE,
        "return Generation(",
        "return dict(",
        "run",
        "HookFailed: acme-broken failed in generate: it answered {",
        "generate answers Generation(artifacts=(Artifact(",
    ),
    "it reports what core reports": Broken(
        IN_ENGINE, '"model": "toy"', '"seed": 1', "callback", "'seed', which is reported already", "rename the key"
    ),
    "it repeats the token of a reference": Broken(
        IN_ENGINE,
        '"model": "toy"',
        '"source": job.references.single.url',
        "callback",
        "an access token in production",
        "without_token(url)",
    ),
    "it hides that memory ran out": Broken(
        IN_ENGINE,
        'model = context.models.get("broken", lambda: Image.linear_gradient("L"))',
        'try:\n        model = context.models.get("broken", lambda: Image.linear_gradient("L"))\n'
        "    except RuntimeError:\n        raise ValueError('no picture today') from None",
        "out-of-memory",
        "the device was out of memory in context.models, and the callback says ValueError",
        "raise OutOfMemory(...) from error",
    ),
    "it never looks at its deadline": Broken(
        IN_ENGINE, "context.progress(0, 1)", "pass", "time-out", "it never looked", "call context.progress(step, total)"
    ),
    "it goes on after its deadline": Broken(
        IN_ENGINE,
        "context.progress(0, 1)",
        "try:\n        context.progress(0, 1)\n    except Exception:\n        pass",
        "time-out",
        "was told so with JobTimeout, and the job completed",
        "let JobTimeout and JobCancelled pass",
        also={"out-of-memory"},
    ),
    "it hides that its command failed": Broken(
        BY_COMMAND,
        "    return Generation(artifacts=context.run(command))",
        "    try:\n        return Generation(artifacts=context.run(command))\n"
        "    except Exception as error:\n        raise RuntimeError('it did not work') from error",
        "exit-status",
        "the command ended with exit status 3, and the callback says RuntimeError: acme-broken failed",
        "let CommandFailed pass",
        also={"out-of-memory", "time-out"},
    ),
    "an extension takes every event for a failure": Broken(
        EXTENSION,
        "if isinstance(event, JobFailed):",
        "if True:",
        "events",
        "handle_event raises on JobStarted: AttributeError",
        "isinstance(event, JobFailed)",
    ),
    "an extension hides the errors of others": Broken(
        EXTENSION,
        "return (yield)",
        "try:\n        return (yield)\n    except Exception as error:\n        raise RuntimeError('oh') from error",
        "exit-status",
        "the callback says RuntimeError: ourvidz-stand-in failed in generate: RuntimeError: oh",
        "let CommandFailed pass",
        also={"out-of-memory", "time-out"},
    ),
}


@pytest.fixture
def check(site: Path, install: Callable[..., None], tmp_path: Path) -> Callable[..., dict[str, CheckResult]]:
    """Installs a plugin of that source and answers the results of the checks, by name."""
    (site / "jax.py").write_text("")

    def check_one(
        source: str, *, skip: tuple[str, ...] = (), patience_seconds: float = 10.0, **others: str
    ) -> dict[str, CheckResult]:
        for name, text in {"acme-broken": source, **others}.items():
            install(name, text)
        found = {plugin.distribution: plugin for plugin in installed_plugins()}
        subject = Subject(
            found["acme-broken"],
            root=tmp_path / "checks",
            others=[found[name] for name in others],
            patience_seconds=patience_seconds,
        )
        return {name: run_one(subject, name) for name in CHECKS if name not in skip}

    return check_one


def failed(results: dict[str, CheckResult]) -> dict[str, str]:
    return {
        name: "\n".join(map(str, result.flaws))
        for name, result in results.items()
        if result.status is CheckStatus.FAILED
    }


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_wrong_is_found_with_what_to_change(name: str, check: Callable[..., dict[str, CheckResult]]) -> None:
    broken = BROKEN[name]
    # These two take a process and a look at all that is installed, so they run where they have something to find.
    skip = {"light-import", "names"} - {broken.check}
    said = failed(check(broken.changed, skip=tuple(skip)))
    assert set(said) == {broken.check, *broken.also}
    problem, _, cure = said[broken.check].partition("\n  -> ")
    assert broken.problem in problem
    assert broken.cure in cure


@pytest.mark.parametrize("source", [IN_ENGINE, WITH_STYLE, EXTENSION], ids=["in the engine", "by command", "extension"])
def test_what_is_right_passes(source: str, check: Callable[..., dict[str, CheckResult]]) -> None:
    results = check(source)
    assert failed(results) == {}
    assert {name for name, result in results.items() if result.status is CheckStatus.PASSED} >= {
        *("loads", "light-import", "names", "samples", "unknown-keys", "run", "callback", "out-of-memory", "time-out")
    }


def test_a_job_type_of_another_plugin_is_named_with_its_owner(check: Callable[..., dict[str, CheckResult]]) -> None:
    others = {"acme-other": IN_ENGINE, "acme-stranger": IN_ENGINE.replace('"broken"', '"strange"')}
    said = failed(check(IN_ENGINE, skip=("light-import",), **others))
    assert set(said) == {"names"}
    assert "acme-other 1.0 registers 'broken' too" in said["names"]
    assert "acme-stranger" not in said["names"]


def test_messages_of_types_that_nobody_owns_are_known(install: Callable[..., None], tmp_path: Path) -> None:
    install("acme-right", IN_ENGINE)
    plugin = next(plugin for plugin in installed_plugins() if plugin.distribution == "acme-right")
    messages = [{"type": "broken"}, {"type": "brocken"}, {"prompt": "of no type"}]
    assert Subject(plugin, root=tmp_path, messages=messages).foreign_types == [None, "brocken"]


def test_each_message_of_a_type_is_generated(install: Callable[..., None], tmp_path: Path) -> None:
    install("acme-right", IN_ENGINE)
    plugin = next(plugin for plugin in installed_plugins() if plugin.distribution == "acme-right")
    messages = [{"type": "broken", "config": {"size": size}} for size in (16, -1, 0)]
    flaws = run_one(Subject(plugin, root=tmp_path, messages=messages), "run").flaws
    assert len(flaws) == 2
    assert "ValueError" in flaws[0].problem


def test_a_second_entry_point_is_told_of(site: Path, check: Callable[..., dict[str, CheckResult]]) -> None:
    check(IN_ENGINE, skip=tuple(CHECKS))
    entry_points = site / "acme_broken-1.0.dist-info" / "entry_points.txt"
    entry_points.write_text("[ourvidz]\nfirst = acme_broken\nsecond = acme_broken\n")
    plugin = next(plugin for plugin in installed_plugins() if plugin.distribution == "acme-broken")
    result = run_one(Subject(plugin, root=site / "scratch"), "names")
    assert "2 entry points in the group ourvidz (first, second); only the first is loaded" in str(result.flaws[0])


def test_a_generation_that_hangs_is_given_up_on(check: Callable[..., dict[str, CheckResult]]) -> None:
    source = IN_ENGINE.replace("context.progress(0, 1)", "__import__('threading').Event().wait(30)")
    said = failed(check(source, skip=tuple(set(CHECKS) - {"time-out"}), patience_seconds=0.3))
    assert "the deadline passed, and generate did not end: it never looked" in said["time-out"]


def test_the_model_that_is_not_here_is_why_nothing_was_generated(check: Callable[..., dict[str, CheckResult]]) -> None:
    source = IN_ENGINE.replace("JobFailed, JobType", "ModelUnavailable, JobType").replace(
        "from PIL import Image", "raise ModelUnavailable('set OURVIDZ_ACME_MODEL')", 1
    )
    results = check(source, skip=("light-import",))
    assert failed(results) == {}
    for name in ("run", "callback", "out-of-memory", "time-out", "exit-status"):
        assert results[name].status is CheckStatus.SKIPPED
        assert "set OURVIDZ_ACME_MODEL" in results[name].reason


def test_the_suite_fails_with_what_to_change_and_skips_with_the_reason(
    install: Callable[..., None], tmp_path: Path
) -> None:
    install("acme-broken", IN_ENGINE.replace('"size": 16', '"size": "16"'))
    plugin = next(plugin for plugin in installed_plugins() if plugin.distribution == "acme-broken")
    subject = Subject(plugin, root=tmp_path)
    suite = ConformanceSuite()
    suite.test_it_loads(subject)
    with pytest.raises(pytest.fail.Exception, match=r"broken: its sample is refused.*\n  -> correct JobType"):
        suite.test_its_samples_are_taken(subject)
    with pytest.raises(pytest.skip.Exception, match="a sample is refused"):
        suite.test_user_text_stays_one_argument(subject)


def test_the_suite_has_a_test_for_each_check() -> None:
    source = inspect.getsource(ConformanceSuite)
    assert re.findall(r'_demand\(subject, "([a-z-]+)"\)', source) == list(CHECKS)


def test_the_command_checks_each_plugin_in_a_process_that_may_die_and_has_no_secret(
    install: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    end = "import os; os._exit(8 if 'REDIS_URL' in os.environ else 7)"
    install("acme-broken", IN_ENGINE.replace("context.progress(0, 1)", end))
    monkeypatch.setenv("OURVIDZ_ALLOW_PLUGINS", "acme-broken")
    monkeypatch.setenv("REDIS_URL", "rediss://default:secret-of-the-worker@redis.test:6379")
    assert main(["plugins", "check", "--json"]) == 1
    results = json.loads(capsys.readouterr().out)
    statuses = {(result["distribution"], result["check"]): result["status"] for result in results}
    assert statuses["acme-broken", "safe-argv"] == "skipped"
    assert statuses["acme-broken", "survives"] == "failed"
    assert ("acme-broken", "run") not in statuses
    assert "exit status 7" in next(result for result in results if result["check"] == "survives")["flaws"][0]["problem"]


@pytest.mark.parametrize(
    ("name", "says"),
    [("nobody", "nobody is not installed as a plugin"), ("acme-right", "OURVIDZ_BLOCK_PLUGINS names it")],
)
def test_the_command_says_why_it_does_not_check(
    name: str,
    says: str,
    install: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    install("acme-right", "raise SystemExit('imported all the same')")
    monkeypatch.setenv("OURVIDZ_BLOCK_PLUGINS", "acme-right")
    assert main(["plugins", "check", name]) == 2
    assert says in capsys.readouterr().err


def test_the_process_of_the_command_hears_what_is_only_logged(install: Callable[..., None], tmp_path: Path) -> None:
    install("acme-broken", EXTENSION.replace("if isinstance(event, JobFailed):", "if True:"))
    results = tmp_path / "results.jsonl"
    request = {"distribution": "acme-broken", "messages": [], "is_light": False}
    check_one({**request, "results": str(results), "scratch": str(tmp_path)})
    found = [json.loads(line) for line in results.read_text("utf-8").splitlines()]
    assert [result["check"] for result in found] == list(CHECKS)
    assert [result["check"] for result in found if result["status"] == "failed"] == ["events"]


def test_the_command_prints_what_is_wrong_below_its_table(
    install: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    install("acme-right", IN_ENGINE)
    monkeypatch.setenv("OURVIDZ_ALLOW_PLUGINS", "acme-right")
    (tmp_path / "messages").mkdir()
    message = tmp_path / "messages" / "wrong.json"
    message.write_text('{"type": "broken", "config": {"size": true}}')
    arguments = ["plugins", "check", "Acme.Right", "--no-run", "--messages", str(message.parent)]
    assert main(arguments) == 1
    out = capsys.readouterr().out
    assert ["acme-right", "loads", "passed"] in [line.split() for line in out.splitlines()]
    assert "\nacme-right, samples: broken: its sample is refused: $.config.size: expected an integer, got True\n" in out
    assert "\n  -> correct JobType(sample=" in out
    assert "exit-status" not in out
    message.write_text("[]")
    assert main(arguments) == 2
    assert "wrong.json is not a message" in capsys.readouterr().err


def test_the_pytest_plugin_is_light_until_a_test_asks_for_a_host() -> None:
    program = "import pytest_ourvidz, sys; sys.exit('ourvidz_core' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_the_page_about_tests_lists_the_checks_in_their_words() -> None:
    page = (Path(__file__).parent.parent / "docs/how-to/test-a-plugin.md").read_text("utf-8")
    listed = dict(re.findall(r"^\| `([a-z-]+)` \| (.+) \|$", page, re.MULTILINE))
    assert listed == {name: (check.__doc__ or "").replace("``", "`") for name, check in CHECKS.items()}
