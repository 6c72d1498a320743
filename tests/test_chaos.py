"""The short version of ``benchmarks/chaos.py``: kill a little of everything, and lose nothing."""

from __future__ import annotations

import json
import os
import tempfile

import pytest

from benchmarks import chaos

TERMINAL = json.dumps({"job_id": "a", "callback_id": "a-1", "body": '{"status": "failed"}'})


def test_nothing_is_lost_and_nothing_is_reported_twice_whatever_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory() as directory:
        monkeypatch.setattr(tempfile, "tempdir", directory)
        rows = list(chaos.run(["1", "2", "3", "4", "5", "6"], chaos.QUICK, at_once=3))
        assert os.listdir(directory) == [], "a Redis that still runs has its socket here"
    assert [row.name[0] for row in rows] == ["1", "2", "2", "3", "3", "4", "5", "6"]
    assert {row.name: row.misses for row in rows if row.misses} == {}
    assert sum(row.lost + row.duplicate_rows for row in rows) == 0
    assert sum(row.faults for row in rows) > 20


@pytest.mark.parametrize(
    ("commands", "wrong"),
    [
        ([("meta", "a", '{"token":2}'), ("meta", "a", '{"token":1}')], "token 1 after 2"),
        ([("meta", "a", '{"token":1}'), ("meta", "b", '{"token":1}')], "belongs to a"),
        ([("rows", "a-1", TERMINAL), ("meta", "a", '{"token":2}')], "taken after its terminal row"),
        ([("rows", "a-1", TERMINAL), ("lease", "9", "a")], "in flight again"),
    ],
    ids=["older token", "shared token", "taken again", "leased again"],
)
def test_the_checker_of_the_books_sees_what_is_wrong(commands: list[tuple[str, str, str]], wrong: str) -> None:
    log = chaos.TransitionLog()
    for place, first, second in commands:
        name = b"ZADD" if place == "lease" else b"HSET"
        log._apply([name, f"{{{chaos.QUEUE}}}:{place}".encode(), first.encode(), second.encode()])
    assert [wrong in said for said in log.wrongs] == [True]
