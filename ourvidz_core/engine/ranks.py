"""Several GPUs for one job, as the engine sees them: it is rank 0, and each other rank a process that it starts.

What ranks do for a job is their plugin's; that they are there, and what becomes of it when one is not, is here.
"""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, NoReturn

from attrs import define, field

from ourvidz_core.engine.follower import Message, hear, say
from ourvidz_core.engine.processes import ending_of
from ourvidz_core.errors import EngineUnusable, GenerationError, JobError, ModelUnavailable, OutOfMemory
from ourvidz_core.settings import without_keys

#: A process of which nothing comes for so long, not even the rest of a message, is stopped, or its machine is.
SILENT_SECONDS = 30.0
_WATCH_SECONDS = 0.25
#: Where an exchange breaks off, the reason is known a little later.
_REASON_SECONDS = 2.0
#: A rank that was told to leave has this long.
_LEAVE_SECONDS = 5.0
_VISIBLE = "CUDA_VISIBLE_DEVICES"


@define(eq=False)
class _Process:
    """One process beside ours, as far as it is known."""

    rank: int
    device: str
    process: subprocess.Popen[bytes]
    connection: Connection
    #: Where each message goes, and None after the last.
    _heard: queue.SimpleQueue[tuple[_Process, Message | None]]
    #: For how long no piece of a message has come.
    quiet_seconds: float = 0.0
    _listener: threading.Thread = field(init=False)

    def __attrs_post_init__(self) -> None:
        # In a thread of its own: a message that breaks off must not keep us from hearing the others.
        self._listener = threading.Thread(target=self._listen, name=f"ranks-listen-{self.rank}", daemon=True)
        self._listener.start()

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.device}, process {self.process.pid})"

    def await_end(self) -> None:
        """Wait until it has left, or make it."""
        try:
            self.process.wait(timeout=_LEAVE_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._listener.join(timeout=_LEAVE_SECONDS)
        self.connection.close()

    def _listen(self) -> None:
        try:
            while True:
                self._heard.put((self, hear(self.connection, on_piece=self._note_piece)))
        except (EOFError, OSError, ValueError):
            self._heard.put((self, None))

    def _note_piece(self) -> None:
        self.quiet_seconds = 0.0


class Followers:
    """The ranks but the first: processes that live as long as this one, or until one of them fails.

    Each is the program ``module``, which calls :func:`ourvidz_core.engine.follower.follow`. The first message that it
    gets is ``start`` with its ``rank``, the number of ``ranks``, its ``device`` and, on a processor, its ``threads``.
    Used from one thread, but for :meth:`wait_until`.
    """

    def __init__(
        self,
        module: str,
        devices: Sequence[str],
        *,
        on_answer: Callable[[int, Message], None],
        on_lost: Callable[[JobError], None] = lambda error: None,
        silent_seconds: float = SILENT_SECONDS,
        is_alone: bool = False,
    ) -> None:
        """Start a process for each of ``devices`` but the first, which is this process's own.

        ``on_answer`` is told who says what, and ``on_lost`` once why there is no going on; both in the thread that
        watches. With ``is_alone`` each process sees its own GPU and no other, as its first: what was compiled for the
        first GPU does for it, too.
        """
        self.devices = tuple(devices)
        self._module = module
        self._on_answer = on_answer
        self._on_lost = on_lost
        self._silent_seconds = silent_seconds
        self._is_alone = is_alone
        self._failure: JobError | None = None
        self._is_closed = threading.Event()
        self._changed = threading.Condition()
        self._heard = queue.SimpleQueue[tuple[_Process, Message | None]]()
        self._processes = {rank: self._start(rank) for rank in range(1, len(devices))}
        threading.Thread(target=self._watch, name="ranks-watch", daemon=True).start()

    @property
    def pids(self) -> tuple[int, ...]:
        """The processes, by rank."""
        return tuple(follower.process.pid for follower in self._processes.values())

    @property
    def is_well(self) -> bool:
        """Whether none of them failed so far."""
        return self._failure is None

    @property
    def is_closed(self) -> bool:
        """Whether they are ended."""
        return self._is_closed.is_set()

    def name(self, rank: int) -> str:
        """What to call a rank in an error."""
        return str(self._processes[rank])

    def tell(self, rank: int, **message: Any) -> None:
        """Say something to one rank."""
        # Whoever is gone is noticed by the thread that watches, with its reason.
        with suppress(OSError):
            say(self._processes[rank].connection, **message)

    def tell_all(self, **message: Any) -> None:
        """Say the same to all of them."""
        for rank in self._processes:
            self.tell(rank, **message)

    def wait_until(self, is_so: Callable[[], bool], seconds: float) -> bool:
        """Whether ``is_so`` has come true within the time; it is asked again after each answer. Any thread may wait.

        :raises EngineUnusable: a rank is gone, or they were ended meanwhile.
        """
        with self._changed:
            self._changed.wait_for(lambda: is_so() or not self.is_well or self.is_closed, seconds)
        if is_so():
            return True
        if self._failure is not None:
            raise self._failure
        if self.is_closed:
            raise EngineUnusable("the other ranks were ended before they had answered")
        return False

    def check(self) -> None:
        """Do nothing while all ranks are well.

        :raises EngineUnusable: one is not; whoever hears it closes them, and another engine starts new ones.
        """
        if self._failure is not None:
            raise self._failure

    def note(self, error: JobError) -> None:
        """From here on there is no going on, because of ``error``; the first counts."""
        with self._changed:
            if self._failure is None:
                self._failure = error
            self._changed.notify_all()

    def fail(self, error: JobError) -> NoReturn:
        """See :meth:`note`; and raise what counts."""
        self.note(error)
        raise self._failure or error

    @contextmanager
    def explained(self) -> Iterator[None]:
        """What goes wrong here because a rank is gone is told as that; all else leaves the ranks out of step, too."""
        try:
            yield
        except JobError:
            raise
        except Exception as error:
            with self._changed:
                self._changed.wait_for(lambda: not self.is_well, _REASON_SECONDS)
            self.fail(error_of("rank 0", type(error).__name__, str(error)))

    def close(self) -> None:
        """End all of them."""
        self.dismiss()
        self.await_end()

    def dismiss(self) -> None:
        """Tell all of them to leave; where one has failed, the others hear nothing any more and are killed."""
        if self.is_closed:
            return
        with self._changed:
            self._is_closed.set()
            self._changed.notify_all()
        for rank, follower in self._processes.items():
            if self.is_well:
                self.tell(rank, kind="leave")
            else:
                follower.process.kill()

    def await_end(self) -> None:
        """Wait until those that were dismissed have left, or make them."""
        for follower in self._processes.values():
            follower.await_end()

    def _start(self, rank: int) -> _Process:
        device = self.devices[rank]
        environ = without_keys(os.environ)
        ours, theirs = Pipe()
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", self._module, str(theirs.fileno())],
                env=seeing_only(device, environ) if self._is_alone else environ,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )
        finally:
            theirs.close()
        seen_as = "cuda" if self._is_alone and device != "cpu" else device
        say(ours, kind="start", rank=rank, ranks=len(self.devices), device=seen_as, threads=_threads(device))
        return _Process(rank, device, process, ours, self._heard)

    def _watch(self) -> None:
        looked_at = time.monotonic()
        while self._failure is None:
            if self.is_closed:
                return
            with suppress(queue.Empty):
                self._take(*self._heard.get(timeout=_WATCH_SECONDS))
            # While this process is stopped itself, nobody is silent.
            passed = min(time.monotonic() - looked_at, 2 * _WATCH_SECONDS)
            looked_at = time.monotonic()
            for follower in self._processes.values():
                follower.quiet_seconds += passed
                if follower.quiet_seconds > self._silent_seconds:
                    self.note(EngineUnusable(f"{follower} has not answered for {self._silent_seconds:g} s"))
                    follower.process.kill()
        self._on_lost(self._failure)

    def _take(self, follower: _Process, message: Message | None) -> None:
        if message is None:
            if not self.is_closed:
                self.note(EngineUnusable(f"{follower} died: {_ending(follower.process)}"))
            return
        match message["kind"]:
            case "alive":
                return
            case "failed":
                self.note(elsewhere(error_of(str(follower), message["error_type"], message["message"])))
            case _:
                try:
                    self._on_answer(follower.rank, message)
                except Exception as error:  # whoever waits for it would wait for ever
                    self.note(error_of(str(follower), type(error).__name__, str(error)))
                with self._changed:
                    self._changed.notify_all()


