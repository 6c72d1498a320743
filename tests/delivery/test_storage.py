"""Storage: what is really there afterwards, and what each refusal means."""

from __future__ import annotations

import hashlib
import os
import re
import time
from pathlib import Path

import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st

from ourvidz_core.delivery.storage import DirectoryStorage, Storage, SupabaseStorage, check_place, writing_to
from ourvidz_core.errors import AssetRejected, DiskFull, StorageUnavailable
from ourvidz_core.settings import AssetFormat
from ourvidz_core.testing.servers import Bucket, SupabaseServer
from ourvidz_core.wire.artifacts import Asset

BUCKET = "sdxl_image_fast"
PATH = "user-1/job-1_0.png"


def storage_for(
    server: SupabaseServer, *, asset_format: AssetFormat = AssetFormat.PATH, timeout_seconds: float = 5
) -> SupabaseStorage:
    return SupabaseStorage(server.url, server.key, asset_format=asset_format, timeout_seconds=timeout_seconds)


def put(
    storage: Storage, file: Path, *, bucket: str = BUCKET, path: str = PATH, media_type: str = "image/png"
) -> Asset:
    try:
        return storage.store(file, bucket=bucket, path=path, media_type=media_type)
    finally:
        storage.close()


def test_an_artifact_is_stored_byte_for_byte(supabase: SupabaseServer, picture_file: Path) -> None:
    content = picture_file.read_bytes()

    asset = put(storage_for(supabase), picture_file)

    assert supabase.objects[BUCKET, PATH].body == content
    assert supabase.objects[BUCKET, PATH].media_type == "image/png"
    assert asset == Asset(
        bucket=BUCKET,
        path=PATH,
        media_type="image/png",
        size_bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        reported_as=PATH,
    )


def test_the_upload_says_what_supabase_wants_to_hear(supabase: SupabaseServer, picture_file: Path) -> None:
    put(storage_for(supabase), picture_file)

    upload = supabase.requests[0]
    assert (upload.method, upload.target) == ("POST", f"/storage/v1/object/{BUCKET}/{PATH}")
    assert upload.headers["authorization"] == f"Bearer {supabase.key}"
    assert upload.headers["apikey"] == supabase.key
    assert upload.headers["content-type"] == "image/png"
    assert upload.headers["x-upsert"] == "true"
    assert upload.headers["content-length"] == str(picture_file.stat().st_size)


