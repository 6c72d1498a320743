"""Settings: read here and nowhere else, from the environment and an optional TOML file.

A setting ``redis_url`` is ``OURVIDZ_REDIS_URL`` in the environment and ``redis_url`` in
the table ``[ourvidz]`` of the file that ``OURVIDZ_SETTINGS`` names; the environment wins.
A plugin's settings are a class of its own, read by :func:`load_section` from
``OURVIDZ_<SECTION>_*`` and the table ``[ourvidz.<section>]``. A variable that is set to
nothing counts as not set.
"""

from __future__ import annotations

import json
import math
import os
import re
import socket
import tempfile
import threading
import tomllib
from collections.abc import Iterable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar, get_type_hints
from urllib.parse import unquote, urlsplit

import attrs
from attrs import frozen
from platformdirs import user_state_path
from typed_settings import load_settings as _load
from typed_settings.cls_attrs import option, secret
from typed_settings.converters import default_converter
from typed_settings.exceptions import TsError
from typed_settings.loaders import DictLoader, FileLoader, Loader, TomlFormat
from typed_settings.types import OptionList, SecretStr, SettingsDict

from ourvidz_core.errors import SettingsError
from ourvidz_core.redaction import SHORTEST_SECRET, redact

Section = TypeVar("Section")

PREFIX = "OURVIDZ_"
SETTINGS_FILE = "OURVIDZ_SETTINGS"
#: The section of a storage backend's own settings. The engine gets none of them: there are keys among them.
STORAGE_SECTION = "storage"
#: Tables of the file that are no settings of one process: each describes a worker of ``ourvidz up``.
WORKER_TABLES = "workers"
#: typed-settings parses the source of a class, and two threads that parse at once can fail: python/cpython#106905.
_loading = threading.Lock()
#: Names without our prefix that deployments already use; ours win.
WELL_KNOWN_NAMES = {
    "redis_url": "REDIS_URL",
    "upstash_redis_rest_url": "UPSTASH_REDIS_REST_URL",
    "upstash_redis_rest_token": "UPSTASH_REDIS_REST_TOKEN",
    "supabase_url": "SUPABASE_URL",
    "supabase_service_key": "SUPABASE_SERVICE_KEY",
    "otlp_endpoint": "OTEL_EXPORTER_OTLP_ENDPOINT",
    "otlp_headers": "OTEL_EXPORTER_OTLP_HEADERS",
}
#: What a plugin's secret setting is called, whichever plugin's it is.
_KEY = re.compile(r"_(?:KEY|TOKEN|SECRET|PASSWORD)$")
_REDIS_SCHEMES = ("redis://", "rediss://", "unix://")
#: Addresses that may hold a token, and that nothing in an engine has a use for.
_ENDPOINTS = ("callback_url", "metrics_url")


class PopSide(StrEnum):
    """The end of the queue's list that holds the oldest job."""

    RIGHT = "right"
    LEFT = "left"


class AssetFormat(StrEnum):
    """What an item of the callback's ``assets`` is."""

    PATH = "path"
    PUBLIC_URL = "public_url"
    SIGNED_URL = "signed_url"
    OBJECT = "object"


