"""References: what is fetched, what is refused, and what a decoded reference looks like."""

from __future__ import annotations

import io
import json
import shutil
import ssl
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from gzip import compress
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms

from ourvidz_core.delivery import decode_image
from ourvidz_core.delivery.addresses import AddressPolicy, is_public
from ourvidz_core.delivery.references import HttpReferences, StubReferences, check_url, shown_url
from ourvidz_core.errors import (
    InternalError,
    JobError,
    ReferenceInvalid,
    ReferenceRefused,
    ReferenceServerFailed,
    ReferenceUnavailable,
)
from ourvidz_core.testing.servers import Answer, FileServer
from ourvidz_core.wire.jobs import Reference

TOKEN = "canary-token"


def source_for(server: FileServer, **changes: Any) -> HttpReferences:
    settings: dict[str, Any] = {
        "max_bytes": 2_000_000,
        "max_pixels": 4_000_000,
        "timeout_seconds": 5,
        "allowed_hosts": [server.host],
    }
    return HttpReferences(**{**settings, **changes})


def fetch(server: FileServer, path: str, directory: Path, **changes: Any) -> Reference:
    reference = Reference(url=f"{server.url}{path}?token={TOKEN}")
    return source_for(server, **changes).fetch(reference, directory, "start")


def refusal_of(server: FileServer, path: str, directory: Path, **changes: Any) -> JobError:
    with pytest.raises(JobError) as caught:
        fetch(server, path, directory, **changes)
    assert TOKEN not in str(caught.value)
    assert not list(directory.iterdir()), "a refused reference leaves nothing behind"
    return caught.value


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def decoded(content: bytes, directory: Path) -> Image.Image:
    url = "https://images.example/a"
    fetched = StubReferences({url: content}).fetch(Reference(url=url), directory, "single")
    assert fetched.path is not None
    image = Image.open(fetched.path)
    image.load()
    assert (image.format, image.mode, image.size) == ("PNG", "RGB", (fetched.width, fetched.height))
    return image


def answering(*answers: Sequence[str]) -> tuple[Callable[[str, int], Sequence[str]], list[str]]:
    """A resolver that gives one answer after another, and the names it was asked for."""
    asked: list[str] = []

    def resolver(host: str, port: int) -> Sequence[str]:
        asked.append(host)
        return answers[min(len(asked), len(answers)) - 1]

    return resolver, asked


# -- what is fetched


def test_an_image_from_an_allowed_host_becomes_a_png_of_ours(files: FileServer, tmp_path: Path) -> None:
    fetched = fetch(files, "/picture.png", tmp_path)

    assert fetched.path == tmp_path / "start.png"
    assert (fetched.width, fetched.height) == (40, 20)
    assert fetched.url.endswith(TOKEN)
    with Image.open(fetched.path) as image:
        assert image.getpixel((5, 10)) == (255, 0, 0)
        assert image.getpixel((35, 10)) == (0, 0, 255)
    assert [file.name for file in tmp_path.iterdir()] == ["start.png"]


def test_the_request_says_what_it_wants_and_nothing_about_us(files: FileServer, tmp_path: Path) -> None:
    fetch(files, "/picture.png", tmp_path)

    (request,) = files.requests
    assert request.headers["accept-encoding"] == "identity"
    assert request.headers["user-agent"].startswith("ourvidz/")
    assert not {"authorization", "cookie", "referer"} & set(request.headers)


