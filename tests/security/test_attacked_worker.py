"""One worker under attack: hostile messages, references, plugins and endpoints, each secret a canary.

Everything that it leaves or shows is searched afterwards; nothing may be in it that is not everybody's.
"""

from __future__ import annotations

import io
import json
import pickle
import re
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

import attrs
import pytest
import redis
from PIL import Image
from typed_settings.types import SecretStr

from ourvidz_core.delivery.embedded import EmbeddedRedis
from ourvidz_core.delivery.queue import DeadLetter, QueuedCallback
from ourvidz_core.settings import WELL_KNOWN_NAMES, Settings, variable_of
from ourvidz_core.testing.distributions import make_distribution
from ourvidz_core.testing.servers import Answer, Bucket, FileServer, LocalServer, ReceivedRequest, SupabaseServer
from tests.deployment import USER, Fleet

QUEUE = "spy_queue"
#: Each secret that a worker can be told, by its setting. A new one is in this test without anybody's doing.
CANARIES = {
    field.name: f"canary-{field.name.replace('_', '-')}-4f1c"
    for field in attrs.fields(Settings)
    if field.type in ("SecretStr", SecretStr)
}
URL_TOKEN = "canary-signed-url-4f1c"
PROMPT = "canary prompt of a private person"

#: A plugin that looks around in its engine and says all it sees, in every way a plugin has.
SPY = """
import json, os, sys
from pathlib import Path
from attrs import frozen
from ourvidz_core import Artifact, Generation, JobType, hookimpl

@frozen(kw_only=True)
class Config:
    what: str = "draw"

@hookimpl
def register_job_types():
    yield JobType(name="spy", queue="spy_queue", content_type="image", preset=Config(), timeout_seconds=20)

def seen():
    lines = {}
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        try: lines[place.parent.name] = place.read_bytes().decode("utf-8", "replace")
        except OSError: pass
    parent = Path(f"/proc/{os.getppid()}/environ")
    try: of_parent = parent.read_bytes().decode("utf-8", "replace")
    except OSError: of_parent = "refused"
    return {"environ": dict(os.environ), "command_lines": lines, "of_parent": of_parent}

@hookimpl
def generate(job, context):
    what = job.config.what
    if what == "look":
        Path(os.environ["SPY_REPORT"]).write_text(json.dumps(seen()))
    print("a plugin prints", dict(os.environ), job.prompt, job.references)
    if what == "raise": raise RuntimeError(f"broken with {dict(os.environ)}")
    if what == "segfault": os.kill(os.getpid(), 11)
    from PIL import Image
    path = context.output_path("png") if what != "climb" else context.work_dir / ".." / "outside.png"
    Image.linear_gradient("L").save(path)
    return Generation(artifacts=(Artifact(path=path, media_type="image/png", seed=job.seed),), facts={"spied": what})
"""
#: In every Python process of the deployment: where its sockets were bound and connected to.
SOCKET_LOG = """
import sys
def note(event, arguments, path={path!r}):
    if event in ("socket.bind", "socket.connect"):
        with open(path, "a") as file: file.write(f"{{event}} {{arguments[1]!r}}\\n")
sys.addaudithook(note)
"""
HOSTILE_REFERENCES = {
    "metadata": "http://169.254.169.254/latest/meta-data/",
    "decimal": "http://2852039166/latest/meta-data/",
    "octal": "http://0251.0376.0251.0376/",
    "hex": "http://0xa9fea9fe/",
    "mapped": "http://[::ffff:169.254.169.254]/",
    "nat64": "http://[64:ff9b::a9fe:a9fe]/",
    "loopback": "http://localhost:6379/",
    "full-stop": "http://127\u3002000\u3002000\u3002001/",
    "userinfo": "http://8.8.8.8@127.0.0.1/",
    "file": "file:///etc/passwd",
    "gopher": "gopher://127.0.0.1:6379/_FLUSHALL",
    "redirect": "{files}/to-metadata",
}
#: Messages that are no jobs, or not such as could be done.
MALFORMED = {
    "pickle": pickle.dumps({"id": "p", "type": "spy"}),
    "deep": b'{"id": "deep", "config": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
    "deep objects": b'{"a":' * 900 + b"1" + b"}" * 900,
    "huge number": b'{"id": "n", "type": "spy", "seed": ' + b"9" * 100_000 + b"}",
    "exponent": b'{"id": "e", "type": "spy", "config": {"seed": 1e99999}}',
    "NaN": b'{"id": "nan", "type": "spy", "config": {"seed": NaN}}',
    "half a surrogate": b'{"id": "s", "type": "spy", "prompt": "\\ud800", "user_id": "u"}',
    "NUL in the id": b'{"id": "a\\u0000b", "type": "spy", "prompt": "", "user_id": "u"}',
    "raw NUL": b'{"id": "a\x00b"}',
    "ten megabytes": b'{"id": "big", "type": "spy", "prompt": "' + b"x" * 10_000_000 + b'"}',
    "a path for an id": b'{"id": "../../etc/passwd", "type": "spy", "prompt": "", "user_id": "u"}',
    "an escaped path": b'{"id": "..%2f..%2fx", "type": "spy", "prompt": "", "user_id": "u"}',
    "a path for a user": b'{"id": "up", "type": "spy", "prompt": "", "user_id": "../../u"}',
    "a fullwidth slash": '{"id": "a\uff0fb", "type": "spy", "prompt": "", "user_id": "u"}'.encode(),
    "an id of 10 kB": b'{"id": "' + b"i" * 10_000 + b'", "type": "spy", "prompt": "", "user_id": "u"}',
    "not even text": bytes(range(256)),
}
GOOD = ("draws", "look", "with-reference", "with-bucket", "named-twice")