class LogLevel(StrEnum):
    """How much is logged."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class LogFormat(StrEnum):
    """What a line of the log is."""

    TEXT = "text"
    JSON = "json"


class CompileMode(StrEnum):
    """Whether kernels are compiled for the device."""

    AUTO = "auto"
    OFF = "off"


def _positive(_: object, attribute: Any, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{attribute.name} must be a number above 0, not {value}")


def _not_negative(_: object, attribute: Any, value: float) -> None:
    if not 0 <= value < math.inf:
        raise ValueError(f"{attribute.name} must be 0 or above, not {value}")


def _positive_values(_: object, attribute: Any, values: Mapping[str, float]) -> None:
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{attribute.name} of {name} must be a number above 0, not {value}")


def _address_or_off(_: object, attribute: Any, value: str) -> None:
    host, _, port = value.rpartition(":")
    if value != "off" and not (host and port.isdecimal() and int(port) < 2**16):
        raise ValueError(f"{attribute.name} must be host:port or off, not {value!r}")


def _device(_: object, attribute: Any, value: str) -> None:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
        raise ValueError(f"{attribute.name} must be auto, cpu, cuda or cuda:N, not {value!r}")


def _secret_default() -> SecretStr:
    return SecretStr("")


@frozen(kw_only=True)
class Settings:
    """Everything that an operator can set of the framework itself."""

    # -- queue
    redis_url: SecretStr = secret(
        factory=_secret_default,
        help="Redis as redis://, rediss:// or unix://. Without it an embedded Redis is started",
    )
    upstash_redis_rest_url: str | None = option(
        default=None, help="REST address of a managed Redis; its native address is derived from it"
    )
    upstash_redis_rest_token: SecretStr = secret(
        factory=_secret_default, help="Token that belongs to upstash_redis_rest_url"
    )
    pop_side: PopSide = option(
        default=PopSide.RIGHT,
        help="End of the list that holds the oldest job: right for producers that LPUSH, left for RPUSH",
    )
    lease_seconds: float = option(
        default=60.0, validator=_positive, help="A job whose worker is silent for this long goes to another"
    )
    max_attempts: int = option(
        default=3, validator=_positive, help="Tries of one job, the first included, before it fails for good"
    )
    retry_delay_seconds: float = option(
        default=5.0, validator=_not_negative, help="Wait before the second try; doubles with each further one"
    )
    drain_seconds: float = option(
        default=30.0,
        validator=_not_negative,
        help="After SIGTERM running jobs may finish for this long; then they are handed back",
    )
    duplicate_window_seconds: float = option(
        default=7 * 86400.0,
        validator=_positive,
        help="An id that completed is dropped when it is pushed again within this time",
    )

    # -- storage
    supabase_url: str | None = option(
        default=None, help="Address of the Supabase project that stores assets and takes callbacks"
    )
    supabase_service_key: SecretStr = secret(
        factory=_secret_default, help="Service key for storage and, unless callback_key is set, for callbacks"
    )
    storage_dir: Path | None = option(
        default=None,
        help="Directory that takes the assets in place of Supabase; without supabase_url: assets in state_dir",
    )
    storage_backend: str | None = option(
        default=None,
        help="Name of a storage that an installed distribution provides, in place of Supabase and of a directory",
    )
    asset_format: AssetFormat = option(
        default=AssetFormat.PATH,
        help="What an item of the callback's assets is: path, public_url, signed_url or object",
    )
    signed_url_seconds: int = option(default=3600, validator=_positive, help="How long a signed asset URL stays valid")
    bucket_limits_mb: dict[str, float] = option(
        factory=dict,
        validator=_positive_values,
        help='Size limits of buckets that differ from the job types\' own, as JSON: {"video_fast": 80}',
    )
    upload_timeout_seconds: float = option(default=120.0, validator=_positive, help="Time limit of one upload request")

    # -- callbacks
    callback_url: str | None = option(
        default=None, help="Where callbacks are POSTed; default: /functions/v1/job-callback of supabase_url"
    )
    callback_key: SecretStr = secret(
        factory=_secret_default, help="Bearer token of the callback endpoint; default: supabase_service_key"
    )
    callback_secret: SecretStr = secret(
        factory=_secret_default,
        help="Signs each callback: X-Callback-Signature and webhook-signature, HMAC-SHA256. Text, or whsec_ and base64",
    )
    callback_secret_previous: SecretStr = secret(
        factory=_secret_default,
        help="The secret before callback_secret, accepted by endpoints that do not know the new one yet",
    )
    callback_dir: Path | None = option(
        default=None,
        help="Directory that records callbacks in place of Supabase's endpoint; without any: callbacks in state_dir",
    )
    callback_timeout_seconds: float = option(
        default=15.0, validator=_positive, help="Time limit of one callback request"
    )
    callback_retry_seconds: float = option(
        default=5.0,
        validator=_positive,
        help="Wait before a refused callback is sent again; doubles each time, with jitter, up to 5 minutes and, after"
        " the first hour, up to an hour",
    )
    callback_give_up_seconds: float = option(
        default=3 * 86400.0,
        validator=_positive,
        help="A callback that was refused for this long is put aside, for ourvidz queue outbox replay",
    )
    callback_min_age_seconds: float = option(
        default=5.0,
        validator=_not_negative,
        help="No terminal callback goes out sooner than this after the job's created_at",
    )

    # -- references
    reference_allowed_hosts: list[str] = option(
        factory=list,
        help="Hosts, or host:port, that references may come from although their address is not public, comma-separated",
    )
    reference_max_mb: float = option(default=25.0, validator=_positive, help="Size limit of a reference file")
    reference_max_megapixels: float = option(default=50.0, validator=_positive, help="Pixel limit of a reference image")
    reference_timeout_seconds: float = option(
        default=30.0, validator=_positive, help="Time limit for fetching one reference, redirects included"
    )

    # -- plugins
    allow_plugins: list[str] | None = option(
        default=None, help="Distributions that may be loaded, comma-separated; without it all may"
    )
    block_plugins: list[str] = option(factory=list, help="Distributions that are never imported, comma-separated")
    require_plugins: list[str] = option(
        factory=list, help="Distributions without which a worker does not start, comma-separated"
    )

    # -- engine
    job_timeouts_seconds: dict[str, float] = option(
        factory=dict,
        validator=_positive_values,
        help='Time limits of job types that differ from their own, as JSON: {"video_high": 3600}',
    )
    device: str = option(default="auto", validator=_device, help="auto, cpu, cuda or cuda:N")
    vram_budget_gb: float | None = option(
        default=None,
        validator=attrs.validators.optional(_positive),
        help="Device memory that warm models and their work may take, in GiB; default: what others leave of the device,"
        " less 10%",
    )
    host_memory_budget_gb: float | None = option(
        default=None,
        validator=attrs.validators.optional(_not_negative),
        help="Main memory that models may take which had to leave the device, in GiB; without room there they are"
        " dropped and loaded anew; default: half of what is free",
    )
    compile: CompileMode = option(
        default=CompileMode.AUTO,
        help="auto compiles models for a GPU where Triton and a C compiler are there; off runs them as they come",
    )
    kernels_dir: Path | None = option(
        default=None, help="Where compiled kernels are kept from one start to the next; default: kernels in state_dir"
    )
    engine_start_seconds: float = option(
        default=300.0, validator=_positive, help="Time limit for the engine process to get ready"
    )
    preload: bool = option(
        default=False, help="A worker loads and warms the models of its queues before it takes its first job"
    )
    stall_seconds: float = option(
        default=300.0,
        validator=_positive,
        help="A generation that has reported a step and then none for this long is stopped and tried again",
    )
    engine_env: dict[str, str] = option(
        factory=dict, help="Environment of the engine process beyond the worker's own, as JSON"
    )

    # -- orchestrator
    restart_first_seconds: float = option(
        default=1.0,
        validator=_positive,
        help="ourvidz up starts a worker that ended by itself again after this; doubles with each failure in a row",
    )
    restart_longest_seconds: float = option(
        default=60.0, validator=_positive, help="No restart waits longer than this, however often it has failed"
    )
    restart_reset_seconds: float = option(
        default=300.0,
        validator=_positive,
        help="A worker that took jobs for this long has started well: its next restart waits as briefly as the first",
    )
    silence_seconds: float = option(
        default=120.0,
        validator=_positive,
        help="A worker of ourvidz up whose process gives no sign of life for this long is killed and started again",
    )

    # -- this machine
    state_dir: Path = option(
        factory=lambda: user_state_path("ourvidz"), help="Where the embedded Redis and the default directories live"
    )
    work_dir: Path = option(
        factory=lambda: Path(tempfile.gettempdir()) / "ourvidz-work", help="Where jobs have their temporary directories"
    )
    min_free_disk_mb: float = option(
        default=500.0, validator=_not_negative, help="With less free disk than this a worker stops taking jobs"
    )
    worker_name: str = option(
        factory=lambda: f"{socket.gethostname()}-{os.getpid()}", help="Name of this worker in records and logs"
    )
    log_level: LogLevel = option(default=LogLevel.INFO, help="How much is logged: debug, info, warning or error")
    log_format: LogFormat = option(
        default=LogFormat.TEXT, help="text, or json: one object a line, with the job's id and type"
    )
    log_prompts: bool = option(default=False, help="Whether prompts may be in the log")

    # -- watching
    health_address: str = option(
        default="127.0.0.1:9464",
        validator=_address_or_off,
        help="host:port where a worker answers /healthz, /readyz and /metrics; port 0 is any free one; off for none",
    )
    previews: bool = option(
        default=False,
        help="Whether the dashboard shows how far a running job's picture has come, before any policy has seen it",
    )
    metrics_url: str | None = option(
        default=None, help="Where the worker and completion records of each job are POSTed, as JSON"
    )
    metrics_key: SecretStr = secret(factory=_secret_default, help="Bearer token of metrics_url")
    otlp_endpoint: str | None = option(
        default=None, help="OpenTelemetry collector that traces are sent to over HTTP; needs ourvidz-core[otel]"
    )
    otlp_headers: SecretStr = secret(
        factory=_secret_default, help="Headers for that collector, as name=value, comma-separated"
    )

    @property
    def redis_address(self) -> str | None:
        """The native address of the configured Redis, or None for an embedded one.

        :raises SettingsError: what is set is no address of a Redis.
        """
        if self.redis_url:
            if not str(self.redis_url).startswith(_REDIS_SCHEMES):
                raise SettingsError(
                    f"REDIS_URL must begin with {', '.join(_REDIS_SCHEMES)};"
                    " the REST address of a managed Redis is UPSTASH_REDIS_REST_URL"
                )
            return str(self.redis_url)
        if not self.upstash_redis_rest_url:
            return None
        token = str(self.upstash_redis_rest_token)
        if not token:
            raise SettingsError(
                "UPSTASH_REDIS_REST_URL is set and UPSTASH_REDIS_REST_TOKEN is not; set both, or REDIS_URL"
            )
        host = self.upstash_redis_rest_url.split("://", 1)[-1].rstrip("/").split("/", 1)[0].split(":", 1)[0]
        return f"rediss://default:{token}@{host}:6379"

    @property
    def secrets(self) -> tuple[str, ...]:
        """The values that must not leave this process."""
        values = (getattr(self, field.name) for field in attrs.fields(Settings))
        known = [str(value) for value in values if isinstance(value, SecretStr) and value]
        password = urlsplit(str(self.redis_url)).password
        headers = [header.partition("=")[2].strip() for header in str(self.otlp_headers).split(",")]
        return (*known, *((password, unquote(password)) if password else ()), *filter(None, headers))


def load(environ: Mapping[str, str] = os.environ, **overrides: Any) -> Settings:
    """The framework's settings. ``overrides`` come from the command line and win; None means not given.

    :raises SettingsError: naming the setting, and what it may be.
    """
    given = {variable_of(name): str(value) for name, value in overrides.items() if value is not None}
    return _load_class(Settings, "", {**environ, **given})


def load_section(section: type[Section], environ: Mapping[str, str] = os.environ) -> Section:
    """A plugin's own settings.

    ``section`` is a frozen attrs class with defaults for all fields and a class variable
    ``SECTION``, its name: ``sdxl`` reads ``OURVIDZ_SDXL_*`` and ``[ourvidz.sdxl]``.

    :raises SettingsError: naming the setting, and what it may be.
    """
    name: str = section.SECTION  # type: ignore[attr-defined]
    return _load_class(section, name, environ)


def load_worker_tables(environ: Mapping[str, str] = os.environ) -> list[dict[str, Any]]:
    """The tables ``[[ourvidz.workers]]`` of the settings file, as they are written there.

    :raises SettingsError: they are no tables, or the file cannot be read.
    """
    path = environ.get(SETTINGS_FILE)
    if not path:
        return []
    try:
        tables = tomllib.loads(Path(path).read_text("utf-8")).get("ourvidz", {}).get(WORKER_TABLES, [])
    except (OSError, ValueError, AttributeError) as error:
        raise SettingsError(f"{SETTINGS_FILE} names {path}, which cannot be read: {error}") from None
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise SettingsError(f"{WORKER_TABLES} in {path} must be tables: [[ourvidz.{WORKER_TABLES}]]")
    return tables


def variable_of(name: str, section: str = "") -> str:
    """The environment variable of a setting."""
    return PREFIX + (f"{section}_{name}" if section else name).upper()


def engine_environment(settings: Settings, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment of the engine process: the worker's own without anything secret.

    Plugins run there, and nothing they do needs the queue, the storage or the callbacks. What
    the settings file says goes along as variables, so that nobody there needs to read the file.
    """
    secret_names = {*WELL_KNOWN_NAMES.values()}
    secret_names |= {variable_of(name) for name in (*WELL_KNOWN_NAMES, *_ENDPOINTS)}
    secret_names |= {variable_of(field.name) for field in attrs.fields(Settings) if _is_secret(field.name)}
    said = {**_variables_of_file(environ.get(SETTINGS_FILE)), **environ}
    kept = {
        name: value
        for name, value in said.items()
        if name not in secret_names
        and name != SETTINGS_FILE
        and not name.startswith(variable_of("", STORAGE_SECTION))
        and not any(_holds(value, secret) for secret in settings.secrets)
    }
    return {**kept, **settings.engine_env}