def test_proxies_and_passwords_of_the_environment_stay_unused(
    files: FileServer, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    netrc = tmp_path_factory.mktemp("home") / "netrc"
    netrc.write_text("machine 127.0.0.1 login someone password hidden\n")
    monkeypatch.setenv("NETRC", str(netrc))
    with FileServer({}) as proxy:
        for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY"):
            monkeypatch.setenv(name, proxy.url)

        fetch(files, "/picture.png", tmp_path)

        assert not proxy.requests
    assert "authorization" not in files.requests[0].headers


def test_cookies_are_not_carried_from_one_hop_to_the_next(files: FileServer, tmp_path: Path) -> None:
    files.files["/set"] = Answer(status=302, headers={"Location": "/picture.png", "Set-Cookie": "a=b; Path=/"})

    fetch(files, "/set", tmp_path)

    assert "cookie" not in files.requests[1].headers


# -- who may be connected to

HOSTILE_URLS = [
    "http://127.0.0.1/",
    "http://localhost/",
    "http://127.1/",
    "http://2130706433/",
    "http://0x7f000001/",
    "http://0x7f.0.0.1/",
    "http://017700000001/",
    "http://0177.0.0.1/",
    "http://0/",
    "http://0.0.0.0/",
    "http://\u2460\u2461\u2466.\u24ea.\u24ea.\u2460/",
    "http://10.0.0.1/",
    "http://172.16.0.1/",
    "http://192.168.1.1/",
    "http://100.64.0.1/",
    "http://100.100.100.200/latest/meta-data/",
    "http://169.254.169.254/latest/meta-data/",
    "http://169.254.169.254:80/",
    "http://2852039166/",
    "http://168.63.129.16/machine",
    "http://192.0.0.192/opc/v2/",
    "http://192.0.2.1/",
    "http://198.18.0.1/",
    "http://224.0.0.1/",
    "http://240.0.0.1/",
    "http://255.255.255.255/",
    "http://[::]/",
    "http://[::1]/",
    "http://[::ffff:127.0.0.1]/",
    "http://[::ffff:a9fe:a9fe]/",
    "http://[::127.0.0.1]/",
    "http://[fe80::1]/",
    "http://[fe80::1%25eth0]/",
    "http://[fc00::1]/",
    "http://[fd00:ec2::254]/",
    "http://[fec0::1]/",
    "http://[ff02::1]/",
    "http://[2001:db8::1]/",
    "http://[2001:0:4136:e378:8000:63bf:3fff:fdd2]/",
    "http://[2002:a9fe:a9fe::1]/",
    "http://[2002:808:808::1]/",
    "http://[64:ff9b::a9fe:a9fe]/",
    "http://[64:ff9b::7f00:1]/",
    "http://[64:ff9b:1::808:808]/",
    "http://user@8.8.8.8/",
    "http://user:password@8.8.8.8/",
    "http://8.8.8.8@127.0.0.1/",
    "http://8.8.8.8\\@127.0.0.1/",
    "http://8.8.8.8 @127.0.0.1/",
    "http://127.0.0.1\t/",
    "http://127.0.0.1%2f.example.com/",
    "http:///etc/passwd",
    "http://",
    "http://[::1/",
    "//8.8.8.8/a.png",
    "/etc/passwd",
    "../a.png",
    "",
    "blob:https://app.example/1c8b",
    "BLOB:https://app.example/1c8b",
    "data:image/png;base64,AAAA",
    "file:///etc/passwd",
    "ftp://8.8.8.8/a.png",
    "gopher://127.0.0.1:6379/_FLUSHALL",
    "javascript:alert(1)",
    "http+unix://%2Fvar%2Frun%2Fdocker.sock/",
    "httpx://8.8.8.8/",
    "https://8.8.8.8/" + "a" * 10_000,
    "http://8.8.8.8:99999999/",
    "http://8.8.8.8:-1/",
    "http://a\r\nHost: b/",
]


@pytest.mark.parametrize("url", HOSTILE_URLS, ids=lambda url: ascii(url)[1:45])
def test_a_hostile_url_is_refused(url: str, tmp_path: Path) -> None:
    source = HttpReferences(max_bytes=1000, max_pixels=1000, timeout_seconds=5)

    with pytest.raises(ReferenceRefused) as caught:
        source.fetch(Reference(url=url), tmp_path, "single")

    assert not caught.value.is_transient


def test_a_blob_url_is_explained_to_the_one_who_sent_it(tmp_path: Path) -> None:
    source = HttpReferences(max_bytes=1000, max_pixels=1000, timeout_seconds=5)

    with pytest.raises(ReferenceRefused, match=r"only inside the browser that made it; upload the image first"):
        source.fetch(Reference(url="blob:https://app.example/1c8b"), tmp_path, "single")


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "1.1.1.1", "2606:4700:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]
)
def test_a_public_address_is_accepted(address: str) -> None:
    assert is_public(ip_address(address))