def test_a_netrc_does_not_replace_the_key(
    supabase: SupabaseServer, picture_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login someone password else\n")
    monkeypatch.setenv("NETRC", str(netrc))

    assert put(storage_for(supabase), picture_file).path == PATH


def test_a_second_try_overwrites_the_first(supabase: SupabaseServer, picture_file: Path) -> None:
    put(storage_for(supabase), picture_file)
    picture_file.write_bytes(b"another picture")

    put(storage_for(supabase), picture_file)

    assert supabase.objects[BUCKET, PATH].body == b"another picture"


def test_a_large_file_is_sent_from_the_disk(supabase: SupabaseServer, tmp_path: Path) -> None:
    video = tmp_path / "out.mp4"
    video.write_bytes(os.urandom(20_000_000))

    asset = put(storage_for(supabase), video, bucket="video_fast", path="u/j_0.mp4", media_type="video/mp4")

    assert asset.size_bytes == 20_000_000
    assert hashlib.sha256(supabase.objects["video_fast", "u/j_0.mp4"].body).hexdigest() == asset.sha256


# -- what the callback reports


def test_a_public_url_leads_to_the_picture(picture_file: Path) -> None:
    with SupabaseServer(buckets={BUCKET: Bucket(is_public=True)}) as supabase:
        asset = put(storage_for(supabase, asset_format=AssetFormat.PUBLIC_URL), picture_file)

        assert requests.get(asset.reported_as, timeout=5).content == picture_file.read_bytes()


def test_a_signed_url_leads_to_the_picture_of_a_private_bucket(supabase: SupabaseServer, picture_file: Path) -> None:
    asset = put(storage_for(supabase, asset_format=AssetFormat.SIGNED_URL), picture_file)

    assert requests.get(asset.reported_as, timeout=5).content == picture_file.read_bytes()
    assert requests.get(asset.reported_as + "0", timeout=5).status_code == 400
    assert supabase.requests[-3].json() == {"expiresIn": 3600}


def test_an_object_describes_the_picture(supabase: SupabaseServer, picture_file: Path) -> None:
    asset = put(storage_for(supabase, asset_format=AssetFormat.OBJECT), picture_file)

    url = asset.reported_as["url"]
    assert requests.get(url, timeout=5).content == picture_file.read_bytes()
    assert asset.reported_as == {
        "type": "image",
        "url": url,
        "thumbnail_url": None,
        "metadata": {
            "bucket": BUCKET,
            "path": PATH,
            "media_type": "image/png",
            "size_bytes": asset.size_bytes,
            "sha256": asset.sha256,
        },
    }


# -- what is really there


def test_an_upload_that_was_cut_short_is_noticed(supabase: SupabaseServer, picture_file: Path) -> None:
    supabase.truncate_next()

    with pytest.raises(StorageUnavailable, match="upload it again"):
        put(storage_for(supabase), picture_file)

    assert put(storage_for(supabase), picture_file).path == PATH


def test_an_upload_that_left_nothing_is_noticed(supabase: SupabaseServer, picture_file: Path) -> None:
    # Given a storage that answers 200 and stores nothing
    supabase.fail_next("storage", status=200, body=b'{"Key":"x"}')

    with pytest.raises(StorageUnavailable, match="is not there"):
        put(storage_for(supabase), picture_file)


def test_other_bytes_of_the_right_size_are_noticed(supabase: SupabaseServer, picture_file: Path) -> None:
    put(storage_for(supabase), picture_file)
    other = picture_file.with_name("other.png")
    other.write_bytes(bytes(picture_file.stat().st_size))
    supabase.fail_next("storage", status=200)

    with pytest.raises(StorageUnavailable, match="other bytes"):
        put(storage_for(supabase), other)


def test_an_etag_that_is_no_md5_does_not_fail_an_upload(supabase: SupabaseServer, picture_file: Path) -> None:
    # Given a bucket whose encryption makes ETags look like an MD5 that they are not
    size = picture_file.stat().st_size
    described = b'{"size": %d}' % size
    supabase.fail_next("info", status=200, body=described, headers={"ETag": '"' + "0" * 32 + '"'})

    assert put(storage_for(supabase), picture_file).size_bytes == size


def test_a_server_without_the_info_route_is_asked_by_head(picture_file: Path) -> None:
    with SupabaseServer(is_info_supported=False) as supabase:
        put(storage_for(supabase), picture_file)

        assert supabase.requests[-1].method == "HEAD"
        supabase.truncate_next()
        with pytest.raises(StorageUnavailable, match="upload it again"):
            put(storage_for(supabase), picture_file)


# -- refusals that last


def test_a_file_above_the_buckets_limit_is_rejected(supabase: SupabaseServer, tmp_path: Path) -> None:
    large = tmp_path / "large.png"
    large.write_bytes(bytes(6_000_000))

    with pytest.raises(AssetRejected, match=r"sdxl_image_fast takes no file of 6\.0 MB.*raise .* limit"):
        put(storage_for(supabase), large)


def test_a_media_type_that_the_bucket_does_not_take_is_rejected(supabase: SupabaseServer, picture_file: Path) -> None:
    with pytest.raises(AssetRejected, match=r"takes no application/octet-stream.*allowed MIME"):
        put(storage_for(supabase), picture_file, media_type="application/octet-stream")


def test_a_bucket_that_is_not_there_is_named(supabase: SupabaseServer, picture_file: Path) -> None:
    with pytest.raises(AssetRejected, match="create the bucket nowhere"):
        put(storage_for(supabase), picture_file, bucket="nowhere")


def test_a_wrong_key_is_not_shown(supabase: SupabaseServer, picture_file: Path) -> None:
    storage = SupabaseStorage(supabase.url, "wrong-key-canary")
    body = b'{"statusCode":"403","error":"Unauthorized","message":"bad key wrong-key-canary"}'
    supabase.fail_next("storage", status=400, body=body)

    with pytest.raises(AssetRejected, match="set SUPABASE_SERVICE_KEY") as caught:
        put(storage, picture_file)

    assert "canary" not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (413, b""),
        (400, b'{"statusCode":"413","error":"Payload too large","message":"The object exceeded the maximum size"}'),
        (400, b'{"message":"The object exceeded the maximum allowed size"}'),
        (415, b"<html>"),
        (400, b'{"statusCode":"415","error":"invalid_mime_type","message":"mime type x is not supported"}'),
        (422, b'{"message":"mime type not supported"}'),
        (401, b""),
        (403, b'{"statusCode":"403","message":"new row violates row-level security policy"}'),
        (400, b'{"statusCode":400,"code":"InvalidJWT","message":"jwt malformed"}'),
        (400, b'{"statusCode":"404","error":"Bucket not found","message":"Bucket not found"}'),
        (404, b"no such route"),
        (400, b'{"statusCode":"400","error":"InvalidKey","message":"Invalid key"}'),
        (400, b"[]"),
        (301, b""),
    ],
)
def test_what_storage_will_never_take_is_rejected(
    status: int, body: bytes, supabase: SupabaseServer, picture_file: Path
) -> None:
    supabase.fail_next("storage", status=status, body=body, headers={"Location": "http://127.0.0.1:1/"})

    with pytest.raises(AssetRejected) as caught:
        put(storage_for(supabase), picture_file)

    assert not caught.value.is_transient
    assert len(supabase.requests) == 1


