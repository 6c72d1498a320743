"""Put artifacts where their owners can see them, and make sure that they are there."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Protocol, runtime_checkable
from urllib.parse import quote

import attrs
import requests
from attrs import field, frozen
from requests.auth import AuthBase
from urllib3.exceptions import HTTPError

from ourvidz_core.delivery.deadlines import Deadline, read_start
from ourvidz_core.errors import AssetRejected, DiskFull, StorageError, StorageUnavailable
from ourvidz_core.settings import AssetFormat
from ourvidz_core.wire.artifacts import Asset

#: One name in a path: nothing that a file system, a URL or a shell could read differently.
SEGMENT_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}")
_PIECE_BYTES = 1024 * 1024
_ANSWER_BYTES = 64 * 1024
_CONNECT_SECONDS = 10.0
#: Statuses below 500 that ask for another try: timeouts, conflicts, locks, limits.
_BUSY = frozenset({408, 409, 423, 425, 429})
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


class Storage(Protocol):
    """Where the worker stores what a job made."""

    def store(self, file: Path, *, bucket: str, path: str, media_type: str) -> Asset:
        """Store ``file`` as ``path`` in ``bucket``, over whatever an earlier try left there.

        Returns only when the whole file was seen to be there.

        :raises StorageError: ``is_transient`` says whether another try may succeed.
        """
        ...

    def close(self) -> None:
        """Give up connections."""
        ...


@frozen(kw_only=True)
class BucketFacts:
    """What storage says of one of its buckets; None is no limit."""

    size_limit_bytes: int | None = None
    media_types: tuple[str, ...] | None = None


@runtime_checkable
class InspectableStorage(Storage, Protocol):
    """A storage that can be looked at before anything depends on it."""

    def look_at(self, bucket: str) -> BucketFacts | None:
        """What ``bucket`` takes, or None where there is no such bucket. Changes nothing in it.

        :raises StorageError: it cannot be asked, or could not be written to.
        """
        ...

    def remove(self, bucket: str, path: str) -> None:
        """Remove one object that was stored.

        :raises StorageError: it is still there.
        """
        ...


@runtime_checkable
class ViewableStorage(Storage, Protocol):
    """A storage whose assets can be shown to an operator."""

    def view(self, bucket: str, path: str) -> Path | str:
        """The file of an asset on this machine, or an http address that shows it for a while.

        :raises StorageError: there is no such asset, or none that may be shown.
        """
        ...


class SupabaseStorage:
    """Assets in the buckets of a Supabase project, over its HTTP interface."""

    def __init__(
        self,
        url: str,
        service_key: str,
        *,
        asset_format: AssetFormat = AssetFormat.PATH,
        signed_url_seconds: int = 3600,
        timeout_seconds: float = 120.0,
        session: requests.Session | None = None,
    ) -> None:
        self._base = f"{url.rstrip('/')}/storage/v1"
        self._asset_format = asset_format
        self._signed_url_seconds = signed_url_seconds
        self._timeout_seconds = timeout_seconds
        self._auth = _ServiceKey(service_key)
        self._owns_session = session is None
        self._session = session or requests.Session()

    def store(self, file: Path, *, bucket: str, path: str, media_type: str) -> Asset:
        """See :meth:`Storage.store`."""
        check_place(bucket, path)
        fingerprint = Fingerprint.of(file)
        target = _Target(bucket, path, media_type, fingerprint.size_bytes)
        self._upload(file, target)
        self._verify(target, fingerprint)
        asset = Asset(
            bucket=bucket,
            path=path,
            media_type=media_type,
            size_bytes=fingerprint.size_bytes,
            sha256=fingerprint.sha256,
        )
        return attrs.evolve(asset, reported_as=self._reported(asset, target))

    def look_at(self, bucket: str) -> BucketFacts | None:
        """See :meth:`InspectableStorage.look_at`."""
        target = _Target(bucket, "probe", "", 0)
        with Deadline(self._timeout_seconds) as deadline:
            answer = self._ask("GET", f"/bucket/{quote(bucket, safe='')}", target, deadline)
        if answer.status == 404:
            return None
        if not answer.is_success:
            raise _refusal(answer, target)
        limit, media_types = answer.json.get("file_size_limit"), answer.json.get("allowed_mime_types")
        return BucketFacts(
            size_limit_bytes=limit if isinstance(limit, int) else None,
            media_types=tuple(map(str, media_types)) if isinstance(media_types, list) and media_types else None,
        )

    def remove(self, bucket: str, path: str) -> None:
        """See :meth:`InspectableStorage.remove`."""
        check_place(bucket, path)
        target = _Target(bucket, path, "", 0)
        with Deadline(self._timeout_seconds) as deadline:
            answer = self._ask("DELETE", f"/object/{target.encoded}", target, deadline)
        if not answer.is_success:
            raise StorageUnavailable(f"{target} was not removed; storage answered {answer.status}: {answer.message}")

    def view(self, bucket: str, path: str) -> str:
        """See :meth:`ViewableStorage.view`. A signed address, also where the bucket is public."""
        check_place(bucket, path)
        return self._signed_url(_Target(bucket, path, "", 0))

    def close(self) -> None:
        """Close the session, if it was made here."""
        if self._owns_session:
            self._session.close()

    def _upload(self, file: Path, target: _Target) -> None:
        with file.open("rb") as opened, Deadline(self._timeout_seconds) as deadline:
            body = _TimedBody(opened, target.size_bytes, deadline)
            headers = {"Content-Type": target.media_type, "x-upsert": "true"}
            answer = self._ask("POST", f"/object/{target.encoded}", target, deadline, data=body, headers=headers)
        if not answer.is_success:
            raise _refusal(answer, target)

    def _verify(self, target: _Target, fingerprint: Fingerprint) -> None:
        size_bytes, etag = self._look_up(target)
        if size_bytes != fingerprint.size_bytes:
            raise StorageUnavailable(
                f"{target} was uploaded with {fingerprint.size_bytes} bytes and storage has {size_bytes}; "
                "upload it again"
            )
        digest = etag.removeprefix("W/").strip('"').lower()
        # An ETag of another shape (of a multipart upload) tells nothing. One of this shape that
        # differs may still be no MD5 (buckets encrypted by KMS), so the bytes have the last word.
        if re.fullmatch(r"[0-9a-f]{32}", digest) and digest != fingerprint.md5 and not self._holds(target, fingerprint):
            raise StorageUnavailable(f"{target} was uploaded and storage has other bytes; upload it again")

    def _look_up(self, target: _Target) -> tuple[int, str]:
        """Size and ETag of what is stored."""
        with Deadline(self._timeout_seconds) as deadline:
            # Unlike HEAD, info is never answered by the CDN from before the upload.
            answer = self._ask("GET", f"/object/info/{target.encoded}", target, deadline)
            if answer.is_success and isinstance(answer.json.get("size"), int):
                return answer.json["size"], str(answer.headers.get("etag") or answer.json.get("etag") or "")
            if not answer.is_success and answer.status >= 500:
                raise _refusal(answer, target)
            # Servers before 2024 answer info without a body.
            answer = self._ask("HEAD", f"/object/authenticated/{target.encoded}", target, deadline)
        length = answer.headers.get("content-length", "")
        if not answer.is_success or not length.isdecimal():
            raise StorageUnavailable(f"{target} was uploaded and is not there ({answer.status}); upload it again")
        return int(length), answer.headers.get("etag", "")

    def _holds(self, target: _Target, fingerprint: Fingerprint) -> bool:
        """Read the object back, and compare."""
        digest = hashlib.sha256()
        url = f"{self._base}/object/authenticated/{target.encoded}"
        try:
            with (
                Deadline(self._timeout_seconds) as deadline,
                self._session.get(
                    url, auth=self._auth, stream=True, allow_redirects=False, timeout=self._timeouts(deadline)
                ) as response,
            ):
                if response.status_code != 200:
                    return False
                for piece in response.iter_content(_PIECE_BYTES):
                    deadline.check()
                    digest.update(piece)
        except (requests.RequestException, HTTPError, OSError) as error:
            raise _no_answer(error, target) from None
        return digest.hexdigest() == fingerprint.sha256

    def _reported(self, asset: Asset, target: _Target) -> Any:
        if self._asset_format is AssetFormat.PATH:
            return asset.path
        if self._asset_format is AssetFormat.PUBLIC_URL:
            return f"{self._base}/object/public/{target.encoded}"
        signed = self._signed_url(target)
        return signed if self._asset_format is AssetFormat.SIGNED_URL else described(asset, signed)

    def _signed_url(self, target: _Target) -> str:
        with Deadline(self._timeout_seconds) as deadline:
            wanted = {"expiresIn": self._signed_url_seconds}
            answer = self._ask("POST", f"/object/sign/{target.encoded}", target, deadline, json=wanted)
        if not answer.is_success:
            raise _refusal(answer, target)
        signed = answer.json.get("signedURL")
        if not isinstance(signed, str) or not signed.startswith("/"):
            raise StorageUnavailable(f"{target} was uploaded and storage gave no signed URL for it; try again")
        return f"{self._base}{signed}"

    def _ask(self, method: str, route: str, target: _Target, deadline: Deadline, **request: Any) -> _Answer:
        try:
            # A redirect would carry the key to wherever it points.
            with self._session.request(
                method,
                f"{self._base}{route}",
                auth=self._auth,
                stream=True,
                allow_redirects=False,
                timeout=self._timeouts(deadline),
                **request,
            ) as response:
                body = read_start(response, limit_bytes=_ANSWER_BYTES, deadline=deadline)
                return _Answer.of(response, body, hidden=self._auth.key)
        except (requests.RequestException, HTTPError, OSError) as error:
            raise _no_answer(error, target) from None

    def _timeouts(self, deadline: Deadline) -> tuple[float, float]:
        return min(_CONNECT_SECONDS, deadline.socket_timeout), deadline.socket_timeout


@frozen
class DirectoryStorage:
    """Assets in a local directory, under the paths that they would have in storage."""

    root: Path
    asset_format: AssetFormat = field(default=AssetFormat.PATH, kw_only=True)

    def store(self, file: Path, *, bucket: str, path: str, media_type: str) -> Asset:
        """See :meth:`Storage.store`."""
        check_place(bucket, path)
        fingerprint = Fingerprint.of(file)
        destination = self._destination(bucket, path)
        with writing_to(self.root, f"{bucket}/{path}"):
            destination.parent.mkdir(parents=True, exist_ok=True)
            _copy_whole(file, destination)
            stored_bytes = destination.stat().st_size
        if stored_bytes != fingerprint.size_bytes:
            raise StorageUnavailable(f"{bucket}/{path} has {stored_bytes} of its {fingerprint.size_bytes} bytes")
        asset = Asset(
            bucket=bucket,
            path=path,
            media_type=media_type,
            size_bytes=fingerprint.size_bytes,
            sha256=fingerprint.sha256,
        )
        return attrs.evolve(asset, reported_as=self._reported(asset, destination))

    def look_at(self, bucket: str) -> BucketFacts | None:
        """See :meth:`InspectableStorage.look_at`. Buckets are made as they are needed."""
        with writing_to(self.root, bucket):
            self.root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.root) as file:
                file.write(b"probe")
        return BucketFacts()

    def remove(self, bucket: str, path: str) -> None:
        """See :meth:`InspectableStorage.remove`. Leaves no empty directories."""
        check_place(bucket, path)
        destination = self._destination(bucket, path)
        with writing_to(self.root, f"{bucket}/{path}"):
            destination.unlink()
        with suppress(OSError):  # others' files are there
            destination.parent.rmdir()
            (self.root / bucket).rmdir()

    def view(self, bucket: str, path: str) -> Path:
        """See :meth:`ViewableStorage.view`."""
        check_place(bucket, path)
        destination = self._destination(bucket, path)
        if destination.is_symlink() or not destination.is_file():
            raise AssetRejected(f"{bucket}/{path} is no file in {self.root}")
        return destination

    def close(self) -> None:
        """There is nothing to close."""

    def _destination(self, bucket: str, path: str) -> Path:
        destination = self.root.joinpath(bucket, *path.split("/"))
        # The names are harmless; a symbolic link below the root might not be.
        if not destination.parent.resolve().is_relative_to(self.root.resolve()):
            raise AssetRejected(f"{bucket}/{path} lies outside {self.root}: a symbolic link leads there; remove it")
        return destination

    def _reported(self, asset: Asset, destination: Path) -> Any:
        if self.asset_format is AssetFormat.PATH:
            return asset.path
        url = destination.resolve().as_uri()
        return described(asset, url) if self.asset_format is AssetFormat.OBJECT else url


@frozen(kw_only=True)
class Fingerprint:
    """What identifies a file's content. The MD5 is for the ETags that are one."""

    size_bytes: int
    sha256: str
    md5: str

    @classmethod
    def of(cls, file: Path) -> Fingerprint:
        """Read ``file`` once.

        :raises AssetRejected: it is empty, or not to be read.
        """
        sha256, md5, size_bytes = hashlib.sha256(), hashlib.md5(usedforsecurity=False), 0
        try:
            with file.open("rb") as opened:
                while piece := opened.read(_PIECE_BYTES):
                    sha256.update(piece)
                    md5.update(piece)
                    size_bytes += len(piece)
        except OSError as error:
            raise AssetRejected(f"{file.name} cannot be stored: it is not to be read ({error.strerror})") from None
        if not size_bytes:
            raise AssetRejected(f"{file.name} cannot be stored: it is empty")
        return cls(size_bytes=size_bytes, sha256=sha256.hexdigest(), md5=md5.hexdigest())


