"""Previews of running jobs, asked over HTTP: shown while the job runs, to whom the page is, and as pictures only."""

from __future__ import annotations

import io
from collections.abc import Callable
from urllib.parse import urlsplit

import requests

from ourvidz_core.delivery.board import RunningJob
from tests.dashboard.scenes import Scene, picture
from tests.dashboard.test_dashboard import overview

TOKEN = "CANARY-token-of-the-dashboard"
ODD_ID = "../a/b?c=<img>"


def jpeg() -> bytes:
    buffer = io.BytesIO()
    picture(1, (128, 128)).save(buffer, "JPEG")
    return buffer.getvalue()


def running(job_id: str, **changes: object) -> RunningJob:
    return RunningJob(id=job_id, type="sdxl_image_fast", attempt=1, stage="denoise", claimed_at=1.0, **changes)


def test_a_running_job_shows_its_preview_until_it_ends(scene: Scene) -> None:
    content = jpeg()
    scene.board.show_preview(ODD_ID, content)
    scene.publish(jobs=(running(ODD_ID, previewed_at=12.5), running("other")))
    (worker,) = overview(scene)["workers"]
    address, none = (job["preview"] for job in worker["jobs"])
    assert none is None

    answer = requests.get(scene.url + address, timeout=5)
    assert (answer.status_code, answer.content) == (200, content)
    assert answer.headers["content-type"] == "image/jpeg"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["content-security-policy"] == "default-src 'none'; sandbox"

    scene.publish(jobs=(running("other"),))
    scene.feed.look_again()
    assert requests.get(scene.url + address, timeout=5).status_code == 404


def test_what_is_no_picture_is_not_served_whoever_put_it_there(scene: Scene) -> None:
    scene.board.show_preview("a", b"<script>alert(1)</script>")
    scene.publish(jobs=(running("a", previewed_at=1.0),))
    assert requests.get(f"{scene.url}/previews/a", timeout=5).status_code == 404


def test_without_the_token_and_from_another_site_no_preview_is_seen(scene_of: Callable[..., Scene]) -> None:
    scene = scene_of(token=TOKEN)
    scene.board.show_preview("a", jpeg())
    scene.publish(jobs=(running("a", previewed_at=1.0),))
    bearer = {"Authorization": f"Bearer {TOKEN}"}
    for headers, status in (
        ({}, 401),
        (bearer, 200),
        ({**bearer, "Sec-Fetch-Site": "cross-site"}, 403),
        ({**bearer, "Host": f"attacker.test:{urlsplit(scene.url).port}"}, 421),
    ):
        assert requests.get(f"{scene.url}/previews/a", headers=headers, timeout=5).status_code == status
