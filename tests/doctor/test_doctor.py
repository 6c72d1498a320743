"""``ourvidz doctor`` on a healthy set-up, and on broken ones: each is named, with its cure."""

from __future__ import annotations

import json
import os
import socket
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import ourvidz_demo_models
import pytest
import redis

from ourvidz_core.cli.main import main
from ourvidz_core.delivery.embedded import EmbeddedRedis
from ourvidz_core.doctor.examine import examine
from ourvidz_core.doctor.gpus import Gpu, GpuReport, measure_gpus
from ourvidz_core.doctor.machine import gpu_check
from ourvidz_core.doctor.redis_server import redis_checks
from ourvidz_core.settings import Settings
from ourvidz_core.testing.servers import DEPLOYED_BUCKETS, Answer, Bucket, FileServer, SupabaseServer
from ourvidz_core.wire.findings import Check, Finding, Level
from ourvidz_core.wire.job_types import JobType

PLUGINS = "ourvidz-sdxl,ourvidz-wan,ourvidz-wan-enhanced,ourvidz-demo-models"


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A state directory with its embedded Redis running."""
    directory = tmp_path_factory.mktemp("state")
    server = EmbeddedRedis(directory / "redis")
    yield directory
    server.close()


@pytest.fixture
def server(state: Path) -> Iterator[redis.Redis]:
    """The embedded Redis, to be set up wrongly; it is as it was after the test."""
    embedded = EmbeddedRedis(state / "redis")
    with redis.Redis.from_url(embedded.address) as client:
        yield client
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("requirepass", "")
    embedded.close()


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files that look like WAN's own to whoever does not load them."""
    directory = tmp_path_factory.mktemp("wan")
    write_safetensors(directory / "diffusion_pytorch_model.safetensors")
    for name in ("models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth"):
        with zipfile.ZipFile(directory / name, "w") as file:
            file.writestr("archive/data.pkl", b"weights" * 100)
    (directory / "google/umt5-xxl").mkdir(parents=True)
    return directory