@given(st.ip_addresses(v=4))
def test_an_ipv6_spelling_of_an_ipv4_address_is_as_public_as_that(address: IPv4Address) -> None:
    for prefix in (0xFFFF << 32, 0x64FF9B << 96):
        assert is_public(IPv6Address(prefix | int(address))) == is_public(address)


@given(st.ip_addresses())
def test_nothing_that_the_library_calls_private_is_public(address: IPv4Address | IPv6Address) -> None:
    if is_public(address) and not (isinstance(address, IPv6Address) and int(address) >> 96 in (0, 0x64FF9B)):
        assert address.is_global
        assert not address.is_multicast
        assert not address.is_reserved


@pytest.mark.parametrize(
    "addresses",
    [["8.8.8.8", "127.0.0.1"], ["10.0.0.1", "8.8.8.8"], ["8.8.8.8", "fe80::1%eth0"], ["8.8.8.8", "nonsense"]],
)
def test_one_closed_address_among_open_ones_closes_the_host(addresses: list[str], tmp_path: Path) -> None:
    resolver, _ = answering(addresses)
    source = HttpReferences(max_bytes=1000, max_pixels=1000, timeout_seconds=5, resolver=resolver)

    with pytest.raises(ReferenceRefused, match="not on the public internet"):
        source.fetch(Reference(url="http://mixed.example/"), tmp_path, "single")


def test_the_connection_goes_to_the_address_that_was_vetted(files: FileServer, tmp_path: Path) -> None:
    # Given a name server that changes its mind after the first question
    resolver, asked = answering(["127.0.0.1"], ["192.0.2.1"])

    source = source_for(files, allowed_hosts=["images.example"], resolver=resolver)
    source.fetch(Reference(url=f"http://images.example:{files.port}/picture.png"), tmp_path, "single")

    # Then there was no second question, and the request still names the host
    assert asked == ["images.example"]
    assert files.requests[0].headers["host"] == f"images.example:{files.port}"


def test_a_name_that_rebinds_between_two_hops_is_refused(files: FileServer, tmp_path: Path) -> None:
    # Given a host that is vouched for, and leads to one that resolves to this machine
    files.files["/go"] = Answer.redirect(f"http://rebound.example:{files.port}/picture.png")
    resolver, asked = answering(["127.0.0.1"])

    source = source_for(files, allowed_hosts=["first.example"], resolver=resolver)
    with pytest.raises(ReferenceRefused, match=r"rebound\.example"):
        source.fetch(Reference(url=f"http://first.example:{files.port}/go"), tmp_path, "single")

    assert asked == ["first.example", "rebound.example"]
    assert [request.path for request in files.requests] == ["/go"]


def test_a_host_that_is_allowed_on_one_port_is_closed_on_others(files: FileServer, tmp_path: Path) -> None:
    with FileServer({}) as other, pytest.raises(ReferenceRefused):
        source_for(other).fetch(Reference(url=f"{files.url}/picture.png"), tmp_path, "single")

    assert not files.requests


@pytest.mark.parametrize(
    ("allowed", "host", "port"),
    [
        ("Images.Example", "images.example", 80),
        ("images.example:8080", "IMAGES.example.", 8080),
        ("[::1]:8080", "::1", 8080),
        ("[::1]", "[::1]", 1),
        ("::1", "::1", 1),
    ],
)
def test_an_allowed_host_is_known_however_it_is_spelled(allowed: str, host: str, port: int) -> None:
    assert AddressPolicy.allowing([allowed]).allows_host(host, port)


@pytest.mark.parametrize("host", ["evil-images.example", "images.example.evil", "example", "a.images.example"])
def test_an_allowed_host_vouches_for_itself_only(host: str) -> None:
    assert not AddressPolicy.allowing(["images.example"]).allows_host(host, 80)


