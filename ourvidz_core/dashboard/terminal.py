"""An overview as one frame of a terminal."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ourvidz_core.dashboard.figures import StageTimes, Throughput, stage_times, throughput
from ourvidz_core.dashboard.overview import DeadJob, Overview
from ourvidz_core.delivery.board import DeviceMemory, FinishedJob, RunningJob, WorkerStatus
from ourvidz_core.observe.collectors import QueueFacts
from ourvidz_core.wire.callbacks import JobStatus

_SHOWN_ENDED = 8
_SHOWN_DEAD = 5
_BAR = 16
_BLOCKS = " ▁▂▃▄▅▆▇█"


def draw(overview: Overview, *, trouble: str | None = None) -> RenderableType:
    """Everything, with the most urgent at the top. ``trouble`` says why it is not as it is now."""
    parts: list[RenderableType] = [_headline(overview)]
    if trouble is not None:
        parts.append(_text(trouble, "bold red"))
    parts += _part(
        "queues", ("queue", "waiting", "oldest", "running", "retrying", "dead", "callbacks"), _queues(overview)
    )
    parts += _part("running", ("job", "type", "stage", "", "", "for", "worker"), _running(overview))
    parts += _part(
        "workers", ("worker", "state", "engine", "gpu memory", "", "done", "failed", "host"), _workers(overview)
    )
    ended = overview.recent[:_SHOWN_ENDED]
    parts += _part(
        "ended lately", ("ago", "job", "type", "took", "outcome"), (_ended(job, overview.at) for job in ended)
    )
    parts += _part("dead letters", ("job", "queue", "error", "reason"), map(_dead, overview.dead[:_SHOWN_DEAD]))
    parts += _part(
        "time by stage (medians)", ("type", "jobs", "total", "stages"), map(_stages, stage_times(overview.recent))
    )
    return Group(*parts)


def _headline(overview: Overview) -> Text:
    ended = throughput(overview.recent, overview.at)
    dead = sum(facts.depth.dead for facts in overview.queues.values())
    failed = sum(ended.failed)
    waiting = sum(facts.depth.waiting + facts.depth.retrying for facts in overview.queues.values())
    running = sum(len(worker.jobs) for worker in overview.workers)
    return Text.assemble(
        ("ourvidz ", "bold"),
        f"{time.strftime('%H:%M:%S', time.localtime(overview.at))}  {waiting} waiting, {running} running, ",
        (f"{dead} dead", "red" if dead else ""),
        "\n",
        (_spark(ended), "cyan"),
        f" {sum(ended.completed)} completed, ",
        (f"{failed} failed", "red" if failed else ""),
        f" in the last {ended.window_seconds / 60:.0f} min",
    )


def _spark(ended: Throughput) -> str:
    counts = [good + bad for good, bad in zip(ended.completed, ended.failed, strict=True)]
    most = max(*counts, 1)
    return "".join(_BLOCKS[-(-count * (len(_BLOCKS) - 1) // most)] for count in counts)


def _part(title: str, head: Sequence[str], rows: Iterable[Sequence[RenderableType]]) -> list[RenderableType]:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim", title=title.upper())
    table.title_justify, table.title_style = "left", "bold"
    for name in head:
        # Where it is narrow the last column gives way: a reason may be long, and the others are short.
        table.add_column(name, overflow="ellipsis", no_wrap=name != head[-1])
    for row in rows:
        table.add_row(*row)
    return [Text(), table] if table.row_count else []


def _queues(overview: Overview) -> Iterable[Sequence[RenderableType]]:
    for name, facts in overview.queues.items():
        depth = facts.depth
        yield (
            _text(name),
            str(depth.waiting),
            _duration(facts.oldest_seconds) if facts.oldest_seconds else "-",
            _in_flight(facts),
            str(depth.retrying),
            Text(str(depth.dead), "red" if depth.dead else ""),
            Text(f"{depth.callbacks}, {depth.undelivered} given up", "red")
            if depth.undelivered
            else str(depth.callbacks),
        )


def _in_flight(facts: QueueFacts) -> Text:
    if facts.lease_overdue_seconds <= 0:
        return Text(str(facts.depth.in_flight))
    return Text(f"{facts.depth.in_flight}, overdue", "red")


def _running(overview: Overview) -> Iterable[Sequence[RenderableType]]:
    for worker in overview.workers:
        for job in worker.jobs:
            yield (
                _text(job.id),
                _text(job.type),
                _text(job.stage),
                *_steps(job),
                _duration(overview.at - job.claimed_at),
                _text(worker.name),
            )


def _steps(job: RunningJob) -> tuple[RenderableType, RenderableType]:
    if not job.total or job.step is None:
        return "", ""
    return ProgressBar(total=job.total, completed=job.step, width=_BAR), f"{job.step}/{job.total}"


def _workers(overview: Overview) -> Iterable[Sequence[RenderableType]]:
    for worker in overview.workers:
        yield (
            _text(worker.name),
            worker.state.value,
            Text(worker.engine.value, "red" if worker.engine == "failed" else "")
            if worker.engine_doing is None
            else _text(f"{worker.engine.value}: {worker.engine_doing}"),
            *_memory(worker.device),
            str(worker.completed),
            Text(str(worker.failed), "red" if worker.failed else ""),
            _text(_place(worker)),
        )


def _place(worker: WorkerStatus) -> str:
    return f"{worker.host}, process {worker.pid}"


def _memory(device: DeviceMemory | None) -> tuple[RenderableType, RenderableType]:
    if device is None:
        return "", "-"
    bar = ProgressBar(total=device.total_gb, completed=device.used_gb, width=_BAR)
    return bar, f"{device.used_gb:.1f} of {device.total_gb:.1f} GiB"


def _ended(job: FinishedJob, at: float) -> Sequence[RenderableType]:
    is_good = job.status is JobStatus.COMPLETED
    outcome = f"{len(job.assets)} stored" if is_good else f"{job.error_type}: {job.reason}"
    took = job.seconds.get("total")
    return (
        _duration(at - job.finished_at),
        _text(job.id),
        _text(job.type or "?"),
        "-" if took is None else _duration(took),
        _text(outcome, "green" if is_good else "red"),
    )


def _dead(letter: DeadJob) -> Sequence[RenderableType]:
    return _text(letter.job_id or "-"), _text(letter.queue), _text(letter.error_type, "red"), _text(letter.reason)


def _stages(times: StageTimes) -> Sequence[RenderableType]:
    stages = ", ".join(f"{stage} {_duration(seconds)}" for stage, seconds in times.seconds.items())
    return _text(times.job_type), str(times.jobs), _duration(times.total_seconds), stages


def _text(text: str, style: str = "") -> Text:
    """A text of a job: never markup, and nothing that a terminal would obey."""
    clean = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)
    return Text(clean, style, no_wrap=True, overflow="ellipsis")


def _duration(seconds: float) -> str:
    """A duration for people: 3.2s, 45s, 2m31s, 3h, 2d."""
    if seconds < 120:
        return f"{seconds:.1f}s" if 0 < seconds < 10 else f"{max(seconds, 0):.0f}s"
    if seconds < 7200:
        return f"{int(seconds) // 60}m{int(seconds) % 60:02}s"
    return f"{seconds / 3600:.0f}h" if seconds < 172800 else f"{seconds / 86400:.0f}d"