@pytest.fixture
def healthy(state: Path, wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A set-up in which all is well; the test breaks one thing of it."""
    for name in os.environ:
        if name.startswith(("OURVIDZ_", "SUPABASE_", "REDIS_", "UPSTASH_")):
            monkeypatch.delenv(name)
    for name, value in {
        "ALLOW_PLUGINS": PLUGINS,
        "STATE_DIR": state,
        "WORK_DIR": tmp_path / "work",
        "DEVICE": "cpu",
        "SDXL_MODEL": "demo",
        "ENHANCER_MODEL": "demo",
        "WAN_CKPT_DIR": wan,
    }.items():
        monkeypatch.setenv(f"OURVIDZ_{name}", str(value))
    return monkeypatch


@pytest.fixture
def examined(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, dict[str, list[dict]]]]:
    """Runs the command and answers its exit code and the findings of each check."""

    def run(*only: str) -> tuple[int, dict[str, list[dict]]]:
        code = main(["doctor", "--json", *(f"--only={name}" for name in only)])
        report = json.loads(capsys.readouterr().out)
        return code, {check["check"]: check["findings"] for check in report["checks"]}

    return run


def write_safetensors(path: Path) -> None:
    header = json.dumps({"weight": {"dtype": "F32", "shape": [64], "data_offsets": [0, 256]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(256))


def worst(findings: list[dict]) -> dict:
    """The finding that the check's level comes from: they are listed worst first."""
    return findings[0]


def test_a_healthy_set_up_is_green_and_nothing_is_left_of_the_look_at_it(healthy, examined, state: Path) -> None:
    code, checks = examined()
    troubles = {name: [one for one in found if one["level"] != "green"] for name, found in checks.items()}
    # Whatever else is installed where the tests run is blocked.
    assert [one for one in troubles.pop("plugins") if " is blocked: " not in one["message"]] == []
    assert {name: found for name, found in troubles.items() if found} == {}
    assert code == 0
    assert {"redis", "clock", "callback endpoint", "gpu", "disk", "plugins", "storage video_high"} < set(checks)
    assert {"models of ourvidz-sdxl", "models of ourvidz-wan", "models of ourvidz-wan-enhanced"} < set(checks)
    assert list((state / "assets").rglob("*")) == []


# -- ten broken set-ups, and one more


def allkeys_lru(env, server, tmp_path: Path) -> None:
    server.config_set("maxmemory-policy", "allkeys-lru")


def wrong_password(env, server, tmp_path: Path) -> None:
    server.config_set("requirepass", "right")
    server.execute_command("AUTH", "right")
    path = server.connection_pool.connection_kwargs["path"]
    env.setenv("REDIS_URL", f"unix://:wrong-canary@{path}")


def unwritable_directory(env, server, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    env.setenv("OURVIDZ_STORAGE_DIR", str(tmp_path / "file/assets"))


def refusing_endpoint(env, server, tmp_path: Path) -> None:
    with socket.socket() as taken:  # bound and not listening
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    env.setenv("OURVIDZ_CALLBACK_URL", f"http://127.0.0.1:{port}/hook?token=canary")


def truncated_checkpoint(env, server, tmp_path: Path) -> None:
    checkpoint = tmp_path / "lustify.safetensors"
    write_safetensors(checkpoint)
    checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    env.setenv("OURVIDZ_SDXL_MODEL", str(checkpoint))
    env.setenv("OURVIDZ_SDXL_CONFIG_DIR", str(ourvidz_demo_models.SDXL))


def missing_config_directory(env, server, tmp_path: Path) -> None:
    checkpoint = tmp_path / "lustify.safetensors"
    write_safetensors(checkpoint)
    env.setenv("OURVIDZ_SDXL_MODEL", str(checkpoint))
    env.setenv("OURVIDZ_SDXL_CONFIG_DIR", str(tmp_path / "nowhere"))


def missing_wan_file(env, server, tmp_path: Path) -> None:
    ckpt_dir = tmp_path / "wan"
    ckpt_dir.mkdir()
    whole = Path(os.environ["OURVIDZ_WAN_CKPT_DIR"])
    for path in whole.iterdir():
        if path.name != "Wan2.1_VAE.pth":
            (ckpt_dir / path.name).symlink_to(path)
    env.setenv("OURVIDZ_WAN_CKPT_DIR", str(ckpt_dir))


def full_disk(env, server, tmp_path: Path) -> None:
    env.setenv("OURVIDZ_MIN_FREE_DISK_MB", "1e12")


def blocked_plugin(env, server, tmp_path: Path) -> None:
    env.setenv("OURVIDZ_BLOCK_PLUGINS", "ourvidz-wan-enhanced")


def missing_enhancer_that_must_work(env, server, tmp_path: Path) -> None:
    env.delenv("OURVIDZ_ENHANCER_MODEL")
    env.setenv("OURVIDZ_ENHANCER_POLICY", "fail")


@pytest.mark.parametrize(
    ("break_it", "check", "level", "named", "cure"),
    [
        (allkeys_lru, "redis", "red", "throws jobs away", "maxmemory-policy noeviction"),
        (wrong_password, "redis", "red", "refuses the password", "right user and password into REDIS_URL"),
        (unwritable_directory, "storage image_fast", "red", "Not a directory", "OURVIDZ_STORAGE_DIR"),
        (refusing_endpoint, "callback endpoint", "red", "does not answer (ConnectionError)", "OURVIDZ_CALLBACK_URL"),
        (truncated_checkpoint, "models of ourvidz-sdxl", "red", "is cut", "copy the model again"),
        (
            missing_config_directory,
            "models of ourvidz-sdxl",
            "red",
            "lacks model_index.json",
            "OURVIDZ_SDXL_CONFIG_DIR",
        ),
        (missing_wan_file, "models of ourvidz-wan", "red", "Wan2.1_VAE.pth is missing", "copy the checkpoint again"),
        (full_disk, "disk", "red", "workers take no jobs", "OURVIDZ_MIN_FREE_DISK_MB"),
        (blocked_plugin, "plugins", "yellow", "ourvidz-wan-enhanced", "change that setting"),
        (
            missing_enhancer_that_must_work,
            "models of ourvidz-wan-enhanced",
            "red",
            "no language model is configured",
            "OURVIDZ_ENHANCER_URL",
        ),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_is_broken_is_named_with_its_cure(
    break_it, check: str, level: str, named: str, cure: str, healthy, server, examined, tmp_path: Path
) -> None:
    break_it(healthy, server, tmp_path)
    code, checks = examined(check)
    (found, *_) = [one for one in checks[check] if named in one["message"]]
    assert found["level"] == level
    assert cure in found["cure"]
    assert code == (1 if level == "red" else 0)
    assert "canary" not in str(checks)


def test_a_bucket_that_is_missing_or_takes_too_little_is_named(healthy, examined) -> None:
    buckets = {**DEPLOYED_BUCKETS, "image_high": Bucket(size_limit_bytes=1_000_000)}
    del buckets["video_high"]
    buckets["sdxl_image_high"] = Bucket(media_types=("image/jpeg",))
    with SupabaseServer(buckets=buckets) as supabase:
        healthy.setenv("SUPABASE_URL", supabase.url)
        healthy.setenv("SUPABASE_SERVICE_KEY", supabase.key)
        code, checks = examined("storage")
        assert supabase.objects == {}, "a probe was left behind"
        healthy.setenv("SUPABASE_SERVICE_KEY", "wrong")
        _, refused = examined("storage image_fast")
    assert code == 1
    assert worst(checks["storage video_high"])["level"] == "red"
    assert "create the bucket" in worst(checks["storage video_high"])["cure"]
    assert worst(checks["storage video_high"])["job_types"] == ["video_high"]
    assert (worst(checks["storage image_high"])["level"], checks["storage image_high"][1]["level"]) == (
        "yellow",
        "green",
    )
    assert "OURVIDZ_BUCKET_LIMITS_MB" in worst(checks["storage image_high"])["cure"]
    assert "image/png" in worst(checks["storage sdxl_image_high"])["cure"]
    assert worst(checks["storage video_fast"])["message"] == "a probe was written to video_fast, read and removed"
    assert "SUPABASE_SERVICE_KEY" in worst(refused["storage image_fast"])["cure"]


def test_a_bucket_that_may_be_written_and_not_looked_at_is_fit(healthy, examined) -> None:
    class Reticent(SupabaseServer):
        def _manage(self, request):
            is_look = request.method == "GET"
            return (
                Answer.of_json({"statusCode": "404", "error": "Bucket not found"}, 400)
                if is_look
                else super()._manage(request)
            )

    with Reticent() as supabase:
        healthy.setenv("SUPABASE_URL", supabase.url)
        healthy.setenv("SUPABASE_SERVICE_KEY", supabase.key)
        _, checks = examined("storage video_fast")
        assert supabase.objects == {}
    assert worst(checks["storage video_fast"])["level"] == "green"


@pytest.mark.parametrize(
    ("answer", "level", "said"),
    [
        (Answer(status=204), "green", "nothing was posted"),
        (Answer(status=401), "green", "401"),
        (Answer.redirect("https://elsewhere.test/"), "red", "follow no redirect"),
        (Answer(status=404), "yellow", "may not be deployed"),
        (Answer(status=503), "yellow", "503"),
    ],
    ids=["answers", "wants a key", "redirects", "not there", "broken"],
)
def test_the_endpoint_is_asked_and_never_told_anything(
    answer: Answer, level: str, said: str, healthy, examined
) -> None:
    with FileServer({"/hook": answer}) as endpoint:
        healthy.setenv("OURVIDZ_CALLBACK_URL", f"{endpoint.url}/hook")
        healthy.setenv("OURVIDZ_CALLBACK_SECRET", "a-secret")
        _, checks = examined("callback")
        (request,) = endpoint.requests
    found = worst(checks["callback endpoint"])
    assert (found["level"], said in found["message"]) == (level, True)
    assert (request.method, request.body) == ("OPTIONS", b"")
    assert not {"authorization", "x-callback-signature", "webhook-id"} & set(request.headers)


@pytest.mark.parametrize(
    ("seconds_off", "level"), [(0.0, Level.GREEN), (-60.0, Level.YELLOW), (3600.0, Level.RED)], ids=str
)
def test_a_clock_that_differs_from_redis_is_named(seconds_off: float, level: Level, state: Path) -> None:
    import time

    checks = redis_checks(Settings(state_dir=state), clock=lambda: time.time() + seconds_off)
    (clock,) = examine([check for check in checks if check.name == "clock"])
    assert clock.level is level
    if level is not Level.GREEN:
        assert "chrony" in clock.findings[0].cure
        assert f"{abs(seconds_off):.1f} s {'behind' if seconds_off < 0 else 'ahead of'}" in clock.findings[0].message


@pytest.mark.parametrize(
    ("report", "device", "level", "said"),
    [
        (GpuReport(trouble="torch finds none"), "auto", Level.YELLOW, "torch finds none"),
        (GpuReport(trouble="torch finds none"), "cuda:0", Level.RED, "no CUDA device"),
        ("one of 80 GiB with 4 free", "auto", Level.YELLOW, "other processes hold the rest"),
        ("one of 80 GiB with 79 free", "auto", Level.GREEN, "driver 570"),
    ],
    ids=["laptop", "lost GPU", "taken", "well"],
)
def test_a_gpu_that_is_missing_or_taken_is_named(report: GpuReport | str, device: str, level: Level, said: str) -> None:
    if isinstance(report, str):
        free = 4.0 if "with 4" in report else 79.0
        gpu = Gpu(index=0, name="X", free_gb=free, total_gb=80.0, capability="9.0")
        report = GpuReport(gpus=(gpu,), driver="570", kernels={"FA3": "0.0.3"})
    types = [JobType(name="video", queue="q", content_type="video", vram_gb=24)]
    (seen,) = examine([gpu_check(Settings(device=device), types, measure=lambda: report)])
    assert seen.level is level
    assert said in seen.findings[0].message


def test_a_plugin_that_fails_is_named_and_the_checks_of_others_still_run(healthy, install, examined) -> None:
    install("acme-broken", "import nothing_of_that_name")
    install(
        "acme-checked",
        """
        import time
        from ourvidz_core import Check, Finding, JobType, hookimpl

        @hookimpl
        def register_job_types():
            yield JobType(name="acme", queue="acme_queue", content_type="image")

        def crash():
            raise KeyError("model")

        @hookimpl
        def doctor_checks(settings):
            yield Check(name="acme crash", run=crash)
            yield Check(name="acme hang", run=lambda: time.sleep(60), timeout_seconds=0.1)
            yield Check(name="acme fine", run=lambda: [Finding.green("fine")])
        """,
    )
    install(
        "acme-mistaken",
        """
        from ourvidz_core import hookimpl

        @hookimpl
        def doctor_checks(settings):
            return settings.no_such_thing
        """,
    )
    healthy.setenv("OURVIDZ_ALLOW_PLUGINS", "acme-broken,acme-checked,acme-mistaken")
    code, checks = examined("plugins", "acme", "checks")
    assert code == 1
    assert "acme-broken 1.0 does not load: (import) ModuleNotFoundError" in worst(checks["plugins"])["message"]
    assert "OURVIDZ_BLOCK_PLUGINS=acme-broken" in worst(checks["plugins"])["cure"]
    assert "KeyError: 'model'" in worst(checks["acme crash"])["message"]
    assert worst(checks["acme hang"])["message"] == "no answer within 0.1 s"
    assert worst(checks["acme fine"])["level"] == "green"
    assert "AttributeError" in worst(checks["checks of acme-mistaken"])["message"]


def test_the_checks_of_the_documentation_find_what_the_page_says(healthy, install, examined) -> None:
    page = (Path(__file__).parents[2] / "docs/how-to/doctor.md").read_text("utf-8")
    install("acme-shown", page.partition("```python\n")[2].partition("```")[0])
    healthy.setenv("OURVIDZ_ALLOW_PLUGINS", "acme-shown")
    _, checks = examined("models")
    (found,) = checks["models of acme-upscale"]
    assert (found["message"], found["cure"]) == ("/models/acme.safetensors is missing", "copy it there")
    assert found["job_types"] == ["acme_upscale"]


def test_a_name_that_is_no_check_is_answered_with_those_there_are(healthy, capsys) -> None:
    assert main(["doctor", "--only", "rdis"]) == 2
    assert "no check is called rdis; there are redis, clock" in capsys.readouterr().err


def test_people_get_lines_with_cures(healthy, server, capsys) -> None:
    server.config_set("maxmemory-policy", "allkeys-lru")
    assert main(["doctor", "--only", "redis"]) == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split()[:2] == ["red", "redis"]
    assert printed[1].strip().startswith("cure: CONFIG SET maxmemory-policy noeviction")
    assert printed[-1].endswith("1 red")


def test_checks_run_beside_each_other_and_keep_their_order() -> None:
    import threading

    meeting = threading.Barrier(3, timeout=5)

    def meet() -> list[Finding]:
        meeting.wait()
        return [Finding.green("met")]

    results = examine([Check(name=name, run=meet) for name in "abc"])
    assert [(result.name, result.level) for result in results] == [(name, Level.GREEN) for name in "abc"]


def test_a_finding_that_is_not_green_says_what_to_do() -> None:
    with pytest.raises(ValueError, match="says what to do"):
        Finding.red("broken", cure="")


def test_gpus_are_measured_by_a_process_of_its_own_that_may_hang(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text(
        """
import os, time
from types import SimpleNamespace as Space

__version__ = "2.11"
version = Space(cuda="13.0")
backends = Space(cudnn=Space(version=lambda: 91000))


def mem_get_info(index):
    if os.environ.get("HANGS"):
        time.sleep(60)
    return (30 - index) * 2**30, 80 * 2**30


cuda = Space(
    is_available=lambda: not os.environ.get("LOST"),
    device_count=lambda: 2,
    mem_get_info=mem_get_info,
    get_device_name=lambda index: "H200",
    get_device_capability=lambda index: (9, 0),
)
"""
    )
    environ = {**os.environ, "PYTHONPATH": str(tmp_path)}
    report = measure_gpus(environ)
    assert [(gpu.index, gpu.free_gb, gpu.total_gb, gpu.capability) for gpu in report.gpus] == [
        (0, 30.0, 80.0, "9.0"),
        (1, 29.0, 80.0, "9.0"),
    ]
    assert (report.cuda, report.kernels["cuDNN"]) == ("13.0", "91000")
    assert measure_gpus({**environ, "LOST": "1"}).trouble == "torch 2.11 (built for CUDA 13.0) finds none"
    assert "did not answer within 0.5 s" in measure_gpus({**environ, "HANGS": "1"}, timeout_seconds=0.5).trouble


def test_checksums_of_models_are_compared_only_when_that_is_asked_for(
    healthy, capsys, wan: Path, tmp_path: Path
) -> None:
    ckpt_dir = tmp_path / "wan"
    ckpt_dir.mkdir()
    for path in wan.iterdir():
        (ckpt_dir / path.name).symlink_to(path)
    (ckpt_dir / "SHA256SUMS").write_text(f"{'0' * 64}  Wan2.1_VAE.pth\n")
    healthy.setenv("OURVIDZ_WAN_CKPT_DIR", str(ckpt_dir))
    assert main(["doctor", "--only", "models"]) == 0
    capsys.readouterr()
    assert main(["doctor", "--only", "models", "--thorough"]) == 1
    assert "Wan2.1_VAE.pth is not what" in capsys.readouterr().out
