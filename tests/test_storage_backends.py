"""A storage that another distribution provides takes the place of ours, and says why where it cannot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from ourvidz_core.cli.wiring import make_storage
from ourvidz_core.delivery.storage import DirectoryStorage, Storage
from ourvidz_core.errors import OurVidzError, PluginError, SettingsError
from ourvidz_core.settings import Settings, engine_environment, load
from ourvidz_core.testing.distributions import make_distribution
from ourvidz_core.testing.storage import StorageSuite

SHARED = """
    from pathlib import Path
    from ourvidz_core.delivery.storage import DirectoryStorage

    def make(settings):
        return DirectoryStorage(Path(settings.worker_name))
"""

Provide = Callable[..., None]


@pytest.fixture
def provide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Provide:
    """Install a distribution that provides storage."""
    monkeypatch.syspath_prepend(tmp_path / "site")

    def install(distribution: str, source: str = SHARED, names: Sequence[str] = ("shared",)) -> None:
        make_distribution(tmp_path / "site", distribution, source, group="ourvidz.storage")
        module = distribution.replace("-", "_")
        lines = ["[ourvidz.storage]", *(f"{name} = {module}:make" for name in names)]
        (tmp_path / "site" / f"{module}-1.0.dist-info" / "entry_points.txt").write_text("\n".join(lines), "utf-8")

    return install


def test_the_storage_that_is_named_is_made_from_the_settings(provide: Provide, tmp_path: Path) -> None:
    provide("acme-named")

    storage = make_storage(
        Settings(storage_backend="shared", worker_name=str(tmp_path / "here"), supabase_url="https://unused.test")
    )

    assert storage == DirectoryStorage(tmp_path / "here")


BROKEN = "def make(settings): raise RuntimeError('no such bucket')"


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        pytest.param(
            Settings(storage_backend="shred"),
            SettingsError,
            "OURVIDZ_STORAGE_BACKEND names 'shred', and nothing provides it. Storage that is installed: .*shared",
            id="mistyped",
        ),
        pytest.param(
            Settings(storage_backend="twice"),
            SettingsError,
            "acme-one and acme-two provide it; uninstall one",
            id="provided twice",
        ),
        pytest.param(
            Settings(storage_backend="shared", block_plugins=["Acme.One"]),
            SettingsError,
            "'shared' of acme-one, which is not imported: OURVIDZ_BLOCK_PLUGINS names it",
            id="blocked",
        ),
        pytest.param(
            Settings(storage_backend="broken"),
            PluginError,
            "the storage 'broken' of acme-broken failed: RuntimeError: no such bucket",
            id="raises",
        ),
        pytest.param(
            Settings(storage_backend="nothing"), PluginError, "made None, which has no store and close", id="no storage"
        ),
    ],
)
def test_a_storage_that_cannot_be_used_ends_the_start_with_the_reason(
    settings: Settings, error: type[OurVidzError], said: str, provide: Provide
) -> None:
    provide("acme-one", names=("shared", "twice"))
    provide("acme-two", names=("twice",))
    provide("acme-broken", BROKEN, names=("broken",))
    provide("acme-nothing", "def make(settings): return None", names=("nothing",))

    with pytest.raises(error, match=said):
        make_storage(settings)


def test_the_engine_sees_nothing_of_a_backends_own_settings() -> None:
    environ = {"OURVIDZ_STORAGE_OPTIONS": '{"key": "k"}', "OURVIDZ_STORAGE_URL": "s3://u:p@h", "HOME": "/home/worker"}

    assert engine_environment(load(environ), environ) == {"HOME": "/home/worker"}


class TestADirectory(StorageSuite):
    @pytest.fixture
    def storage(self, tmp_path: Path) -> Storage:
        return DirectoryStorage(tmp_path / "assets")

    def read(self, storage: Storage, bucket: str, path: str) -> bytes:
        assert isinstance(storage, DirectoryStorage)
        return (storage.root / bucket / path).read_bytes()