def test_an_empty_or_missing_file_is_not_sent(supabase: SupabaseServer, tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    for name in ("empty.png", "missing.png"):
        with pytest.raises(AssetRejected, match=name):
            put(storage_for(supabase), tmp_path / name)

    assert not supabase.requests


# -- refusals that pass


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (429, b""),
        (500, b'{"statusCode":"500","error":"Internal","message":"exceeded something"}'),
        (502, b"<html>Bad Gateway</html>"),
        (544, b'{"statusCode":"544","message":"The connection to the database timed out"}'),
        (400, b'{"statusCode":"503","message":"acquiring lock timeout"}'),
        (400, b'{"statusCode":"544","message":"The connection to the database timed out"}'),
        (400, b'{"statusCode":"423","message":"The resource is locked"}'),
        (400, b'{"statusCode":"429","message":"Too many connections"}'),
        (409, b'{"statusCode":"409","error":"Duplicate","message":"The resource already exists"}'),
    ],
)
def test_what_storage_may_take_later_is_worth_another_try(
    status: int, body: bytes, supabase: SupabaseServer, picture_file: Path
) -> None:
    supabase.fail_next("storage", status=status, body=body)

    with pytest.raises(StorageUnavailable) as caught:
        put(storage_for(supabase), picture_file)

    assert caught.value.is_transient
    assert put(storage_for(supabase), picture_file).path == PATH


def test_trouble_after_the_upload_is_worth_another_try(supabase: SupabaseServer, picture_file: Path) -> None:
    storage = storage_for(supabase, asset_format=AssetFormat.SIGNED_URL)
    for operation in ("info", "sign"):
        supabase.fail_next(operation, status=503)

        with pytest.raises(StorageUnavailable):
            put(storage, picture_file)

    assert put(storage, picture_file).reported_as.startswith(supabase.url)


@pytest.mark.parametrize("after_commit", [False, True])
def test_a_lost_answer_is_made_good_by_another_try(
    after_commit: bool, supabase: SupabaseServer, picture_file: Path
) -> None:
    supabase.drop_next("storage", after_commit=after_commit)

    with pytest.raises(StorageUnavailable, match="connection"):
        put(storage_for(supabase), picture_file)

    assert ((BUCKET, PATH) in supabase.objects) is after_commit
    assert put(storage_for(supabase), picture_file).path == PATH


def test_a_silent_storage_gets_the_time_limit_and_no_more(supabase: SupabaseServer, picture_file: Path) -> None:
    supabase.hang_next("storage")
    began = time.monotonic()

    with pytest.raises(StorageUnavailable, match="in time"):
        put(storage_for(supabase, timeout_seconds=0.3), picture_file)

    assert time.monotonic() - began < 2


def test_a_closed_port_may_be_open_later(picture_file: Path) -> None:
    with SupabaseServer() as supabase:
        storage = storage_for(supabase)
    with pytest.raises(StorageUnavailable):
        put(storage, picture_file)


# -- places

HOSTILE_PLACES = [
    ("..", PATH),
    ("", PATH),
    ("a/b", PATH),
    (".hidden", PATH),
    ("b", ""),
    ("b", "file.png"),
    ("b", "/user/file.png"),
    ("b", "../other/file.png"),
    ("b", "user/../other/file.png"),
    ("b", "user/./file.png"),
    ("b", "user//file.png"),
    ("b", "user/file.png/"),
    ("b", "user/%2e%2e/file.png"),
    ("b", "user/..%2ffile.png"),
    ("b", "user\\..\\file.png"),
    ("b", "user/fi\0le.png"),
    ("b", "user/file.png\n"),
    ("b", "user/file.png?x=1"),
    ("b", "user/file.png#x"),
    ("b", "user/\u2215etc"),
    ("b", "user/\u202efile.png"),
    ("b", "user/-rf"),
    ("b", "user/" + "a" * 10_000),
]


