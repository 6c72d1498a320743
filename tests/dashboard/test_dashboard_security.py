"""Who gets in, who changes what, and what a hostile job can do to those who look on."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import requests

from ourvidz_core.cli.main import main
from ourvidz_core.delivery.board import FinishedJob, StoredAsset
from ourvidz_core.wire.callbacks import JobStatus
from tests.dashboard.scenes import QUEUES, USER, Scene
from tests.dashboard.test_dashboard import overview

TOKEN = "CANARY-token-of-the-dashboard"
BEARER = {"Authorization": f"Bearer {TOKEN}"}


def ask(scene: Scene, path: str, **headers: str) -> tuple[int, str]:
    """Status and body of exactly that path, which no client has tidied up."""
    parts = urlsplit(scene.url)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=5)
    connection.putrequest("GET", path, skip_host="Host" in headers)
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    said = answer.status, answer.read().decode("utf-8", "replace")
    connection.close()
    return said


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0", "192.0.2.7:8765", "example.test:80", ":80"])
def test_others_than_this_machine_are_not_listened_to_without_a_token(
    address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["dashboard", "--listen", address]) == 2
    assert "--listen" in capsys.readouterr().err


def test_a_token_that_can_be_guessed_is_not_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "token").write_text("hunter2\n")
    assert main(["dashboard", "--token-file", str(tmp_path / "token")]) == 2
    said = capsys.readouterr().err
    assert "7 characters" in said
    assert "hunter2" not in said


def test_a_name_that_was_led_to_this_machine_gets_nothing(scene_of: Callable[..., Scene]) -> None:
    scene = scene_of(hosts=["Render.Example.test"])
    for name in ("localhost", "127.0.0.1:8765", "[::1]:8765", "render.example.test", "192.0.2.7"):
        assert ask(scene, "/api/overview", Host=name)[0] == 200, name
    for name in (
        "attacker.test",
        "attacker.test:8765",
        "127.0.0.1.attacker.test",
        "localhost@attacker.test",
        "",
        "[::1",
    ):
        for path in ("/", "/api/overview", "/login", "/dashboard.js"):
            assert ask(scene, path, Host=name)[0] == 421, (name, path)


def test_with_a_token_nothing_is_told_and_nothing_is_changed_without_it(scene_of: Callable[..., Scene]) -> None:
    scene = scene_of(token=TOKEN)
    scene.finish("a", assets=[("image/png", b"png")])
    asset = f"/assets/toys/{USER}/a_0.png"
    for path in ("/api/overview", "/api/events", asset):
        for headers in ({}, {"Authorization": f"Bearer {TOKEN}x"}, {"Cookie": "ourvidz_dashboard=guess"}):
            assert ask(scene, path, **headers)[0] == 401, (path, headers)
    posted = requests.post(f"{scene.url}/api/requeue", json={"queue": QUEUES[0], "letter": "x"}, timeout=5)
    assert posted.status_code == 401
    assert requests.get(scene.url, timeout=5).url == f"{scene.url}/login"
    assert ask(scene, asset, **BEARER) == (200, "png")


def test_a_session_is_a_cookie_that_scripts_cannot_read_and_other_sites_do_not_send(
    scene_of: Callable[..., Scene],
) -> None:
    scene = scene_of(token=TOKEN)
    browser = requests.Session()
    browser.headers["Origin"] = scene.url

    wrong = browser.post(f"{scene.url}/login", data={"token": "wrong"}, timeout=5, allow_redirects=False)
    assert (wrong.headers["location"], dict(browser.cookies)) == ("/login#wrong", {})
    right = browser.post(f"{scene.url}/login", data={"token": TOKEN}, timeout=5, allow_redirects=False)
    assert (right.status_code, right.headers["location"]) == (303, "/")
    assert {"HttpOnly", "SameSite=Strict"} <= set(right.headers["set-cookie"].split("; "))
    assert TOKEN not in right.headers["set-cookie"]
    told = browser.get(f"{scene.url}/api/overview", timeout=5).json()
    assert told["can_log_out"]

    kept = dict(browser.cookies)
    browser.post(f"{scene.url}/logout", timeout=5)
    assert requests.get(f"{scene.url}/api/overview", cookies=kept, timeout=5).status_code == 401


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param({}, id="without the token of the page"),
        pytest.param({"x-csrf-token": "0" * 64}, id="with a guess at it"),
        pytest.param({"x-csrf-token": "right", "Origin": "http://attacker.test"}, id="from another site"),
        pytest.param({"x-csrf-token": "right", "Origin": "http://127.0.0.1:1"}, id="from another port"),
        pytest.param({"x-csrf-token": "right", "Origin": "null"}, id="from a sandbox"),
        pytest.param({"x-csrf-token": "right", "Sec-Fetch-Site": "cross-site"}, id="from what says it is elsewhere"),
    ],
)
def test_another_site_cannot_have_a_dead_letter_run_again(scene: Scene, headers: dict[str, str]) -> None:
    scene.bury(b'{"id": "dead"}', "dead", "why")
    told = overview(scene)
    if headers.get("x-csrf-token") == "right":
        headers = {**headers, "x-csrf-token": told["csrf"]}
    answer = requests.post(
        f"{scene.url}/api/requeue",
        json={"queue": QUEUES[0], "letter": told["dead"][0]["letter"]},
        headers=headers,
        timeout=5,
    )
    assert answer.status_code == 403
    assert (scene.queue.depth(QUEUES[0]).dead, scene.queue.depth(QUEUES[0]).waiting) == (1, 0)


def test_the_page_of_one_session_cannot_change_anything_in_another(scene_of: Callable[..., Scene]) -> None:
    scene = scene_of(token=TOKEN)
    first, second = requests.Session(), requests.Session()
    for browser in (first, second):
        browser.post(f"{scene.url}/login", data={"token": TOKEN}, headers={"Origin": scene.url}, timeout=5)
    csrf = first.get(f"{scene.url}/api/overview", timeout=5).json()["csrf"]
    body = {"queue": QUEUES[0], "letter": "x"}
    statuses = [
        browser.post(f"{scene.url}/api/requeue", json=body, headers={"x-csrf-token": csrf}, timeout=5).status_code
        for browser in (first, second)
    ]
    assert statuses == [409, 403]


def test_no_path_leads_out_of_storage_or_to_what_no_recent_job_left(scene: Scene, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("CANARY")
    scene.finish("a", assets=[("image/png", b"png")])
    toys = scene.root / "toys"
    (toys / USER / "link_0.png").symlink_to(tmp_path / "secret")
    (toys / "away").symlink_to(tmp_path)
    (toys / USER / "other.png").write_text("CANARY of a job that is no longer on the board")
    # Whoever can write to Redis can put any place on the board.
    places = [
        "../secret",
        f"{USER}/../../../secret",
        "/etc/passwd",
        f"{USER}/link_0.png",
        "away/secret",
        f"{USER}/.",
        USER,
    ]
    for path in places:
        asset = StoredAsset(bucket="toys", path=path, media_type="image/png", size_bytes=6)
        scene.board.finished(
            FinishedJob(
                id=path, type="t", status=JobStatus.COMPLETED, finished_at=time.time(), worker="w", assets=(asset,)
            )
        )
    scene.feed.look_again()
    asked = [
        *(f"/assets/toys/{path}" for path in places),
        f"/assets/toys/{USER}/other.png",
        "/assets/toys/%2e%2e/%2e%2e/secret",
        "/assets/..%2f..%2fsecret",
        "/assets/toys/..%5c..%5csecret",
        f"/assets/toys/{USER}%00/a_0.png",
        "/assets/", "/assets/toys", "/../secret", "/static/../server.py", "/dashboard.css/../index.html",
    ]  # fmt: skip
    for path in asked:
        status, said = ask(scene, path)
        assert (status, "CANARY" in said) == (404, False), path
    assert ask(scene, f"/assets/toys/{USER}/a_0.png") == (200, "png")


@pytest.mark.parametrize("media_type", ["text/html", "image/svg+xml", "application/javascript"])
def test_what_could_run_in_a_browser_is_not_shown(scene: Scene, media_type: str) -> None:
    scene.finish("a", assets=[(media_type, b"<script>alert(1)</script>")])
    assert overview(scene)["results"][0]["assets"][0]["address"] is None
    assert ask(scene, f"/assets/toys/{USER}/a_0.{media_type.partition('/')[2]}")[0] == 404


def test_the_page_runs_nothing_that_is_not_its_own_and_previews_run_nothing(scene: Scene) -> None:
    scene.finish("a", assets=[("image/png", b"<script>alert(1)</script>")])
    page = requests.get(scene.url, timeout=5)
    policy = dict(rule.strip().split(" ", 1) for rule in page.headers["content-security-policy"].split(";"))
    assert (policy["default-src"], policy["script-src"], policy["style-src"]) == ("'none'", "'self'", "'self'")
    assert (policy["frame-ancestors"], policy["base-uri"]) == ("'none'", "'none'")
    assert "unsafe" not in str(policy)
    assert "<script>" not in page.text
    preview = requests.get(f"{scene.url}/assets/toys/{USER}/a_0.png", timeout=5)
    assert preview.headers["content-security-policy"] == "default-src 'none'; sandbox"
    assert (preview.headers["content-type"], preview.headers["x-content-type-options"]) == ("image/png", "nosniff")
    assert preview.headers["cross-origin-resource-policy"] == "same-origin"


def test_words_of_a_job_cannot_forge_an_event_of_the_stream(scene: Scene) -> None:
    hostile = 'x\n\nevent: trouble\ndata: "forged"\r\n\r\n</script>\u2028\x00'
    scene.fail(hostile, hostile)
    with requests.get(f"{scene.url}/api/events", stream=True, timeout=5) as answer:
        received = b""
        while b"event: trouble\n" not in received or not received.endswith(b"\n\n"):
            received += answer.raw.read1(65536)
    events = [event.split(b"\ndata: ", 1) for event in received.decode().encode().strip().split(b"\n\n")]
    told = {name.removeprefix(b"event: ").decode(): json.loads(data) for name, data in events}
    assert (told["failures"][0]["id"], told["trouble"]) == (hostile, "")
    assert received.count(b"\nevent: trouble\n") == 1


def test_a_request_without_an_end_and_one_that_is_too_long_are_refused(scene: Scene) -> None:
    address = f"{scene.url}/api/requeue"
    assert requests.post(address, data=b"x" * 5000, timeout=5).status_code == 413
    assert requests.post(address, data=iter([b"x"]), timeout=5).status_code == 411
    for body in (b"", b"[]", b"{", b'{"queue": 1, "letter": []}', b"[" * 4000):
        headers = {"x-csrf-token": overview(scene)["csrf"]}
        assert requests.post(address, data=body, headers=headers, timeout=5).status_code in (400, 404), body
    for method in ("PUT", "DELETE", "OPTIONS", "TRACE"):
        assert requests.request(method, scene.url, timeout=5).status_code == 501


def test_whoever_drips_a_request_or_opens_too_many_pages_does_not_keep_others_out(
    scene_of: Callable[..., Scene],
) -> None:
    scene = scene_of(request_seconds=0.8)
    parts = urlsplit(scene.url)
    with socket.create_connection((parts.hostname, parts.port), timeout=5) as dripping:
        begun = time.monotonic()
        with contextlib.suppress(ConnectionError):
            while time.monotonic() - begun < 4:
                dripping.sendall(b"G")
                time.sleep(0.1)
        assert 0.7 < time.monotonic() - begun < 3
    streams = [requests.get(f"{scene.url}/api/events", stream=True, timeout=5) for _ in range(17)]
    assert [answer.status_code for answer in streams] == [200] * 16 + [503]
    assert ask(scene, "/api/overview")[0] == 200
    for answer in streams:
        answer.close()