def devices_of(ranks: int, device: str, *, variable: str) -> tuple[str, ...]:
    """The devices of all ranks: ``device``, and after it the others that this process sees.

    ``variable`` is the setting that says how many there shall be.

    :raises GenerationError: there are too few.
    """
    if not device.startswith("cuda"):
        return (device,) * ranks
    import torch

    own = int(device.partition(":")[2] or 0)
    numbers = [own, *(number for number in range(torch.cuda.device_count()) if number != own)]
    if len(numbers) < ranks:
        raise GenerationError(
            f"a job shall use {ranks} GPUs and this process sees {len(numbers)};"
            f" give the worker more (CUDA_VISIBLE_DEVICES), or lower {variable}"
        )
    return tuple(f"cuda:{number}" for number in numbers[:ranks])


def seeing_only(device: str, environ: Mapping[str, str]) -> dict[str, str]:
    """``environ`` for a process that sees no GPU but ``device``, which is one of those that this process sees.

    >>> seeing_only("cuda:1", {"CUDA_VISIBLE_DEVICES": "5,7"})
    {'CUDA_VISIBLE_DEVICES': '7'}
    >>> seeing_only("cuda:1", {})
    {'CUDA_VISIBLE_DEVICES': '1'}
    """
    if not device.startswith("cuda"):
        return dict(environ)
    number = device.partition(":")[2] or "0"
    visible = [name.strip() for name in environ.get(_VISIBLE, "").split(",") if name.strip()]
    return {**environ, _VISIBLE: visible[int(number)] if visible else number}


def error_of(rank: str, error_type: str, message: str) -> JobError:
    """What the failure of a rank is to its job."""
    said = f"{rank} failed: {error_type}: {message}"
    if "out of memory" in said.lower() or error_type == "OutOfMemoryError":
        return OutOfMemory(f"a GPU has too little memory for its part of this job: {said}")
    return ModelUnavailable(said) if error_type == "ModelUnavailable" else EngineUnusable(said)


def elsewhere(error: JobError) -> JobError:
    """``error`` as one of another rank: where that lacked memory, nothing here has to make room."""
    if isinstance(error, OutOfMemory):
        error.is_here = False
    return error


def _threads(device: str) -> int:
    """On a processor a rank takes as many as this one; elsewhere nobody asks."""
    torch: Any = sys.modules.get("torch")
    return int(torch.get_num_threads()) if device == "cpu" and torch is not None else 0


def _ending(process: subprocess.Popen[bytes]) -> str:
    try:
        return ending_of(process.wait(timeout=2.0))
    except subprocess.TimeoutExpired:
        return "its pipe closed"
