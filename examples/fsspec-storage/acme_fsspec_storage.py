"""Store assets on whatever fsspec writes to: S3, Google Cloud, Azure, SFTP, a mounted share."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import fsspec
from attrs import field, frozen

from ourvidz_core.delivery.storage import Fingerprint, check_place
from ourvidz_core.errors import AssetRejected, SettingsError, StorageUnavailable
from ourvidz_core.settings import STORAGE_SECTION, Settings, load_section
from ourvidz_core.wire.artifacts import Asset


@frozen(kw_only=True)
class FsspecSettings:
    """Where the assets go: ``OURVIDZ_STORAGE_URL``, and ``OURVIDZ_STORAGE_OPTIONS`` as JSON."""

    SECTION: ClassVar[str] = STORAGE_SECTION

    url: str = ""
    options: dict[str, Any] = field(factory=dict)


def make_storage(_: Settings) -> FsspecStorage:
    """What ``OURVIDZ_STORAGE_BACKEND=fsspec`` names; called once, when a worker starts."""
    own = load_section(FsspecSettings)
    if not own.url:
        raise SettingsError("set OURVIDZ_STORAGE_URL to where the assets go, such as s3://company-media/assets")
    return FsspecStorage(own.url, own.options)


class FsspecStorage:
    """Assets below one address of a file system that fsspec knows."""

    def __init__(self, url: str, options: dict[str, Any]) -> None:
        self._files, self._root = fsspec.core.url_to_fs(url, **options)

    def store(self, file: Path, *, bucket: str, path: str, media_type: str) -> Asset:
        """Copy ``file``, over what an earlier try left, and see that all of it is there."""
        check_place(bucket, path)
        fingerprint = Fingerprint.of(file)
        target = f"{self._root}/{bucket}/{path}"
        try:
            self._files.makedirs(target.rpartition("/")[0], exist_ok=True)
            self._files.put_file(str(file), target)
            self._files.invalidate_cache()
            stored_bytes = self._files.info(target)["size"]
        except PermissionError as error:
            raise AssetRejected(f"{bucket}/{path} was not stored: check the rights of these keys ({error})") from error
        except Exception as error:  # a client's own errors; what is not about rights may pass
            raise StorageUnavailable(f"{bucket}/{path} was not stored ({type(error).__name__})") from error
        if stored_bytes != fingerprint.size_bytes:
            raise StorageUnavailable(f"{bucket}/{path} has {stored_bytes} of its {fingerprint.size_bytes} bytes")
        return Asset(
            bucket=bucket,
            path=path,
            media_type=media_type,
            size_bytes=fingerprint.size_bytes,
            sha256=fingerprint.sha256,
            reported_as=path,
        )

    def close(self) -> None:
        """The file system keeps its own connections."""
