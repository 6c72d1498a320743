"""The deadline holds, whatever the work does."""

from __future__ import annotations

import threading
import time

import pytest
from ourvidz_wan_enhanced.effort import DeadlinePassed, Effort, WorkFailed, finish_in_time

from ourvidz_core.errors import JobCancelled


def test_work_in_time_gives_its_result():
    assert finish_in_time(Effort(5.0), lambda: 42) == 42


def test_work_that_hangs_is_left_alone_at_the_deadline():
    hang, effort = threading.Event(), Effort(0.3)
    started = time.monotonic()
    with pytest.raises(DeadlinePassed):
        finish_in_time(effort, lambda: hang.wait(10.0))
    assert 0.3 <= time.monotonic() - started < 0.5
    assert effort.is_over
    hang.set()


def test_what_the_work_raises_is_the_cause():
    with pytest.raises(WorkFailed, match="ZeroDivisionError") as raised:
        finish_in_time(Effort(5.0), lambda: 1 / 0)
    assert isinstance(raised.value.__cause__, ZeroDivisionError)


def test_a_job_that_is_cancelled_stops_the_work():
    effort, seen = Effort(5.0), threading.Event()

    def work():
        while not effort.is_over:
            time.sleep(0.01)
        seen.set()

    def cancelled():
        raise JobCancelled("stop")

    started = time.monotonic()
    with pytest.raises(JobCancelled):
        finish_in_time(effort, work, cancelled)
    assert time.monotonic() - started < 0.5
    assert seen.wait(1.0)


def test_a_second_try_has_the_time_that_is_left():
    effort = Effort(0.3)
    finish_in_time(effort, lambda: time.sleep(0.2))
    again = effort.again()
    assert not again.is_over
    assert again.seconds_left <= 0.1