@contextmanager
def writing_to(root: Path, place: str) -> Iterator[None]:
    """Turn a failure to write ``place`` below ``root`` into the storage error that it is.

    :raises DiskFull: there is no room.
    :raises StorageUnavailable: anything else.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise DiskFull(f"no room for {place} in {root}; free some disk space") from None
        raise StorageUnavailable(
            f"{place} cannot be written to {root} ({error.strerror}); check that the worker may write there"
        ) from None


def check_place(bucket: str, path: str) -> None:
    """Check that ``bucket`` and ``path`` (``owner/file``) are plain names.

    :raises AssetRejected: anything else, so that nothing is ever stored outside its bucket or owner.
    """
    segments = path.split("/")
    if not SEGMENT_PATTERN.fullmatch(bucket):
        raise AssetRejected(f"the bucket {ascii(bucket)[:80]} is no name of letters, digits, '.', '-' and '_'")
    if len(segments) < 2 or not all(SEGMENT_PATTERN.fullmatch(segment) for segment in segments):
        raise AssetRejected(
            f"the path {ascii(path)[:80]} is not owner/file, each of letters, digits, '.', '-' and '_', "
            "beginning with a letter or digit"
        )


def described(asset: Asset, url: str) -> dict[str, Any]:
    """The object that newer callback endpoints take in place of a path."""
    return {
        "type": asset.media_type.partition("/")[0],
        "url": url,
        "thumbnail_url": None,
        "metadata": {
            "bucket": asset.bucket,
            "path": asset.path,
            "media_type": asset.media_type,
            "size_bytes": asset.size_bytes,
            "sha256": asset.sha256,
        },
    }


@frozen
class _Target:
    """What is being stored and where, as messages and URLs name it."""

    bucket: str
    path: str
    media_type: str
    size_bytes: int

    @property
    def encoded(self) -> str:
        return "/".join(quote(segment, safe="") for segment in (self.bucket, *self.path.split("/")))

    def __str__(self) -> str:
        return f"{self.bucket}/{self.path}"


@frozen
class _Answer:
    """An answer of Supabase, with the status that it means."""

    status: int
    message: str
    json: Mapping[str, Any]
    headers: Mapping[str, str]

    @property
    def is_success(self) -> bool:
        return 200 <= self.status < 300

    @classmethod
    def of(cls, response: requests.Response, body: bytes, *, hidden: str) -> _Answer:
        parsed: Any = None
        with suppress(ValueError, RecursionError):
            parsed = json.loads(body)
        parsed = parsed if isinstance(parsed, dict) else {}
        status = response.status_code
        # Storage wraps nearly every refusal in a 400 and writes the real status into the body.
        inner = str(parsed.get("statusCode", ""))
        if 400 <= status < 500 and re.fullmatch(r"[45]\d\d", inner):
            status = int(inner)
        message = " ".join(str(parsed.get("message") or parsed.get("error") or "no reason given").split())
        if hidden:
            message = message.replace(hidden, "[key]")
        return cls(status, message[:200], parsed, response.headers)


def _refusal(answer: _Answer, target: _Target) -> StorageError:
    """What a status other than success means to the job."""
    said = f"storage answered {answer.status}: {answer.message}"
    words = answer.message.lower()
    if answer.status >= 500 or answer.status in _BUSY:
        return StorageUnavailable(f"{target} was not stored; {said}")
    if answer.status == 413 or "exceeded" in words:
        return AssetRejected(
            f"the bucket {target.bucket} takes no file of {target.size_bytes / 1e6:.1f} MB ({target}); raise "
            f"the bucket's file size limit or the project's; {said}"
        )
    if answer.status == 415 or "mime type" in words:
        return AssetRejected(
            f"the bucket {target.bucket} takes no {target.media_type} ({target}); add it to the bucket's allowed MIME "
            f"types; {said}"
        )
    if answer.status in (401, 403) or any(word in words for word in ("jwt", "jws", "signature", "api key")):
        return AssetRejected(
            f"{target} was not stored: the key is not accepted; set SUPABASE_SERVICE_KEY to the service key of this "
            f"project; {said}"
        )
    if answer.status == 404:
        return AssetRejected(
            f"{target} was not stored: create the bucket {target.bucket}, or check SUPABASE_URL; {said}"
        )
    if answer.status < 400:
        return AssetRejected(
            f"{target} was not stored: the server redirects ({answer.status}); set SUPABASE_URL to the address it "
            "redirects to"
        )
    return AssetRejected(f"{target} was not stored; {said}")


def _no_answer(error: Exception, target: _Target) -> StorageUnavailable:
    # The library's messages hold URLs, and a signed one holds a token.
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, TimeoutError | requests.Timeout):
            return StorageUnavailable(f"{target}: storage did not answer in time")
        chain = chain.__cause__ or chain.__context__
    return StorageUnavailable(f"{target}: the connection to storage failed ({type(error).__name__})")


class _ServiceKey(AuthBase):
    """The headers that Supabase wants. As an auth object, since a netrc would overwrite a plain header."""

    def __init__(self, key: str) -> None:
        self.key = key

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = f"Bearer {self.key}"
        request.headers["apikey"] = self.key
        return request


class _TimedBody:
    """A file as it is sent, read piece by piece and only as long as there is time."""

    def __init__(self, file: IO[bytes], size_bytes: int, deadline: Deadline) -> None:
        self._file = file
        self._size_bytes = size_bytes
        self._deadline = deadline

    def __len__(self) -> int:
        return self._size_bytes

    def __iter__(self) -> Iterator[bytes]:
        while piece := self.read(_PIECE_BYTES):
            yield piece

    def read(self, size: int = -1) -> bytes:
        self._deadline.check()
        return self._file.read(size)


def _copy_whole(source: Path, destination: Path) -> None:
    """Copy so that ``destination`` is at every moment absent, the old file or all of the new one."""
    descriptor, temporary = tempfile.mkstemp(dir=destination.parent, prefix=".storing-")
    try:
        with os.fdopen(descriptor, "wb") as target, source.open("rb") as opened:
            shutil.copyfileobj(opened, target, _PIECE_BYTES)
            target.flush()
            os.fchmod(target.fileno(), 0o644)  # mkstemp's files are for their maker alone
            os.fsync(target.fileno())
        os.replace(temporary, destination)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    directory = os.open(destination.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # the new name must survive a power cut too
    finally:
        os.close(directory)