@given(st.text(max_size=60), st.sampled_from(["http://", "https://", "http:", "HTTP://", ""]))
def test_any_text_is_refused_or_a_plain_http_url(text: str, start: str) -> None:
    try:
        parts = check_url(start + text)
    except ReferenceRefused:
        return
    assert parts.scheme in ("http", "https")
    assert parts.host
    assert parts.auth is None
    assert "%" not in parts.host


@given(st.text(max_size=40), st.text(alphabet="abcdef0123456789", min_size=8, max_size=20))
def test_a_shown_url_has_no_query_and_no_password(path: str, token: str) -> None:
    secret = f"SECRET{token}"
    before_query = path.replace("?", "").replace("#", "")
    assert secret not in shown_url(f"https://user:{secret}@images.example/{before_query}?token={secret}#{secret}")
    assert len(shown_url("https://images.example/" + path * 50)) < 150


# -- redirects


def test_five_redirects_are_followed_and_six_are_not(files: FileServer, tmp_path: Path) -> None:
    for hop in range(1, 7):
        files.files[f"/{hop}"] = Answer.redirect(f"/{hop - 1}" if hop > 1 else "picture.png", status=301 + hop % 2)

    error = refusal_of(files, "/6", tmp_path)
    assert isinstance(error, ReferenceUnavailable)
    assert not error.is_transient
    assert "more than 5 times" in str(error)

    assert fetch(files, "/5", tmp_path).width == 40


@pytest.mark.parametrize(
    "location",
    [
        "http://169.254.169.254/latest/meta-data/",
        "http://127.0.0.1:1/",
        "http://[::ffff:127.0.0.1]:1/",
        "//localhost:1/a.png",
        "file:///etc/passwd",
        "http://user@127.0.0.1/",
        "blob:x",
        "gopher://x/",
    ],
)
def test_a_redirect_is_under_the_rules_of_a_first_request(location: str, files: FileServer, tmp_path: Path) -> None:
    files.files["/go"] = Answer.redirect(location)

    assert isinstance(refusal_of(files, "/go", tmp_path), ReferenceRefused)


# -- limits


@pytest.mark.parametrize(
    "answer",
    [
        Answer(body=b"\x89PNG" + bytes(3_000_000)),
        Answer(body=b"\x89PNG" + bytes(3_000_000), is_length_absent=True),
        Answer(body=b"\x89PNG", content_length=10**15),
    ],
    ids=["declared", "undeclared", "declared and never sent"],
)
def test_a_file_over_the_limit_is_not_read_to_its_end(answer: Answer, files: FileServer, tmp_path: Path) -> None:
    files.files["/large"] = answer

    error = refusal_of(files, "/large", tmp_path)

    assert isinstance(error, ReferenceInvalid)
    assert "larger than 2 MB" in str(error)


def test_a_length_that_is_too_short_cuts_the_image(files: FileServer, tmp_path: Path, picture: bytes) -> None:
    files.files["/short"] = Answer(body=picture, content_length=len(picture) - 30)

    assert isinstance(refusal_of(files, "/short", tmp_path), ReferenceInvalid)


def test_a_connection_that_breaks_off_is_worth_another_try(files: FileServer, tmp_path: Path, picture: bytes) -> None:
    files.files["/cut"] = Answer(body=picture, cut_after_bytes=50)

    assert isinstance(refusal_of(files, "/cut", tmp_path), ReferenceServerFailed)


@pytest.mark.parametrize(
    "answer",
    [
        Answer(body=bytes(5000), piece_bytes=1, piece_delay_seconds=0.05),
        Answer(body=bytes(5000), piece_bytes=1, piece_delay_seconds=0.05, is_length_absent=True),
        Answer(body=bytes(50), piece_bytes=1, piece_delay_seconds=0.05, is_head_slow=True),
        Answer(delay_seconds=20),
        Answer(status=302, headers={"Location": "/slow"}, delay_seconds=0.3),
    ],
    ids=["slow body", "slow endless body", "slow head", "silence", "slow redirects"],
)
def test_a_slow_server_gets_the_time_limit_and_no_more(answer: Answer, files: FileServer, tmp_path: Path) -> None:
    files.files["/slow"] = answer
    began = time.monotonic()

    error = refusal_of(files, "/slow", tmp_path, timeout_seconds=0.4)

    assert time.monotonic() - began < 2
    assert isinstance(error, ReferenceServerFailed)
    assert error.is_transient
    assert "within 0.4 s" in str(error)