class EchoingEndpoint(LocalServer):
    """Takes callbacks for what they are, and refuses some by saying back everything that it was sent."""

    def answer(self, request: ReceivedRequest) -> Answer:
        if request.method == "POST" and b'"refused"' in request.body:
            return Answer(status=400, body=b"job_id is required, and not " + repr(request).encode())
        return Answer(status=200)


@attrs.frozen
class Aftermath:
    """What the attack left."""

    #: By where it was found.
    texts: Mapping[str, str]
    callbacks: Mapping[str, dict]
    dead: Mapping[bytes, DeadLetter]
    undelivered: list[QueuedCallback]
    stored: list[tuple[str, str]]
    spied: Mapping[str, object]
    sockets: list[str]
    metrics: str
    #: Ports of the services that the settings name.
    told_of: set[int]
    health_port: int


def picture() -> bytes:
    file = io.BytesIO()
    Image.linear_gradient("L").save(file, "PNG")
    return file.getvalue()


def everything_in(client: redis.Redis) -> str:
    """All keys and values of a Redis, as text."""
    read = {
        b"string": client.get,
        b"hash": client.hgetall,
        b"list": lambda key: client.lrange(key, 0, -1),
        b"set": client.smembers,
        b"zset": lambda key: client.zrange(key, 0, -1, withscores=True),
        b"stream": client.xrange,
    }
    return "\n".join(f"{key!r} {read[client.type(key)](key)!r}" for key in client.scan_iter())


def files_below(*directories: Path) -> str:
    return "\n".join(
        f"{path} {path.read_bytes()!r}" for directory in directories for path in directory.rglob("*") if path.is_file()
    )


def secret_environ(address: str) -> dict[str, str]:
    """Every secret under its own variable; the password of Redis is in its address."""
    password = CANARIES["redis_url"]
    values = {**CANARIES, "redis_url": address.replace("unix://", f"unix://:{password}@")}
    named = {variable_of(name): value for name, value in values.items()}
    return {**named, **{known: values[name] for name, known in WELL_KNOWN_NAMES.items() if name in values}}


def push_all(fleet: Fleet, files: str) -> int:
    """The whole attack; answers how many of its jobs can be reported."""
    for raw in MALFORMED.values():
        fleet.client.lpush(QUEUE, raw)
    jobs: list[dict[str, object]] = [
        {"id": f"ref-{name}", "config": {"image": f"{url.format(files=files)}?token={URL_TOKEN}"}}
        for name, url in HOSTILE_REFERENCES.items()
    ]
    jobs += [{"id": what, "config": {"what": what}} for what in ("look", "raise", "segfault", "climb")]
    jobs += [
        {"id": "ref-gone", "config": {"image": f"{files}/gone.png?token={URL_TOKEN}"}},
        {"id": "with-reference", "config": {"image": f"{files}/picture.png?token={URL_TOKEN}"}},
        {"id": "with-bucket", "bucket": "../../elsewhere"},
        {"id": "refused"},
        {"id": "draws"},
    ]
    for job in jobs:
        fleet.push_message({"type": "spy", "prompt": PROMPT, **job})
    fleet.client.lpush(
        QUEUE,
        b'{"id": "twice", "type": "nope", "id": "named-twice", "type": "spy", "prompt": "%s", "user_id": "%s"}'
        % (PROMPT.encode(), USER.encode()),
    )
    return len(jobs) + 1