@pytest.mark.parametrize(("bucket", "path"), HOSTILE_PLACES, ids=lambda value: ascii(value)[1:40])
def test_a_place_outside_is_refused_before_anything_is_sent(
    bucket: str, path: str, supabase: SupabaseServer, picture_file: Path, tmp_path: Path
) -> None:
    root = tmp_path / "assets"
    for storage in (storage_for(supabase), DirectoryStorage(root)):
        with pytest.raises(AssetRejected):
            put(storage, picture_file, bucket=bucket, path=path)

    assert not supabase.requests
    assert not root.exists()


@given(st.text(max_size=20), st.text(alphabet="ab./\\%2e\0~", max_size=20))
def test_a_place_that_is_accepted_is_below_its_bucket(bucket: str, path: str) -> None:
    try:
        check_place(bucket, path)
    except AssetRejected:
        return
    root = os.path.realpath("/root-of-assets")
    assert os.path.normpath(f"{root}/{bucket}/{path}") == f"{root}/{bucket}/{path}"
    assert requests.Request("GET", f"http://a/{bucket}/{path}").prepare().path_url == f"/{bucket}/{path}"


@given(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}", fullmatch=True), st.integers(min_value=0, max_value=5))
def test_every_id_of_the_wire_makes_a_place(job_id: str, index: int) -> None:
    check_place(BUCKET, f"{job_id}/{job_id}_{index}.png")


# -- the directory


def test_a_directory_has_the_paths_of_storage(tmp_path: Path, picture_file: Path) -> None:
    root = tmp_path / "assets"

    asset = put(DirectoryStorage(root), picture_file)

    assert (root / BUCKET / PATH).read_bytes() == picture_file.read_bytes()
    assert asset.reported_as == PATH
    assert asset.sha256 == hashlib.sha256(picture_file.read_bytes()).hexdigest()
    assert [file.name for file in (root / BUCKET / "user-1").iterdir()] == ["job-1_0.png"]


def test_a_directory_overwrites_its_own_file(tmp_path: Path, picture_file: Path) -> None:
    root = tmp_path / "assets"
    put(DirectoryStorage(root), picture_file)
    picture_file.write_bytes(b"another picture")

    put(DirectoryStorage(root), picture_file)

    assert (root / BUCKET / PATH).read_bytes() == b"another picture"


@pytest.mark.parametrize("asset_format", [AssetFormat.PUBLIC_URL, AssetFormat.SIGNED_URL, AssetFormat.OBJECT])
def test_a_directory_reports_file_urls(asset_format: AssetFormat, tmp_path: Path, picture_file: Path) -> None:
    asset = put(DirectoryStorage(tmp_path / "my assets", asset_format=asset_format), picture_file)

    url = asset.reported_as["url"] if asset_format is AssetFormat.OBJECT else asset.reported_as
    assert re.fullmatch(rf"file:///.*/my%20assets/{BUCKET}/{PATH}", url)


def test_a_symbolic_link_does_not_lead_out_of_the_directory(tmp_path: Path, picture_file: Path) -> None:
    root, outside = tmp_path / "assets", tmp_path / "outside"
    (root / BUCKET).mkdir(parents=True)
    outside.mkdir()
    (root / BUCKET / "user-1").symlink_to(outside)

    with pytest.raises(AssetRejected, match="symbolic link"):
        put(DirectoryStorage(root), picture_file)

    assert not list(outside.iterdir())


def test_a_file_that_is_a_link_is_replaced_and_not_followed(tmp_path: Path, picture_file: Path) -> None:
    root, victim = tmp_path / "assets", tmp_path / "victim"
    (root / BUCKET / "user-1").mkdir(parents=True)
    victim.write_bytes(b"precious")
    (root / BUCKET / PATH).symlink_to(victim)

    put(DirectoryStorage(root), picture_file)

    assert victim.read_bytes() == b"precious"
    assert (root / BUCKET / PATH).read_bytes() == picture_file.read_bytes()


def test_a_directory_that_cannot_be_written_says_so(tmp_path: Path, picture_file: Path) -> None:
    root = tmp_path / "assets"
    root.write_text("a file where the directory should be")

    with pytest.raises(StorageUnavailable, match="check that the worker may write there"):
        put(DirectoryStorage(root), picture_file)


def test_a_full_disk_is_called_that(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full, a device that is always full")

    full = r"no room for b/user/file\.png .*free some disk space"
    with pytest.raises(DiskFull, match=full), writing_to(tmp_path, "b/user/file.png"):
        Path("/dev/full").write_bytes(b"x")