def test_a_slow_name_server_gets_the_time_limit_and_no_more(files: FileServer, tmp_path: Path) -> None:
    def resolver(host: str, port: int) -> Sequence[str]:
        time.sleep(3)
        return ["127.0.0.1"]

    began = time.monotonic()
    error = refusal_of(files, "/picture.png", tmp_path, timeout_seconds=0.3, resolver=resolver)

    assert time.monotonic() - began < 2
    assert isinstance(error, ReferenceServerFailed)


def test_a_gzip_bomb_is_refused_unopened(files: FileServer, tmp_path: Path) -> None:
    files.files["/bomb"] = Answer(body=compress(bytes(50_000_000)), headers={"Content-Encoding": "gzip"})

    error = refusal_of(files, "/bomb", tmp_path)

    assert isinstance(error, ReferenceInvalid)
    assert "compressed (gzip)" in str(error)


# -- what the server says


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
def test_an_image_that_is_gone_is_gone_for_good(status: int, files: FileServer, tmp_path: Path) -> None:
    files.files["/gone"] = Answer(status=status, body=b'{"error":"InvalidJWT"}')

    error = refusal_of(files, "/gone", tmp_path)

    assert isinstance(error, ReferenceUnavailable)
    assert not error.is_transient
    assert "is gone, or its link has expired" in str(error)
    assert f"{files.url}/gone" in str(error)


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504, 544])
def test_a_server_in_trouble_may_have_the_image_later(status: int, files: FileServer, tmp_path: Path) -> None:
    files.files["/busy"] = Answer(status=status)

    error = refusal_of(files, "/busy", tmp_path)

    assert isinstance(error, ReferenceServerFailed)
    assert error.is_transient


@pytest.mark.parametrize("status", [204, 206, 300, 302, 304, 405, 418, 451])
def test_any_other_answer_is_no_image(status: int, files: FileServer, tmp_path: Path) -> None:
    files.files["/odd"] = Answer(status=status)

    error = refusal_of(files, "/odd", tmp_path)

    assert isinstance(error, ReferenceUnavailable)
    assert not error.is_transient


def test_a_closed_port_may_be_open_later(files: FileServer, tmp_path: Path) -> None:
    with FileServer({}) as other:
        closed = other.host
    with pytest.raises(ReferenceServerFailed):
        source_for(files, allowed_hosts=[closed]).fetch(Reference(url=f"http://{closed}/a"), tmp_path, "single")


def test_a_host_that_does_not_exist_is_an_error_of_the_sender(tmp_path: Path) -> None:
    resolver, _ = answering([])
    source = HttpReferences(max_bytes=1000, max_pixels=1000, timeout_seconds=5, resolver=resolver)

    with pytest.raises(ReferenceUnavailable, match="does not exist") as caught:
        source.fetch(Reference(url=f"https://nowhere.example/a.png?token={TOKEN}"), tmp_path, "single")

    assert not caught.value.is_transient
    assert TOKEN not in str(caught.value)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A key and a certificate for images.example, signed by itself."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs the openssl command to make a certificate")
    file = tmp_path_factory.mktemp("tls") / "images.pem"
    command = [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-days", "2", "-subj", "/CN=images.example", "-addext", "subjectAltName=DNS:images.example"]
    subprocess.run([*command, "-keyout", str(file), "-out", f"{file}.crt"], check=True, capture_output=True)
    file.write_text(file.read_text() + Path(f"{file}.crt").read_text())
    return file


def test_tls_is_checked_against_the_name_and_not_the_pinned_address(
    certificate: Path, picture: bytes, tmp_path: Path
) -> None:
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate)
    names: list[str | None] = []
    tls.sni_callback = lambda _socket, name, _context: names.append(name)
    resolver, _ = answering(["127.0.0.1"])
    with FileServer({"/a.png": picture}, tls=tls) as server:
        hosts = ["images.example", "other.example"]
        source = source_for(server, allowed_hosts=hosts, resolver=resolver, ca_bundle=certificate)

        assert (
            source.fetch(Reference(url=f"https://images.example:{server.port}/a.png"), tmp_path, "single").width == 40
        )
        with pytest.raises(ReferenceUnavailable, match="no valid certificate") as caught:
            source.fetch(Reference(url=f"https://other.example:{server.port}/a.png"), tmp_path, "single")

    assert not caught.value.is_transient
    assert names == hosts