def without_keys(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of a program that an engine runs: without the keys that plugins have for their own servers.

    >>> without_keys({"OURVIDZ_ACME_KEY": "k", "OURVIDZ_ACME_URL": "u", "PATH": "p"})
    {'OURVIDZ_ACME_URL': 'u', 'PATH': 'p'}
    """
    return {name: value for name, value in environ.items() if not (name.startswith(PREFIX) and _KEY.search(name))}


def _variables_of_file(path: str | None) -> dict[str, str]:
    """The settings file as the environment variables that say the same."""
    if not path:
        return {}
    table: dict[str, Any] = tomllib.loads(Path(path).read_text("utf-8")).get("ourvidz", {})
    variables: dict[str, str] = {}
    for name, value in table.items():
        if name == WORKER_TABLES:
            continue
        if isinstance(value, dict) and name.replace("-", "_") not in attrs.fields_dict(Settings):
            variables |= {variable_of(key.replace("-", "_"), name): _as_variable(inner) for key, inner in value.items()}
        else:
            variables[variable_of(name.replace("-", "_"))] = _as_variable(value)
    return variables


def _as_variable(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(str(item) for item in value)
    return json.dumps(value) if isinstance(value, dict) else str(value)


def _holds(value: str, secret: str) -> bool:
    """A secret of a few characters, such as a laptop's ``dev``, is found in many a path by chance."""
    return value == secret or (len(secret) >= SHORTEST_SECRET and secret in value)


def _is_secret(name: str) -> bool:
    return get_type_hints(Settings)[name] is SecretStr


def _load_class(cls: type[Section], section: str, environ: Mapping[str, str]) -> Section:
    loaders: list[Loader] = []
    settings_file = environ.get(SETTINGS_FILE)
    if settings_file:
        if not Path(settings_file).is_file():
            raise SettingsError(f"{SETTINGS_FILE} names {settings_file}, which is no file")
        table = "ourvidz" + (f".{section}" if section else "")
        loaders.append(FileLoader(files=[settings_file], formats={"*": _Table(table)}))
    names = [field.name for field in attrs.fields(cls)]  # type: ignore[arg-type]
    variables = {} if section else {n: environ[v] for n, v in WELL_KNOWN_NAMES.items() if environ.get(v)}
    variables |= {n: environ[variable_of(n, section)] for n in names if environ.get(variable_of(n, section))}
    loaders.append(DictLoader(_split(cls, variables, section)))
    try:
        with _loading:
            loaded = _load(cls, loaders, converter=default_converter(resolve_paths=False))
    except (TsError, ValueError, TypeError, AttributeError) as error:  # the last: a table that is no table
        raise SettingsError(_explain(error, names, section)) from error
    redact.add_secrets(str(value) for name in names if isinstance(value := getattr(loaded, name), SecretStr))
    return loaded


class _Table(TomlFormat):
    """One table of the file, without the tables below it that are other sections' settings."""

    def __call__(self, path: Path, settings_cls: type, options: OptionList) -> SettingsDict:
        names = {option.path.partition(".")[0] for option in options}
        values = super().__call__(path, settings_cls, options)
        return {
            name: value
            for name, value in values.items()
            if name != WORKER_TABLES and (not isinstance(value, dict) or name.replace("-", "_") in names)
        }


def _split(cls: type, variables: Mapping[str, str], section: str) -> dict[str, Any]:
    """Variables are text: a list is comma-separated, a mapping is JSON."""
    hints = get_type_hints(cls)
    values: dict[str, Any] = {}
    for name, text in variables.items():
        hint = str(hints[name])
        if "list[" in hint:
            values[name] = [item.strip() for item in text.split(",") if item.strip()]
        elif "dict[" in hint:
            try:
                values[name] = json.loads(text)
            except ValueError as error:
                raise SettingsError(f"{variable_of(name, section)} must be a JSON object: {error}") from None
        else:
            values[name] = text
    return values


def _explain(error: Exception, names: Iterable[str], section: str) -> str:
    parts = [str(inner) for inner in getattr(error, "exceptions", ())] or [str(error)]
    cause: BaseException | None = error.__cause__
    while cause is not None:
        parts.append(str(cause))
        cause = cause.__cause__
    # The library's own heading says nothing that the variable's name does not.
    text = re.sub(r"Could not convert loaded settings:\s*- \w+: ", "", "; ".join(part for part in parts if part))
    named = [variable_of(name, section) for name in names if re.search(rf"\b{name}\b", text)]
    return f"{', '.join(named) or 'settings'}: {text}"