@pytest.fixture(scope="module")
def aftermath(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Aftermath]:
    """What is left when a worker has met all of it."""
    directory = tmp_path_factory.mktemp("attacked")
    site = directory / "site"
    make_distribution(site, "ourvidz-spy", SPY)
    (site / "sitecustomize.py").write_text(SOCKET_LOG.format(path=str(directory / "sockets")))
    server = EmbeddedRedis(directory / "redis")
    to_metadata = Answer.redirect("http://169.254.169.254/latest/meta-data/")
    with (
        SupabaseServer(key=CANARIES["supabase_service_key"], buckets={"spy": Bucket()}) as supabase,
        EchoingEndpoint() as endpoint,
        FileServer({"/picture.png": picture(), "/to-metadata": to_metadata}) as files,
        Fleet.on(server, directory, QUEUE, supabase) as fleet,
    ):
        fleet.client.config_set("requirepass", CANARIES["redis_url"])
        fleet.environ |= {
            **secret_environ(server.address),
            "PYTHONPATH": str(site),
            "SPY_REPORT": str(directory / "spied"),
            "OURVIDZ_ALLOW_PLUGINS": "ourvidz-spy",
            "OURVIDZ_CALLBACK_URL": f"{endpoint.url}/hook?token={URL_TOKEN}",
            "OURVIDZ_METRICS_URL": f"{endpoint.url}/usage",
            "OURVIDZ_REFERENCE_ALLOWED_HOSTS": files.host,
            "OURVIDZ_HEALTH_ADDRESS": "127.0.0.1:0",
            "OURVIDZ_LOG_LEVEL": "debug",
            "OURVIDZ_MAX_ATTEMPTS": "2",
        }
        # Storage that says back the key, once.
        supabase.fail_next("storage", status=500, body=f"bad key {CANARIES['supabase_service_key']}".encode())
        reportable = push_all(fleet, files.url)
        worker = fleet.start()

        def terminal() -> dict[str, dict]:
            bodies = [request.json() for request in endpoint.requests if request.path == "/hook"]
            return {body["job_id"]: body for body in bodies if body["status"] != "processing"}

        fleet.wait_for(lambda: len(terminal()) >= reportable + 1 and fleet.queue.depth(QUEUE).callbacks == 0, 60.0)
        address = re.search(r"http://127\.0\.0\.1:(\d+)", fleet.log.read_text())
        assert address, fleet.log.read_text()
        with urllib.request.urlopen(f"{address[0]}/metrics", timeout=10) as answer:
            metrics = answer.read().decode()
        in_redis = everything_in(fleet.client)
        dead = {letter.raw: letter for letter in fleet.queue.dead_letters(QUEUE)}
        undelivered = list(fleet.queue.undelivered(QUEUE))
        worker.terminate()
        assert worker.wait(timeout=20) == 0
        spied = json.loads((directory / "spied").read_text())
        texts = {
            "the log": fleet.log.read_text(),
            "Redis": in_redis,
            "callbacks": repr([request.body for request in endpoint.requests if request.path == "/hook"]),
            "records of usage": repr([request.body for request in endpoint.requests if request.path == "/usage"]),
            "stored objects": repr(list(supabase.objects.items())),
            "requests to a reference's host": repr([request.headers for request in files.requests]),
            "files on the disk": files_below(directory / "state", directory / "work"),
            "the reasons of dead letters": repr([letter.reason for letter in dead.values()]),
            "the reasons of undelivered callbacks": repr([kept.reason for kept in undelivered]),
            "metrics": metrics,
            "the engine's environment": json.dumps(spied["environ"]),
            "command lines": json.dumps(spied["command_lines"]),
        }
        yield Aftermath(
            texts=texts,
            callbacks=terminal(),
            dead=dead,
            undelivered=undelivered,
            stored=sorted(supabase.objects),
            spied=spied,
            sockets=(directory / "sockets").read_text().splitlines(),
            metrics=metrics,
            told_of={supabase.port, endpoint.port, files.port},
            health_port=int(address[1]),
        )
        fleet.client.config_set("requirepass", "")
    server.close()


# -- secrets