# -- what a decoded reference looks like


def test_an_exif_orientation_is_applied_and_the_exif_is_dropped(tmp_path: Path) -> None:
    lying = Image.new("RGB", (40, 20), "red")
    lying.paste("blue", (20, 0, 40, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    exif[0x010F] = "a camera"

    upright = decoded(encoded(lying, "JPEG", exif=exif, quality=95, comment=b"a comment"), tmp_path)

    assert upright.size == (20, 40)
    top, bottom = upright.getpixel((10, 5)), upright.getpixel((10, 35))
    assert isinstance(top, tuple)
    assert isinstance(bottom, tuple)
    assert top[0] > 240
    assert bottom[2] > 240
    assert not upright.info
    assert not dict(upright.getexif())


@pytest.mark.parametrize(
    ("image", "kind", "expected"),
    [
        (Image.new("RGBA", (8, 8), (255, 0, 0, 0)), "PNG", (255, 255, 255)),
        (Image.new("RGBA", (8, 8), (0, 0, 0, 128)), "PNG", (127, 127, 127)),
        (Image.new("RGBA", (8, 8), (255, 0, 0, 0)), "WEBP", (255, 255, 255)),
        (Image.new("LA", (8, 8), (0, 0)), "PNG", (255, 255, 255)),
        (Image.new("L", (8, 8), 100), "PNG", (100, 100, 100)),
        (Image.new("1", (8, 8), 1), "PNG", (255, 255, 255)),
        (Image.new("I;16", (8, 8), 0x8000), "PNG", (128, 128, 128)),
        (Image.new("P", (8, 8), 0), "PNG", (0, 0, 0)),
        (Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "JPEG", (255, 255, 255)),
        (Image.new("RGB", (1, 1), (1, 2, 3)), "PNG", (1, 2, 3)),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else str(value).replace(" ", ""),
)
def test_every_mode_becomes_rgb_over_white(
    image: Image.Image, kind: str, expected: tuple[int, ...], tmp_path: Path
) -> None:
    pixel = decoded(encoded(image, kind), tmp_path).getpixel((0, 0))

    assert isinstance(pixel, tuple)
    assert all(abs(got - wanted) <= 1 for got, wanted in zip(pixel, expected, strict=True))


def test_a_transparent_palette_entry_becomes_white(tmp_path: Path) -> None:
    image = Image.new("P", (8, 8), 3)
    image.putpalette([0, 0, 0, 9, 9, 9, 255, 0, 0, 0, 255, 0])

    assert decoded(encoded(image, "PNG", transparency=3), tmp_path).getpixel((0, 0)) == (255, 255, 255)


def test_a_profile_that_changes_nothing_or_cannot_be_used_changes_nothing(tmp_path: Path) -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    of_another_model = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    image = Image.new("RGB", (8, 8), (200, 100, 50))

    for bytes_of_profile in (srgb, of_another_model, b"no profile at all"):
        pixel = decoded(encoded(image, "PNG", icc_profile=bytes_of_profile), tmp_path).getpixel((0, 0))
        assert isinstance(pixel, tuple)
        assert all(abs(got - wanted) <= 1 for got, wanted in zip(pixel, (200, 100, 50), strict=True))


def test_colours_of_another_profile_are_converted(tmp_path: Path) -> None:
    # Given an sRGB profile whose red and blue primaries have changed places
    srgb = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, blue = srgb.index(b"rXYZ"), srgb.index(b"bXYZ")
    srgb[red : red + 4], srgb[blue : blue + 4] = b"bXYZ", b"rXYZ"

    image = decoded(encoded(Image.new("RGB", (8, 8), "red"), "PNG", icc_profile=bytes(srgb)), tmp_path)

    # Then its red is what we call blue
    pixel = image.getpixel((0, 0))
    assert isinstance(pixel, tuple)
    assert pixel[2] > 250
    assert pixel[0] < 5
    assert not image.info


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_the_first_frame_of_an_animation_counts(kind: str, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue")]
    animated = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=100)

    pixel = decoded(animated, tmp_path).getpixel((8, 8))

    assert isinstance(pixel, tuple)
    assert pixel[0] > 240
    assert pixel[1] < 20


# -- what is no image


def png_of_size(width: int, height: int, body: bytes = b"") -> bytes:
    """A PNG that claims a size, with ``body`` for its compressed pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def unusable(content: bytes, directory: Path) -> str:
    with FileServer({"/a": content}) as server:
        error = refusal_of(server, "/a", directory)
    assert isinstance(error, ReferenceInvalid)
    return str(error)


def test_a_png_of_50000_by_50000_pixels_is_refused_by_its_header(tmp_path: Path) -> None:
    content = png_of_size(50_000, 50_000, zlib.compress(bytes(1_000_000)))
    began = time.monotonic()

    assert "it is 50000x50000 pixels; at most 4 megapixels are taken" in unusable(content, tmp_path)

    assert time.monotonic() - began < 2


def gif_of(frames: int) -> bytes:
    pictures = [Image.new("P", (4, 4), index % 8) for index in range(2)]
    two = encoded(pictures[0], "GIF", save_all=True, append_images=pictures[1:], duration=10)
    first_frame = two.index(b"\x21\xf9")
    return two[:first_frame] + two[first_frame:-1] * (frames // 2) + b";"


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (gif_of(20_000), "a GIF"),
        (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', "an SVG drawing"),
        (b"<!DOCTYPE html><html><body>Log in</body></html>", "an HTML or XML page"),
        (b"\n  <html></html>", "an HTML or XML page"),
        (b'{"error":"not found"}', "a JSON document"),
        (b"%PDF-1.7", "a PDF"),
        (b"%!PS-Adobe-3.0 EPSF-3.0", "not a PNG, JPEG or WebP"),
        (b"SIMPLE  =                    T", "not a PNG, JPEG or WebP"),
        (b"\xff\xfe\x00\x10\x00\x10\x00", "not a PNG, JPEG or WebP"),
        (b"\0\0\0\x1cftypavif\0\0\0\0", "AVIF or HEIC"),
        (b"II*\0" + bytes(100), "a TIFF image"),
        (b"BM" + bytes(100), "a BMP image"),
        (compress(b"x", mtime=0), "a gzip archive"),
        (b"", "empty"),
        (b"\0" * 5000, "not a PNG, JPEG or WebP"),
        (b"hello", "not a PNG, JPEG or WebP"),
        (b"\x89PNG\r\n\x1a\n", "not a PNG, JPEG or WebP"),
        (b"\xff\xd8\xff\xe0" + bytes(50), "JPEG or WebP"),
        (b"RIFF\x10\0\0\0WEBPVP8 ", "JPEG or WebP"),
        (png_of_size(0, 10), "JPEG or WebP"),
        (png_of_size(100, 100, b"not deflate"), "cannot be decoded"),
        (png_of_size(100, 100, zlib.compress(bytes(10))), "cannot be decoded"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_is_no_image_is_called_by_its_name(content: bytes, named: str, tmp_path: Path) -> None:
    message = unusable(content, tmp_path)

    assert named in message
    assert "send a PNG, JPEG or WebP image" in message


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_half_an_image_is_no_image(kind: str, tmp_path: Path) -> None:
    whole = encoded(Image.effect_noise((200, 200), 90).convert("RGB"), kind)

    unusable(whole[: len(whole) // 2], tmp_path)


@given(st.binary(max_size=300), st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF\0\0\0\0WEBP"]))
def test_no_bytes_bring_the_decoder_to_anything_but_a_reason(content: bytes, start: bytes) -> None:
    # In this process, since a child for each example would take a minute.
    source = io.BytesIO(start + content)
    try:
        outcome = decode_image.decode(source, io.BytesIO(), 1_000_000)
    except (OSError, SyntaxError, ValueError, EOFError, struct.error):
        return
    assert "width" in outcome or "error" in outcome


# -- the decoder's own process


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize(
    ("width", "height"), [(4000, 2500), pytest.param(8660, 5773, marks=pytest.mark.slow)], ids=["10 MP", "50 MP"]
)
def test_the_decoders_limits_have_room_for_the_largest_image(
    kind: str, width: int, height: int, tmp_path: Path
) -> None:
    alpha = {"mode": "RGBA", "color": (9, 90, 200, 255)} if kind == "PNG" else {"mode": "RGB", "color": (9, 90, 200)}
    source = tmp_path / "large"
    options: dict[str, Any] = {"PNG": {"compress_level": 1}, "WEBP": {"method": 0}}.get(kind, {"progressive": True})
    Image.new(size=(width, height), **alpha).save(source, kind, **options)  # type: ignore[arg-type]

    finished = subprocess.run(
        [sys.executable, "-P", decode_image.__file__, str(source), str(tmp_path / "out.png"), str(width * height)],
        capture_output=True,
        check=True,
    )

    assert json.loads(finished.stdout) == {"width": width, "height": height, "format": kind}


@pytest.mark.parametrize(
    ("greed", "sign"),
    [("bytearray(decode_image.memory_limit(1000))", b"MemoryError"), ("open(out, 'wb').write(bytes(2**22))", b"Error")],
)
def test_a_decoder_that_wants_too_much_dies(greed: str, sign: bytes, tmp_path: Path) -> None:
    program = (
        "import importlib.util, sys\n"
        "spec = importlib.util.spec_from_file_location('decode_image', sys.argv[1])\n"
        "decode_image = importlib.util.module_from_spec(spec); spec.loader.exec_module(decode_image)\n"
        f"out = sys.argv[2]; decode_image.limit_resources(1000); {greed}\n"
    )

    finished = subprocess.run(
        [sys.executable, "-c", program, decode_image.__file__, str(tmp_path / "out")], capture_output=True, check=False
    )

    assert finished.returncode != 0
    assert sign in finished.stderr


def test_the_decoder_sees_no_secret_of_the_worker(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, picture: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given a module that every Python loads first, which writes down its environment
    spy = tmp_path_factory.mktemp("spy")
    seen = spy / "seen.json"
    (spy / "sitecustomize.py").write_text(
        f"import json, os, pathlib\npathlib.Path({str(seen)!r}).write_text(json.dumps(dict(os.environ)))\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(spy))
    monkeypatch.setenv("SUPABASE_SERVICE_KEY", "canary")
    monkeypatch.setenv("REDIS_URL", "redis://:canary@localhost")

    decoded(picture, tmp_path)

    assert "canary" not in seen.read_text()


def test_a_decoder_that_does_not_start_is_no_fault_of_the_image(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, picture: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path_factory.mktemp("broken")
    (broken / "PIL.py").write_text("raise ImportError('libjpeg is missing')\n")
    monkeypatch.setenv("PYTHONPATH", str(broken))

    with pytest.raises(InternalError, match="libjpeg is missing"):
        decoded(picture, tmp_path)


# -- the double


def test_the_stub_gives_what_it_was_told(picture: bytes, tmp_path: Path) -> None:
    gone = ReferenceUnavailable("gone")
    stored = tmp_path / "stored"
    stored.write_bytes(picture)
    stub = StubReferences({"https://a.example/bytes": picture, "https://a.example/path": stored, "blob:x": gone})
    out = tmp_path / "out"
    out.mkdir()

    for name in ("bytes", "path"):
        fetched = stub.fetch(Reference(url=f"https://a.example/{name}"), out, name)
        assert (fetched.path, fetched.width) == (out / f"{name}.png", 40)
    with pytest.raises(ReferenceUnavailable) as caught:
        stub.fetch(Reference(url="blob:x"), out, "single")
    assert caught.value is gone
    with pytest.raises(ReferenceUnavailable, match="give it an answer"):
        stub.fetch(Reference(url="https://a.example/unknown"), out, "single")
