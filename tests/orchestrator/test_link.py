"""The line between a worker and its orchestrator, with both ends in this process."""

from __future__ import annotations

import os
import threading
import time

import pytest

from ourvidz_core.orchestrator.link import OrchestratorEnd, Ready, WorkerEnd


def test_a_worker_is_heard_when_it_is_ready_and_hears_of_the_end() -> None:
    gone = threading.Event()
    ours = OrchestratorEnd()
    worker = WorkerEnd(os.dup(ours.their_descriptor), gone.set, sign_seconds=0.02)
    ours.passed_on()
    worker.say_ready(["a_queue"], {"a_type": "its model is missing"})
    said, deadline = None, time.monotonic() + 5
    while said is None and time.monotonic() < deadline:
        said = ours.read()
    assert said == Ready(queues=("a_queue",), left_out={"a_type": "its model is missing"})
    heard = ours.heard_at
    while ours.heard_at == heard and time.monotonic() < deadline:
        assert ours.read() is None
    assert ours.heard_at > heard
    ours.close()
    assert gone.wait(5)


@pytest.mark.parametrize("line", [b"ready\n", b'{"queues": 5}\n', b"[]\n", b'{"from_the_future": true}\n'])
def test_a_worker_of_another_version_is_ready_however_it_says_so(line: bytes) -> None:
    ours = OrchestratorEnd()
    os.write(ours.their_descriptor, line)
    assert ours.read() == Ready()
    ours.passed_on()
    assert (ours.read(), ours.is_open) == (None, False)
    ours.close()
