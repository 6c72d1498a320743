"""The whole of it in a real browser: a worker does a job, and the page shows it run, finish and play."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import redis
from attrs import frozen

from ourvidz_core.delivery.embedded import EmbeddedRedis
from ourvidz_core.delivery.queue import DeadLetter
from ourvidz_core.delivery.redis_queue import RedisQueue
from ourvidz_core.delivery.rows import encode_dead_letter
from ourvidz_core.testing.distributions import make_distribution
from tests.dashboard.scenes import chromium, mp4
from tests.deployment import USER, environment_without_settings

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

TOKEN = "CANARY-token-of-the-dashboard"
QUEUE = "film_queue"
HOSTILE = "<img src=x onerror='window.owned = true'><script>window.owned = true</script>"
FILMS = """
import os, time
from ourvidz_core import Artifact, Generation, JobType, hookimpl

@hookimpl
def register_job_types():
    yield JobType(name="film", queue="film_queue", content_type="video", timeout_seconds=60)

@hookimpl
def generate(job, context):
    if "hostile" in job.id:
        raise RuntimeError(os.environ["HOSTILE"])
    for step in range(30):
        context.progress(step + 1, 30, stage="denoise")
        time.sleep(0.12)
    path = context.output_path("mp4")
    path.write_bytes(open(os.environ["FILM"], "rb").read())
    return Generation(artifacts=(Artifact(path=path, media_type="video/mp4"),))
