"""The command line as a person and a script meet it, in processes of its own."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from ourvidz_core.cli.main import EXIT_INTERRUPTED
from ourvidz_core.testing.distributions import make_distribution
from tests import toy

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def site(tmp_path: Path) -> Path:
    make_distribution(tmp_path / "site", "ourvidz-toy", toy.SOURCE)
    return tmp_path / "site"


@pytest.fixture
def environment(tmp_path: Path, site: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OURVIDZ_", "SUPABASE_"))}
    return {
        **kept,
        "PYTHONPATH": str(site),
        "OURVIDZ_ALLOW_PLUGINS": "ourvidz-toy",
        "OURVIDZ_STATE_DIR": str(tmp_path / "state"),
        "OURVIDZ_WORK_DIR": str(tmp_path / "work"),
        "OURVIDZ_CALLBACK_MIN_AGE_SECONDS": "0",
        "OURVIDZ_RETRY_DELAY_SECONDS": "0.01",
    }


@pytest.fixture
def ourvidz(tmp_path: Path, environment: dict[str, str]) -> Run:
    def run(*arguments: str, stdin: str = "", **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "ourvidz_core", *arguments],
            env={**environment, **more},
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
            timeout=60,
        )

    return run


@pytest.fixture
def temporary(environment: dict[str, str]) -> Iterator[Path]:
    """The directory for temporary files, with a name so short that a socket may have one below it."""
    with tempfile.TemporaryDirectory() as directory:
        environment["TMPDIR"] = directory
        yield Path(directory)


@pytest.fixture
def message(tmp_path: Path) -> Callable[..., str]:
    def write(job_id: str = "job-1", **more: object) -> str:
        body = {"id": job_id, "type": "toy_image", "prompt": "a toy", "user_id": "u1", **more}
        path = tmp_path / f"{job_id}.json"
        path.write_text(json.dumps(body), "utf-8")
        return str(path)

    return write


def test_run_ends_with_the_callback_and_the_paths_of_the_assets(
    ourvidz: Run, message: Callable[..., str], tmp_path: Path
) -> None:
    done = ourvidz("run", message())
    assert done.returncode == 0, done.stderr
    body, _, assets = done.stdout.partition("\n}\n")
    assert json.loads(body + "}")["status"] == "completed"
    assert assets.startswith("toy_image/u1/job-1_0.png  ")
    assert (tmp_path / "state/assets/toy_image/u1/job-1_0.png").read_bytes().startswith(b"\x89PNG")
    (line,) = (tmp_path / "state/callbacks/job-1.jsonl").read_text("utf-8").splitlines()
    assert json.loads(line) == json.loads(body + "}")


def test_run_of_a_job_that_fails_ends_with_1_and_says_why_on_stderr(ourvidz: Run, message: Callable[..., str]) -> None:
    done = ourvidz("run", message(config={"what": "raise"}))
    assert done.returncode == 1
    assert json.loads(done.stdout)["status"] == "failed"
    assert "the toy broke" in done.stderr
    assert "Traceback" not in done.stderr


def test_run_prints_one_json_object_for_a_script(ourvidz: Run, message: Callable[..., str]) -> None:
    done = ourvidz("run", "--json", message())
    answer = json.loads(done.stdout)
    assert answer["callback"]["assets"] == ["u1/job-1_0.png"]
    assert answer["assets"][0]["bucket"] == "toy_image"
    assert answer["error"] is None


def test_a_plan_runs_nothing(ourvidz: Run, message: Callable[..., str], tmp_path: Path) -> None:
    done = ourvidz("run", "--plan", message(config={"what": "os_exit", "colour": "red"}))
    plan = json.loads(done.stdout)
    assert done.returncode == 0
    assert plan["job"]["config"]["what"] == "os_exit"
    assert plan["job"]["ignored_config"] == {"colour": "red"}
    assert plan["command"] is None
    assert plan["assets"] == ["toy_image/u1/job-1_0.png"]
    assert not (tmp_path / "state").exists()


def test_a_wrong_message_is_one_paragraph_with_every_fault(ourvidz: Run, message: Callable[..., str]) -> None:
    done = ourvidz("run", "--plan", message(prompt=3, metadata=[]))
    assert done.returncode == 1
    assert done.stderr == ("PayloadError: $.prompt: expected a string, got 3; $.metadata: expected an object, got []\n")


def test_enqueue_pushes_the_bytes_of_the_file_and_a_worker_drains_them(
    ourvidz: Run, message: Callable[..., str], tmp_path: Path
) -> None:
    pushed = ourvidz("enqueue", message("a"), message("b"))
    assert pushed.returncode == 0, pushed.stderr
    assert [line.rpartition(" -> ")[2] for line in pushed.stdout.splitlines()] == ["toy_queue", "toy_queue"]
    drained = ourvidz("worker", "--drain")
    assert drained.returncode == 0, drained.stderr
    for job_id in ("a", "b"):
        lines = (tmp_path / f"state/callbacks/{job_id}.jsonl").read_text("utf-8").splitlines()
        assert [json.loads(line)["status"] for line in lines] == ["processing", "completed"]


def test_enqueue_pushes_nothing_when_one_file_is_no_job(ourvidz: Run, message: Callable[..., str]) -> None:
    done = ourvidz("enqueue", message("good"), message("bad", type="nope"))
    assert done.returncode == 2
    assert "bad.json" in done.stderr
    assert "toy_brief, toy_image" in done.stderr
    drained = ourvidz("worker", "--drain")
    assert "completed" not in drained.stderr


def test_enqueue_with_a_named_queue_pushes_what_nobody_here_can_make(ourvidz: Run, message: Callable[..., str]) -> None:
    done = ourvidz("enqueue", "--queue", "toy_queue", message("odd", type="nope"))
    assert done.returncode == 0
    assert "UnknownJobType" in ourvidz("worker", "--drain").stderr


def test_a_message_comes_from_standard_input_too(ourvidz: Run, message: Callable[..., str]) -> None:
    text = Path(message()).read_text("utf-8")
    assert json.loads(ourvidz("run", "--json", "-", stdin=text).stdout)["callback"]["status"] == "completed"


def test_job_types_as_table_json_and_markdown(ourvidz: Run) -> None:
    assert ourvidz("job-types").stdout.splitlines()[1].split()[:3] == ["toy_brief", "toy_queue", "image"]
    listed = json.loads(ourvidz("job-types", "--json").stdout)
    assert [(entry["name"], entry["plugin"]) for entry in listed] == [
        ("toy_brief", "ourvidz-toy"),
        ("toy_image", "ourvidz-toy"),
    ]
    assert ourvidz("job-types", "--markdown").stdout.startswith("| JOB TYPE | QUEUE |")


def test_a_plugin_that_cannot_be_imported_is_listed_with_its_reason(ourvidz: Run, site: Path) -> None:
    make_distribution(site, "acme-broken", "import no_such_module\n", version="0.3")
    done = ourvidz("plugins", "list", "--json", OURVIDZ_ALLOW_PLUGINS="ourvidz-toy,acme-broken")
    records = {record["distribution"]: record for record in json.loads(done.stdout)}
    assert records["ourvidz-toy"]["status"] == "loaded"
    assert records["acme-broken"]["status"] == "failed"
    assert records["acme-broken"]["reason"].startswith("(import) ModuleNotFoundError")


@pytest.mark.parametrize("command", [("job-types",), ("plugins", "list"), ("worker",)], ids=" ".join)
def test_two_owners_of_one_type_stop_every_command_with_both_names_and_the_cure(
    ourvidz: Run, site: Path, command: tuple[str, ...]
) -> None:
    make_distribution(site, "acme-toy", toy.SOURCE, version="0.3")
    both = {"OURVIDZ_ALLOW_PLUGINS": "ourvidz-toy,acme-toy"}
    done = ourvidz(*command, **both)
    assert done.returncode == 2
    assert "acme-toy 0.3 and ourvidz-toy 1.0" in done.stderr
    assert "OURVIDZ_BLOCK_PLUGINS=ourvidz-toy" in done.stderr
    if command == ("job-types",):
        assert ourvidz(*command, **both, OURVIDZ_BLOCK_PLUGINS="ourvidz-toy").returncode == 0


@pytest.mark.parametrize(
    ("arguments", "environ", "code", "says"),
    [
        (("worker", "--queues", "nope"), {}, 2, "the queues are toy_queue"),
        (("worker",), {"REDIS_URL": "redis://127.0.0.1:1"}, 3, "Redis does not answer"),
        (("worker",), {"OURVIDZ_LEASE_SECONDS": "soon"}, 2, "OURVIDZ_LEASE_SECONDS"),
        (("worker",), {"OURVIDZ_REQUIRE_PLUGINS": "ourvidz-gone"}, 2, "pip install ourvidz-gone"),
        (("worker",), {"OURVIDZ_ALLOW_PLUGINS": "none"}, 2, "ourvidz plugins list says why"),
        (("worker", "--require", "ourvidz-toy"), {"OURVIDZ_BLOCK_PLUGINS": "ourvidz-toy"}, 2, "required and blocked"),
        (("run", "no-such-file.json"), {}, 2, "does not exist"),
        (("frobnicate",), {}, 2, "No such command"),
    ],
    ids=[
        "unknown queue",
        "no redis",
        "wrong setting",
        "missing plugin",
        "no plugin",
        "blocked by option",
        "no file",
        "no command",
    ],
)
def test_wrong_use_is_a_short_error_with_a_documented_exit_code(
    ourvidz: Run, arguments: tuple[str, ...], environ: dict[str, str], code: int, says: str
) -> None:
    done = ourvidz(*arguments, **environ)
    assert done.returncode == code
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_a_plugin_adds_a_command_of_its_own(ourvidz: Run, site: Path) -> None:
    source = """
        import click

        @click.command()
        def acme_shout():
            click.echo("ACME")
    """
    make_distribution(site, "acme-commands", source, group="ourvidz.commands")
    (site / "acme_commands-1.0.dist-info/entry_points.txt").write_text(
        "[ourvidz.commands]\nshout = acme_commands:acme_shout\n", "utf-8"
    )
    allowed = {"OURVIDZ_ALLOW_PLUGINS": "acme-commands"}
    assert "shout" in ourvidz("--help", **allowed).stdout
    assert ourvidz("shout", **allowed).stdout == "ACME\n"
    blocked = ourvidz("shout", OURVIDZ_BLOCK_PLUGINS="Acme_Commands")
    assert (blocked.returncode, blocked.stdout) == (2, "")
    assert "OURVIDZ_BLOCK_PLUGINS names it" in blocked.stderr


def test_a_plugin_command_that_does_not_import_does_not_break_the_others(ourvidz: Run, site: Path) -> None:
    make_distribution(site, "acme-commands", "import no_such_module\n", group="ourvidz.commands")
    assert ourvidz("--help").returncode == 0
    broken = ourvidz("acme_commands", OURVIDZ_ALLOW_PLUGINS="acme-commands")
    assert broken.returncode == 2
    assert "acme_commands" in broken.stderr
    assert "Traceback" not in broken.stderr


def test_the_demo_ends_with_a_table_a_contact_sheet_and_a_page(ourvidz: Run, tmp_path: Path, temporary: Path) -> None:
    from PIL import Image

    done = ourvidz("demo", "--out", "out", "--workers", "2")
    assert done.returncode == 0, done.stderr
    assert "toy_image" in done.stdout
    with Image.open(tmp_path / "out/contact-sheet.png") as sheet:
        assert len(set(sheet.convert("RGB").tobytes())) > 50
    linked = re.findall(r'(?:src|href)="([^"]+)"', (tmp_path / "out/index.html").read_text("utf-8"))
    assert {Path(path).parts[:2] for path in linked} == {
        ("assets", "toy_brief"),
        ("assets", "toy_image"),
        *(("callbacks", record.name) for record in (tmp_path / "out/callbacks").iterdir()),
    }
    assert all((tmp_path / "out" / path).is_file() for path in linked)
    assert list(temporary.iterdir()) == []


def test_an_interrupted_demo_leaves_no_process_and_no_job_for_the_next(
    environment: dict[str, str], message: Callable[..., str], tmp_path: Path, temporary: Path
) -> None:
    (tmp_path / "messages").mkdir()
    Path(message(config={"what": "hang"})).rename(tmp_path / "messages/hang.json")
    log = tmp_path / "out/worker.log"
    # Where the suite runs in the background of a script, an interrupt is ignored, and children would inherit that.
    heed = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    run = "from ourvidz_core.cli.main import entry_point; entry_point()"
    command = [sys.executable, "-c", f"{heed}; {run}", "demo", "--messages", "messages", "--out", "out"]
    with subprocess.Popen(command, env=environment, cwd=tmp_path, process_group=0) as demo:
        while not log.exists() or "is ready" not in log.read_text("utf-8"):
            assert demo.poll() is None
            time.sleep(0.02)
        started = psutil.Process(demo.pid).children(recursive=True)
        os.killpg(demo.pid, signal.SIGINT)
        assert demo.wait(20) == EXIT_INTERRUPTED
    assert len(started) == 2  # a worker and its engine
    assert psutil.wait_procs(started, timeout=0)[1] == []
    assert list(temporary.iterdir()) == []
