"""What a worker says of itself on the board: when it changes, that it lives, and nothing that holds up a job."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import attrs
import pytest

from ourvidz_core.delivery.board import FinishedJob, MemoryBoard, WorkerStatus
from ourvidz_core.errors import QueueUnavailable
from ourvidz_core.observe.activity import Activity
from ourvidz_core.observe.publisher import Publisher
from ourvidz_core.wire import events
from ourvidz_core.wire.callbacks import JobStatus
from ourvidz_core.wire.states import WorkerState

STATUS = WorkerStatus(
    name="w", host="h", pid=1, version="1", queues=("q",), state=WorkerState.IDLE, started_at=0.0, published_at=0.0
)
JOB = {"job_id": "a", "job_type": "t"}


def record(job_id: str) -> FinishedJob:
    return FinishedJob(id=job_id, type="t", status=JobStatus.COMPLETED, finished_at=1.0, worker="w")


class WatchedBoard(MemoryBoard):
    """Counts what is said, and can be away."""

    def __init__(self) -> None:
        super().__init__()
        self.said = 0
        self.is_away = False

    def publish(self, status: WorkerStatus) -> None:
        self._answer()
        self.said += 1
        super().publish(status)

    def finished(self, record: FinishedJob) -> None:
        self._answer()
        super().finished(record)

    def _answer(self) -> None:
        if self.is_away:
            raise QueueUnavailable("Redis does not answer")


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.fixture
def board() -> WatchedBoard:
    return WatchedBoard()


@pytest.fixture
def publisher_of(board: WatchedBoard) -> Iterator[Callable[..., Publisher]]:
    made: list[Publisher] = []

    def make(status: Callable[[], WorkerStatus] = lambda: STATUS, **times: float) -> Publisher:
        made.append(Publisher(board, status, **{"interval_seconds": 0.01, "heartbeat_seconds": 60.0, **times}))
        made[-1].start()
        return made[-1]

    yield make
    for publisher in made:
        publisher.close()


def test_a_change_is_said_and_many_at_once_are_said_once(board: WatchedBoard, publisher_of: Callable) -> None:
    state = [WorkerState.IDLE]
    publisher = publisher_of(lambda: attrs.evolve(STATUS, state=state[0]), interval_seconds=0.1)
    wait_for(board.workers)
    state[0] = WorkerState.WORKING
    for _ in range(1000):
        publisher.note_change()
    wait_for(lambda: board.workers()[0].state is WorkerState.WORKING)
    assert board.said <= 3


def test_a_worker_that_has_nothing_new_says_so_now_and_then(board: WatchedBoard, publisher_of: Callable) -> None:
    publisher_of(heartbeat_seconds=0.03)
    wait_for(lambda: board.said >= 3)


def test_a_worker_that_ends_tells_its_last_job_and_leaves(board: WatchedBoard, publisher_of: Callable) -> None:
    publisher = publisher_of(interval_seconds=60.0)
    wait_for(board.workers)
    publisher.add_finished(record("last"))
    publisher.close()
    assert board.workers() == []
    assert [job.id for job in board.recent()] == ["last"]


def test_a_board_that_is_away_holds_nobody_up_and_is_told_later(
    board: WatchedBoard, publisher_of: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    board.is_away = True
    publisher = publisher_of()
    started = time.monotonic()
    for number in range(500):
        publisher.add_finished(record(f"job-{number}"))
        publisher.note_change()
    assert time.monotonic() - started < 1.0
    wait_for(lambda: "the board is not up to date" in caplog.text)
    board.is_away = False
    publisher.note_change()
    wait_for(lambda: board.recent(1) and board.recent(1)[0].id == "job-499")
    assert len(board.recent()) == 200
    assert caplog.text.count("the board is not up to date") == 1


def test_a_status_that_cannot_be_had_now_is_said_later(board: WatchedBoard, publisher_of: Callable) -> None:
    asked: list[int] = []

    def status() -> WorkerStatus:
        asked.append(1)
        if len(asked) == 1:
            raise RuntimeError("the driver has hung up")
        return STATUS

    publisher = publisher_of(status)
    wait_for(lambda: asked)
    publisher.note_change()
    wait_for(board.workers)


# -- what the events say


def test_a_job_is_followed_through_its_stages_to_its_record() -> None:
    activity = Activity("w")
    changes, records = [], []
    activity.tell(lambda: changes.append(activity.running), records.append)

    def stage() -> tuple[str, int | None]:
        (job,) = activity.running
        return job.stage, job.step

    activity(event=events.JobStarted(**JOB, attempt=2, claim_seconds=5.0, has_references=True))
    assert stage() == ("references", None)
    assert activity.running[0].claimed_at == pytest.approx(time.time() - 5.0, abs=2)
    activity(event=events.ReferencesFetched(**JOB, roles=("start",), seconds=1.0))
    assert stage() == ("waiting", None)
    activity(event=events.GenerationStarted(**JOB, waited_seconds=2.0))
    assert stage() == ("generate", None)
    activity(event=events.GenerationProgressed(**JOB, stage="denoise", step=3, total=25))
    assert (stage(), activity.running[0].total) == (("denoise", 3), 25)
    activity(event=events.GenerationFinished(**JOB, artifacts=1, seconds=3.0))
    assert stage() == ("store", None)
    for index in range(2):
        stored = {"bucket": "b", "path": f"u/a_{index}.png", "size_bytes": 9, "media_type": "image/png"}
        activity(event=events.AssetStored(**JOB, **stored, seconds=0.5))
    activity(event=events.JobCompleted(**JOB, assets=2, seconds=8.0))
    assert activity.running == ()
    (told,) = records
    assert (told.id, told.status, told.attempt, told.worker) == ("a", JobStatus.COMPLETED, 2, "w")
    total = told.seconds["total"]
    assert total == pytest.approx(5.0, abs=2)
    assert told.seconds == {"references": 1.0, "waiting": 2.0, "generate": 3.0, "store": 1.0, "total": total}
    assert [asset.path for asset in told.assets] == ["u/a_0.png", "u/a_1.png"]
    assert len(changes) == 8
    assert activity.counts.completed == 1


def test_a_failure_is_recorded_with_its_reason_and_without_what_opens_a_door() -> None:
    activity = Activity("w")
    records: list[FinishedJob] = []
    activity.tell(lambda: None, records.append)
    message = "https://host/ref.png?token=CANARY cannot be fetched" + "." * 1000
    activity(event=events.JobFailed(**JOB, error_type="ReferenceUnavailable", message=message, attempt=3))
    (told,) = records
    assert (told.status, told.error_type, told.attempt) == (JobStatus.FAILED, "ReferenceUnavailable", 3)
    assert told.reason.startswith("https://host/ref.png?... cannot be fetched")
    assert "CANARY" not in told.reason
    assert len(told.reason) == 500
    assert (told.seconds, told.assets) == ({}, ())


@pytest.mark.parametrize(
    "event",
    [
        events.JobRetried(**JOB, error_type="E", message="", attempt=1, delay_seconds=1.0),
        events.JobReleased(**JOB, reason="handed back"),
    ],
    ids=["retried", "released"],
)
def test_a_job_that_goes_on_elsewhere_runs_here_no_more_and_has_no_record(event: events.Event) -> None:
    activity = Activity("w")
    records: list[FinishedJob] = []
    activity.tell(lambda: None, records.append)
    activity(event=events.JobStarted(**JOB, attempt=1))
    activity(event=event)
    activity(event=events.GenerationProgressed(**JOB, stage="late", step=1, total=2))
    assert (activity.running, records) == ((), [])


def test_threads_may_speak_at_once() -> None:
    activity = Activity("w")
    records: list[FinishedJob] = []
    activity.tell(lambda: None, records.append)

    def work(number: int) -> None:
        for index in range(50):
            job = {"job_id": f"{number}-{index}", "job_type": "t"}
            activity(event=events.JobStarted(**job, attempt=1))
            activity(event=events.JobCompleted(**job, assets=0, seconds=1.0))

    threads = [threading.Thread(target=work, args=[number]) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (activity.counts.completed, len(records), activity.running) == (200, 200, ())