"""


@frozen
class Site:
    """A dashboard that the command serves, and the queue of the worker that it watches."""

    url: str
    redis_url: str
    queue: RedisQueue
    screenshots: Path

    def push(self, job_id: str) -> None:
        self.queue.push(QUEUE, _message(job_id))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install --group browser"
    )
    with sync_api.sync_playwright() as playwright:
        program = chromium()
        if program is None and not Path(playwright.chromium.executable_path).exists():
            pytest.skip("there is no Chromium: apt install chromium, playwright install chromium, or set CHROMIUM")
        made = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture(scope="module")
def site(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    root = tmp_path_factory.mktemp("site")
    make_distribution(root / "site", "acme-films", FILMS)
    (root / "film.mp4").write_bytes(mp4(2, frames=36))
    (root / "token").write_text(TOKEN + "\n")
    server = EmbeddedRedis(root / "redis")
    queue = RedisQueue.connect(server.address)
    environ = environment_without_settings() | {
        "PYTHONPATH": str(root / "site"),
        "FILM": str(root / "film.mp4"),
        "HOSTILE": HOSTILE,
        "REDIS_URL": server.address,
        "OURVIDZ_ALLOW_PLUGINS": "acme-films",
        "OURVIDZ_STATE_DIR": str(root / "state"),
        "OURVIDZ_WORK_DIR": str(root / "work"),
        "OURVIDZ_WORKER_NAME": "gpu-1",
        "OURVIDZ_HEALTH_ADDRESS": "off",
        "OURVIDZ_DEVICE": "cpu",
        "OURVIDZ_CALLBACK_MIN_AGE_SECONDS": "0",
        "OURVIDZ_MIN_FREE_DISK_MB": "0",
    }
    command = [sys.executable, "-m", "ourvidz_core"]
    log = (root / "log").open("wb")
    worker = subprocess.Popen([*command, "worker", "--no-checks"], env=environ, stderr=log)
    served = subprocess.Popen(
        [*command, "dashboard", "--listen", "127.0.0.1:0", "--token-file", str(root / "token")],
        env={**environ, "PYTHONUNBUFFERED": "1"}, stdout=subprocess.PIPE, stderr=log, text=True,
    )  # fmt: skip
    said = served.stdout.readline()
    url = said.split(" is at ")[1].split(" ")[0].rstrip("/")
    yield Site(url, server.address, queue, Path(os.environ.get("SCREENSHOTS", root)))
    for process in (served, worker):
        process.terminate()
        assert process.wait(timeout=30) == 0, (root / "log").read_text()
    queue.close()
    server.close()


@pytest.fixture
def page(browser: Browser, site: Site) -> Iterator[Page]:
    """The page of a visitor who has signed in with the keyboard; it must not have met an error at the end."""
    context = browser.new_context(viewport={"width": 1280, "height": 1400})
    context.set_default_timeout(15_000)
    errors: list[str] = []
    page = context.new_page()
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None)
    page.goto(site.url)
    assert page.url.endswith("/login")
    page.locator("#token:focus").wait_for()
    page.keyboard.type(TOKEN)
    page.keyboard.press("Enter")
    page.wait_for_selector("[data-state=live]")
    yield page
    context.close()
    assert errors == []


def test_a_job_is_seen_to_run_to_finish_and_its_video_to_play(page: Page, site: Site) -> None:
    site.push("job-seen")
    card = page.locator("#running li", has_text="job-seen")
    card.wait_for(timeout=30_000)
    steps: list[float] = []
    deadline = time.monotonic() + 30
    while card.count() and time.monotonic() < deadline:
        value: Any = page.evaluate("document.querySelector('#running progress[value]')?.value")
        if value and (not steps or value > steps[-1]):
            steps.append(value)
        page.wait_for_timeout(100)
    assert len(steps) >= 3, "its progress was seen to move"

    result = page.locator("#results li", has_text="job-seen")
    result.wait_for(timeout=10_000)
    video = result.locator("video")
    video.scroll_into_view_if_needed()
    # The page's policy forbids what the browser's driver would wait with.
    deadline = time.monotonic() + 20
    while not video.evaluate("film => film.currentTime > 0.3"):
        assert time.monotonic() < deadline, "the video does not play"
        page.wait_for_timeout(100)
    facts: Any = video.evaluate("film => [film.videoWidth, film.duration, film.paused, film.error]")
    assert facts == [320, pytest.approx(3.0, abs=0.2), False, None]
    assert page.locator("#tile-completed").inner_text() == "1"
    assert page.locator("#announcements").inner_text() == "film job-seen completed"
    page.screenshot(path=site.screenshots / "finished.png", full_page=True)


def test_a_dead_letter_is_run_again_with_the_keyboard(page: Page, site: Site) -> None:
    raw = _message("job-dead")
    letter = DeadLetter(
        raw=raw, job_id="job-dead", error_type="ModelUnavailable", reason=HOSTILE,
        buried_at="2026-01-01T00:00:00+00:00", worker="w",
    )  # fmt: skip
    with redis.Redis.from_url(site.redis_url) as client:  # past the worker, which would take the job first
        client.lpush(f"{{{QUEUE}}}:dead", encode_dead_letter(letter))
    button = page.get_by_role("button", name="Run job-dead again")
    button.wait_for(timeout=10_000)
    for _ in range(60):
        page.keyboard.press("Tab")
        if button.evaluate("button => button === document.activeElement"):
            break
    assert button.evaluate("button => getComputedStyle(button).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    page.locator("#dead li").wait_for(state="detached", timeout=10_000)
    assert page.evaluate("document.activeElement.id") == "dead-title"
    page.locator("#results li", has_text="job-dead").wait_for(timeout=30_000)


def test_hostile_words_are_shown_and_do_nothing(page: Page, site: Site) -> None:
    site.push("job-hostile")
    failure = page.locator("#failures li", has_text="job-hostile")
    failure.wait_for(timeout=30_000)
    assert HOSTILE in failure.inner_text()
    assert page.locator("#failures img, #failures script, #dead img").count() == 0
    assert page.evaluate("window.owned") is None


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_nothing_is_wider_than_the_screen_and_buttons_can_be_hit(
    page: Page, site: Site, scheme: str
) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    page.emulate_media(color_scheme=scheme)
    page.wait_for_timeout(300)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    heights: Any = page.eval_on_selector_all(
        "button:not([hidden])", "all => all.map(b => b.getBoundingClientRect().height).filter(h => h)"
    )
    assert heights
    assert min(heights) >= 36
    page.screenshot(path=site.screenshots / f"phone-{scheme}.png", full_page=True)


def _message(job_id: str) -> bytes:
    return json.dumps({"id": job_id, "type": "film", "prompt": "a toy", "user_id": USER}).encode()