#: Something that must be in each place, so that the search is known to look at the right one.
FOUND_IN = {
    "the log": "segfault",
    "Redis": "refused",
    "callbacks": "draws",
    "records of usage": "draws",
    "stored objects": "draws_0.png",
    "requests to a reference's host": "user-agent",
    "files on the disk": "spool",
    "the reasons of dead letters": "nested too deeply",
    "the reasons of undelivered callbacks": "job_id is required",
    "metrics": "ourvidz_jobs_total",
    "the engine's environment": "SPY_REPORT",
    "command lines": "ourvidz_core.engine.server",
}


@pytest.mark.parametrize("place", FOUND_IN)
def test_no_secret_is_in(aftermath: Aftermath, place: str) -> None:
    text = aftermath.texts[place]
    assert FOUND_IN[place] in text
    assert [name for name, canary in CANARIES.items() if canary in text] == []


@pytest.mark.parametrize(
    "place", [place for place in FOUND_IN if place not in ("Redis", "requests to a reference's host")]
)
def test_the_token_of_a_signed_address_is_not_in(aftermath: Aftermath, place: str) -> None:
    # Redis keeps the producer's own message as it came, or it could not be tried again.
    assert URL_TOKEN not in aftermath.texts[place]


@pytest.mark.parametrize("place", ["the log", "records of usage", "metrics", "the reasons of dead letters"])
def test_a_prompt_is_not_in(aftermath: Aftermath, place: str) -> None:
    assert PROMPT not in aftermath.texts[place]


# -- what became of it


def test_every_malformed_message_is_kept_as_it_came_with_a_short_reason(aftermath: Aftermath) -> None:
    assert set(MALFORMED.values()) <= aftermath.dead.keys()
    assert max(len(letter.reason) for letter in aftermath.dead.values()) < 2000


def test_jobs_between_the_attacks_complete(aftermath: Aftermath) -> None:
    assert {name: aftermath.callbacks[name]["status"] for name in GOOD} == dict.fromkeys(GOOD, "completed")


@pytest.mark.parametrize("name", HOSTILE_REFERENCES)
def test_a_hostile_reference_fails_its_job(aftermath: Aftermath, name: str) -> None:
    body = aftermath.callbacks[f"ref-{name}"]
    assert (body["status"], body["metadata"]["error_type"]) == ("failed", "ReferenceRefused")


def test_nothing_is_written_or_stored_outside_its_place(aftermath: Aftermath) -> None:
    body = aftermath.callbacks["climb"]
    assert (body["status"], body["metadata"]["error_type"]) == ("failed", "ArtifactError")
    assert aftermath.stored == sorted(("spy", f"{USER}/{name}_0.png") for name in (*GOOD, "refused"))


# -- the network


def test_the_worker_connects_to_nobody_but_those_it_is_told_of(aftermath: Aftermath) -> None:
    connected = {line.partition(" ")[2] for line in aftermath.sockets if line.startswith("socket.connect ")}
    told = {f"('127.0.0.1', {port})" for port in aftermath.told_of}
    itself = {f"('127.0.0.1', {aftermath.health_port})"}
    assert told <= connected
    assert [address for address in connected - told - itself if not address.endswith(".sock'")] == []


def test_no_port_is_open_but_the_health_page_of_this_machine(aftermath: Aftermath) -> None:
    bound = [line.partition(" ")[2] for line in aftermath.sockets if line.startswith("socket.bind ")]
    # The HTTP client asks by the second whether this machine has IPv6, and listens to nobody.
    assert {"('127.0.0.1', 0)"} <= set(bound) <= {"('127.0.0.1', 0)", "('::1', 0)"}


# -- metrics


def test_a_label_is_one_of_few_values_whatever_messages_say(aftermath: Aftermath) -> None:
    series = re.findall(r"^ourvidz_\w+\{(.*)\} ", aftermath.metrics, re.MULTILINE)
    values = {value for labels in series for value in re.findall(r'\w+="([^"]*)"', labels)}
    assert "spy" in values
    assert not values & {"nope", USER, *aftermath.callbacks}
    assert not [value for value in values if "/" in value or " " in value or len(value) > 40]
    assert len(series) < 400


# -- the engine


def test_an_engine_cannot_read_the_environment_of_its_worker(aftermath: Aftermath) -> None:
    of_parent = str(aftermath.spied["of_parent"])
    if of_parent != "refused" and _is_all_powerful():
        pytest.skip("this user may read every process; test_privacy gives that up first")
    assert of_parent == "refused"


def _is_all_powerful() -> bool:
    status = Path("/proc/self/status").read_text()
    found = re.search(r"CapEff:\s*([0-9a-f]+)", status)
    return bool(found and int(found[1], 16))
