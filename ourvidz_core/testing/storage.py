"""What a worker relies on of any storage, as tests that a backend's own suite inherits."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from ourvidz_core.delivery.storage import Storage
from ourvidz_core.errors import AssetRejected

_BUCKET = "video_fast"
_PATH = "user-1/job-1_0.mp4"


class StorageSuite:
    """Subclass it as ``TestMyStorage``, with a fixture ``storage`` and :meth:`read`."""

    @pytest.fixture
    def storage(self, tmp_path: Path) -> Storage:
        """The storage to test, empty; anew for each test."""
        raise NotImplementedError("override the fixture `storage`")

    def read(self, storage: Storage, bucket: str, path: str) -> bytes:
        """What lies at ``path`` in ``bucket``, read past the storage under test."""
        raise NotImplementedError("override `read`")

    def test_a_file_is_stored_byte_for_byte_and_described(self, storage: Storage, tmp_path: Path) -> None:
        content = bytes(range(256)) * 5000

        asset = storage.store(_file(tmp_path, content), bucket=_BUCKET, path=_PATH, media_type="video/mp4")

        assert self.read(storage, _BUCKET, _PATH) == content
        assert (asset.bucket, asset.path, asset.media_type) == (_BUCKET, _PATH, "video/mp4")
        assert asset.size_bytes == len(content)
        assert asset.sha256 == hashlib.sha256(content).hexdigest()
        assert asset.reported_as, "reported_as goes into the callback's assets; without it the receiver gets nothing"

    def test_a_second_try_overwrites_the_first(self, storage: Storage, tmp_path: Path) -> None:
        for content in (b"a longer first try", b"the second"):
            storage.store(_file(tmp_path, content), bucket=_BUCKET, path=_PATH, media_type="video/mp4")

        assert self.read(storage, _BUCKET, _PATH) == b"the second"

    def test_jobs_and_buckets_do_not_touch_each_other(self, storage: Storage, tmp_path: Path) -> None:
        places = [(bucket, f"user-1/{job}_0.mp4") for bucket in ("video_fast", "video_high") for job in ("a", "b")]
        for bucket, path in places:
            content = f"{bucket} {path}".encode()
            storage.store(_file(tmp_path, content), bucket=bucket, path=path, media_type="video/mp4")

        for bucket, path in places:
            assert self.read(storage, bucket, path) == f"{bucket} {path}".encode()

    @pytest.mark.parametrize(
        ("bucket", "path"), [("..", _PATH), (_BUCKET, "../other/a.mp4"), (_BUCKET, "/etc/passwd"), (_BUCKET, "a.mp4")]
    )
    def test_a_place_outside_of_the_bucket_is_refused(
        self, storage: Storage, tmp_path: Path, bucket: str, path: str
    ) -> None:
        with pytest.raises(AssetRejected):
            storage.store(_file(tmp_path, b"x"), bucket=bucket, path=path, media_type="video/mp4")

    def test_an_empty_file_is_refused_for_good(self, storage: Storage, tmp_path: Path) -> None:
        with pytest.raises(AssetRejected):
            storage.store(_file(tmp_path, b""), bucket=_BUCKET, path=_PATH, media_type="video/mp4")

    def test_it_can_be_closed(self, storage: Storage) -> None:
        storage.close()


def _file(directory: Path, content: bytes) -> Path:
    file = directory / "artifact.mp4"
    file.write_bytes(content)
    return file
