"""Settings come from the environment and a file, say what is wrong, and keep their secrets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar

import attrs
import pytest
from attrs import field, frozen
from typed_settings.types import SecretStr

from ourvidz_core.errors import SettingsError
from ourvidz_core.settings import (
    WELL_KNOWN_NAMES,
    AssetFormat,
    PopSide,
    Settings,
    engine_environment,
    load,
    load_section,
    variable_of,
)

SECRET_NAMES = [
    "redis_url",
    "upstash_redis_rest_token",
    "supabase_service_key",
    "callback_key",
    "callback_secret",
    "callback_secret_previous",
    "metrics_key",
    "otlp_headers",
]


@frozen(kw_only=True)
class AcmeSettings:
    SECTION: ClassVar[str] = "acme"

    model: Path | None = None
    steps: int = 20
    tags: list[str] = field(factory=list)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "ourvidz.toml"
    path.write_text(
        """
        [ourvidz]
        lease_seconds = 11
        max_attempts = 7
        block_plugins = ["acme-wan"]
        bucket_limits_mb = {video_fast = 80}
        redis_url = "redis://file"

        [ourvidz.acme]
        model = "/models/acme"
        steps = 30
        tags = ["a", "b"]

        [ourvidz.engine_env]
        HF_HUB_OFFLINE = "1"
        """
    )
    return path


def test_without_anything_there_are_defaults() -> None:
    settings = load({})

    assert (settings.pop_side, settings.max_attempts, settings.redis_address) == (PopSide.RIGHT, 3, None)


def test_the_environment_is_text_and_becomes_values() -> None:
    settings = load(
        {
            "OURVIDZ_POP_SIDE": "left",
            "OURVIDZ_LEASE_SECONDS": "2.5",
            "OURVIDZ_ASSET_FORMAT": "object",
            "OURVIDZ_STORAGE_DIR": "assets",
            "OURVIDZ_BLOCK_PLUGINS": "acme-wan, acme-sdxl,",
            "OURVIDZ_ALLOW_PLUGINS": "acme",
            "OURVIDZ_BUCKET_LIMITS_MB": '{"video_fast": 80}',
            "OURVIDZ_JOB_TIMEOUTS_SECONDS": '{"video_high": 3600}',
            "OURVIDZ_ENGINE_ENV": '{"HF_HUB_OFFLINE": "1"}',
        }
    )

    assert (settings.pop_side, settings.lease_seconds, settings.asset_format) == (PopSide.LEFT, 2.5, AssetFormat.OBJECT)
    assert settings.storage_dir == Path("assets")
    assert (settings.block_plugins, settings.allow_plugins) == (["acme-wan", "acme-sdxl"], ["acme"])
    assert (settings.bucket_limits_mb, settings.engine_env) == ({"video_fast": 80.0}, {"HF_HUB_OFFLINE": "1"})
    assert settings.job_timeouts_seconds == {"video_high": 3600.0}


def test_a_file_holds_the_frameworks_settings_beside_those_of_plugins(file: Path) -> None:
    settings = load({"OURVIDZ_SETTINGS": str(file)})

    assert (settings.lease_seconds, settings.max_attempts) == (11.0, 7)
    assert (settings.block_plugins, settings.bucket_limits_mb) == (["acme-wan"], {"video_fast": 80.0})
    assert settings.engine_env == {"HF_HUB_OFFLINE": "1"}
    assert load_section(AcmeSettings, {"OURVIDZ_SETTINGS": str(file)}) == AcmeSettings(
        model=Path("/models/acme"), steps=30, tags=["a", "b"]
    )


def test_the_environment_beats_the_file_and_the_command_line_both(file: Path) -> None:
    environ = {"OURVIDZ_SETTINGS": str(file), "OURVIDZ_LEASE_SECONDS": "5", "OURVIDZ_ACME_STEPS": "40"}

    assert load(environ).lease_seconds == 5
    assert load(environ, lease_seconds=3).lease_seconds == 3
    assert load(environ, lease_seconds=None).lease_seconds == 5
    assert load_section(AcmeSettings, environ).steps == 40


@pytest.mark.parametrize("name", ["OURVIDZ_LEASE_SECONDS", "OURVIDZ_ALLOW_PLUGINS", "OURVIDZ_SETTINGS", "REDIS_URL"])
def test_a_variable_that_is_set_to_nothing_is_not_set(name: str) -> None:
    assert attrs.evolve(load({name: ""}), worker_name="w") == attrs.evolve(load({}), worker_name="w")


@pytest.mark.parametrize(("ours", "known"), WELL_KNOWN_NAMES.items())
def test_a_well_known_name_counts_unless_ours_is_there(ours: str, known: str) -> None:
    assert str(getattr(load({known: "theirs"}), ours)) == "theirs"
    assert str(getattr(load({known: "theirs", variable_of(ours): "ours"}), ours)) == "ours"


@pytest.mark.parametrize(
    "url",
    ["https://eu1-a.upstash.io", "https://eu1-a.upstash.io/", "eu1-a.upstash.io", "https://eu1-a.upstash.io:443/x"],
)
def test_the_native_address_of_a_managed_redis_is_derived(url: str) -> None:
    settings = load({"UPSTASH_REDIS_REST_URL": url, "UPSTASH_REDIS_REST_TOKEN": "tok"})

    assert settings.redis_address == "rediss://default:tok@eu1-a.upstash.io:6379"


def test_a_redis_url_beats_the_managed_one() -> None:
    environ = {"UPSTASH_REDIS_REST_URL": "https://a", "UPSTASH_REDIS_REST_TOKEN": "t", "REDIS_URL": "redis://b"}

    assert load(environ).redis_address == "redis://b"


def test_a_managed_redis_without_its_token_is_refused() -> None:
    with pytest.raises(SettingsError, match="UPSTASH_REDIS_REST_TOKEN is not"):
        _ = load({"UPSTASH_REDIS_REST_URL": "https://a"}).redis_address


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OURVIDZ_LEASE_SECONDS", "soon"),
        ("OURVIDZ_LEASE_SECONDS", "0"),
        ("OURVIDZ_LEASE_SECONDS", "-1"),
        ("OURVIDZ_LEASE_SECONDS", "nan"),
        ("OURVIDZ_LEASE_SECONDS", "inf"),
        ("OURVIDZ_DRAIN_SECONDS", "-1"),
        ("OURVIDZ_MAX_ATTEMPTS", "2.5"),
        ("OURVIDZ_MAX_ATTEMPTS", "0"),
        ("OURVIDZ_POP_SIDE", "middle"),
        ("OURVIDZ_ASSET_FORMAT", "xml"),
        ("OURVIDZ_LOG_LEVEL", "loud"),
        ("OURVIDZ_LOG_FORMAT", "xml"),
        ("OURVIDZ_LOG_PROMPTS", "perhaps"),
        ("OURVIDZ_HEALTH_ADDRESS", "9464"),
        ("OURVIDZ_HEALTH_ADDRESS", ":9464"),
        ("OURVIDZ_HEALTH_ADDRESS", "localhost:99999"),
        ("OURVIDZ_VRAM_BUDGET_GB", "-4"),
        ("OURVIDZ_BUCKET_LIMITS_MB", "80"),
        ("OURVIDZ_BUCKET_LIMITS_MB", "{"),
        ("OURVIDZ_BUCKET_LIMITS_MB", '["video_fast"]'),
        ("OURVIDZ_BUCKET_LIMITS_MB", '{"video_fast": "much"}'),
        ("OURVIDZ_BUCKET_LIMITS_MB", '{"video_fast": -1}'),
        ("OURVIDZ_DEVICE", "gpu"),
        ("OURVIDZ_DEVICE", "cuda:"),
        ("OURVIDZ_JOB_TIMEOUTS_SECONDS", '{"video_fast": 0}'),
        ("OURVIDZ_JOB_TIMEOUTS_SECONDS", '{"video_fast": "long"}'),
    ],
)
def test_a_wrong_value_names_its_variable_and_no_other(name: str, value: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load({name: value})

    assert [word.strip(",:") for word in str(caught.value).split() if word.startswith("OURVIDZ_")] == [name]


def test_a_wrong_value_of_a_plugin_names_its_variable() -> None:
    with pytest.raises(SettingsError, match="OURVIDZ_ACME_STEPS"):
        load_section(AcmeSettings, {"OURVIDZ_ACME_STEPS": "many"})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        pytest.param("[ourvidz", "OURVIDZ_|settings", id="no TOML"),
        pytest.param("[ourvidz]\nlease_secnods = 3", "lease_secnods", id="a mistyped name"),
        pytest.param("[ourvidz]\nlease_seconds = 'x'", "OURVIDZ_LEASE_SECONDS", id="a wrong value"),
        pytest.param("ourvidz = 3", "settings", id="no table"),
    ],
)
def test_a_wrong_file_is_explained(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "s.toml").write_text(text)

    with pytest.raises(SettingsError, match=said):
        load({"OURVIDZ_SETTINGS": str(tmp_path / "s.toml")})


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"gone\.toml"):
        load({"OURVIDZ_SETTINGS": str(tmp_path / "gone.toml")})


# -- secrets


def secret_environ() -> dict[str, str]:
    return {
        **{variable_of(name): f"canary-{name}" for name in SECRET_NAMES},
        "REDIS_URL": "redis://user:p%40ssword1@host",
        "SUPABASE_SERVICE_KEY": "canary-theirs",
        "SUPABASE_URL": "https://project.example",
    }


def test_every_secret_is_known_to_be_one() -> None:
    assert sorted(f.name for f in attrs.fields(Settings) if f.type in ("SecretStr", SecretStr)) == sorted(SECRET_NAMES)


def test_secrets_are_not_shown() -> None:
    assert "canary" not in repr(load(secret_environ()))
    assert "canary" not in str(load(secret_environ()))


def test_the_engine_gets_no_secret_whatever_its_variable_is_called() -> None:
    environ = {
        **secret_environ(),
        "BACKUP_OF_KEY": "key=canary-supabase_service_key;",
        "MY_REDIS": "rediss://default:canary-upstash_redis_rest_token@host:6379",
        "PATH": "/usr/bin",
        "OURVIDZ_DEVICE": "cpu",
    }

    kept = engine_environment(load(environ), environ)

    assert kept == {"PATH": "/usr/bin", "OURVIDZ_DEVICE": "cpu"}


@pytest.mark.parametrize("copy", ["p%40ssword1", "p@ssword1", "x p@ssword1 y"])
def test_the_password_inside_an_address_is_a_secret_too(copy: str) -> None:
    environ = {"REDIS_URL": "redis://user:p%40ssword1@host", "COPY": copy, "HOME": "/root"}

    assert engine_environment(load(environ), environ) == {"HOME": "/root"}


def test_a_secret_of_three_letters_takes_no_path_away() -> None:
    environ = {"SUPABASE_SERVICE_KEY": "bin", "PATH": "/usr/bin", "COPY": "bin"}

    assert engine_environment(load(environ), environ) == {"PATH": "/usr/bin"}


def test_the_operators_additions_reach_the_engine() -> None:
    environ = {"OURVIDZ_ENGINE_ENV": '{"HF_TOKEN": "for plugins"}'}

    assert engine_environment(load(environ), environ)["HF_TOKEN"] == "for plugins"


def test_the_engine_gets_what_the_settings_file_says_but_neither_its_secrets_nor_its_path(tmp_path: Path) -> None:
    path = tmp_path / "ourvidz.toml"
    path.write_text(
        """
        [ourvidz]
        device = "cpu"
        supabase_service_key = "key-canary"
        block_plugins = ["acme-a", "acme-b"]
        bucket_limits_mb = { video_fast = 80.0 }

        [ourvidz.sdxl]
        model = "/models/a.safetensors"
        models = { lustify = "/models/b.safetensors" }
        """,
        "utf-8",
    )
    environ = {"OURVIDZ_SETTINGS": str(path), "OURVIDZ_DEVICE": "cuda:1"}
    inside = engine_environment(load(environ), environ)
    assert "OURVIDZ_SETTINGS" not in inside
    assert not any("key-canary" in value for value in inside.values())
    assert inside["OURVIDZ_DEVICE"] == "cuda:1"
    assert inside["OURVIDZ_SDXL_MODEL"] == "/models/a.safetensors"
    assert json.loads(inside["OURVIDZ_SDXL_MODELS"]) == {"lustify": "/models/b.safetensors"}
    reread = load(inside)
    assert reread.block_plugins == ["acme-a", "acme-b"]
    assert reread.bucket_limits_mb == {"video_fast": 80.0}
