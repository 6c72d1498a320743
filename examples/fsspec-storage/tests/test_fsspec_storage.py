"""Assets on a file system of fsspec: on a disk, in memory, and through a worker's own wiring."""

from __future__ import annotations

import sys
from pathlib import Path
from uuid import uuid4

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from ourvidz_core.delivery.storage import Storage
from ourvidz_core.errors import AssetRejected, StorageUnavailable
from ourvidz_core.testing.storage import StorageSuite

sys.path.insert(0, str(Path(__file__).parents[1]))  # the example is one file, installed or not
from acme_fsspec_storage import FsspecStorage


class TestOnADisk(StorageSuite):
    @pytest.fixture
    def storage(self, tmp_path: Path) -> Storage:
        return FsspecStorage(f"file://{tmp_path}/assets", {})

    def read(self, storage: Storage, bucket: str, path: str) -> bytes:
        return Path(storage._root, bucket, path).read_bytes()


class TestInMemory(StorageSuite):
    @pytest.fixture
    def storage(self) -> Storage:
        return FsspecStorage(f"memory://{uuid4()}", {})

    def read(self, storage: Storage, bucket: str, path: str) -> bytes:
        return fsspec.filesystem("memory").cat_file(f"{storage._root}/{bucket}/{path}")


class Refusing(MemoryFileSystem):
    """A file system that answers every write with the error that it was made with."""

    protocol = "refusing"
    cachable = False

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def put_file(self, *_: object, **__: object) -> None:
        raise self.error


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        pytest.param(PermissionError("Access Denied"), AssetRejected, id="rights"),
        pytest.param(ConnectionResetError("reset by peer"), StorageUnavailable, id="connection"),
        pytest.param(RuntimeError("a client's own"), StorageUnavailable, id="anything else"),
    ],
)
def test_what_is_about_rights_is_final_and_the_rest_may_pass(
    error: Exception, outcome: type[Exception], tmp_path: Path
) -> None:
    fsspec.register_implementation("refusing", Refusing, clobber=True)
    file = tmp_path / "a.png"
    file.write_bytes(b"a picture")
    storage = FsspecStorage("refusing://assets", {"error": error})

    with pytest.raises(outcome, match=r"b/u/a\.png was not stored"):
        storage.store(file, bucket="b", path="u/a.png", media_type="image/png")
