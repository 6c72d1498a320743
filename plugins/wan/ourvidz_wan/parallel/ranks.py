"""Rank 0's side: starts the other ranks, gives them work, and notices when one is gone."""

from __future__ import annotations

import atexit
import itertools
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from attrs import asdict, define, field

from ourvidz_core.engine.processes import ending_of
from ourvidz_core.errors import EngineUnusable, GenerationError, JobError, ModelUnavailable, OutOfMemory
from ourvidz_core.settings import without_keys
from ourvidz_wan.attention import KernelAttnProcessor
from ourvidz_wan.parallel import exchange
from ourvidz_wan.parallel.exchange import Groups
from ourvidz_wan.parallel.plan import RankPlan, plan_ranks
from ourvidz_wan.prediction import LAUNCH_BOUND_TOKENS, Branch, Predict, Predictor
from ourvidz_wan.tasks import Pipeline, Task

logger = logging.getLogger(__name__)

#: A process that says nothing for so long is stopped, or its machine is.
SILENT_SECONDS = 30.0
#: How long one exchange may take: the first of a job may compile.
FIRST_STEP_SECONDS = 900.0
STEP_SECONDS = 60.0
#: Reading weights from a slow disk takes this long at most.
LOAD_SECONDS = 900.0
#: The host stays at most so many exchanges ahead of the device; a step has two.
EXCHANGES_AHEAD = 2
#: For an error to be told before the process ends.
_LAST_RESORT_SECONDS = 10.0
_POLL_SECONDS = 0.0005
_WATCH_SECONDS = 0.25
#: Where an exchange breaks off, the reason is known a little later.
_REASON_SECONDS = 2.0


@define(eq=False)
class _Follower:
    """One process beside ours, as far as it is known."""

    rank: int
    device: torch.device
    process: subprocess.Popen[bytes]
    connection: Connection
    heard_at: float = field(factory=time.monotonic)
    #: Answers that nobody has taken yet.
    answers: int = 0

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.device}, process {self.process.pid})"


class Ranks:
    """The ranks of this process: itself as rank 0, and the processes that it started.

    Used from one thread. There can be one at a time, because torch has one world in a process.
    """

    def __init__(self, ranks: int, device: torch.device, *, silent_seconds: float = SILENT_SECONDS) -> None:
        """Start ``ranks - 1`` processes.

        :raises GenerationError: there are not so many GPUs.
        """
        self.size = ranks
        self._devices = devices_of(ranks, device)
        self._silent_seconds = silent_seconds
        self._failure: JobError | None = None
        self._is_joined = False
        self._is_closed = threading.Event()
        self._pending: deque[Any] = deque()
        self._dropped: deque[str] = deque()
        self._keys = itertools.count()
        self._directory = tempfile.TemporaryDirectory(prefix="ourvidz-ranks-")
        self._followers = [self._start(rank) for rank in range(1, ranks)]
        threading.Thread(target=self._watch, name="ranks-watch", daemon=True).start()

    def share(self, transformer: Any, local: Predictor, ckpt_dir: Path, task: Task, plan: RankPlan) -> SharedPredictor:
        """Have the ranks of ``plan`` load the ``transformer`` of this process, too.

        :raises ModelUnavailable: a rank could not; says which and why.
        """
        key = str(next(self._keys))
        dtype = exchange.name_of(transformer.dtype)
        self._tell_all(kind="load", key=key, ckpt_dir=str(ckpt_dir), task=task.name, dtype=dtype)
        self._await_answers()
        device = self.device
        if not self._is_joined:
            meeting_point = Path(self._directory.name) / "meeting-point"
            self._tell_all(kind="join", meeting_point=str(meeting_point))
            self._is_joined = True  # from here on a rank that is gone may be waited for
            with self._explained():
                exchange.join(rank=0, ranks=self.size, device=device, meeting_point=meeting_point)
        self._tell_all(kind="share", key=key, plan=asdict(plan))
        with self._explained():
            groups = exchange.make_groups(plan, device)
        shared = SharedPredictor(self, key, transformer, groups, local)
        weakref.finalize(shared, self._dropped.append, key)
        logger.info("%s runs on %s", task.name, plan.describe())
        return shared

    def begin(self, key: str, branches: Sequence[Mapping[str, Any]]) -> None:
        """Give the ranks what stays the same in all steps of a job."""
        tensors: dict[str, torch.Tensor] = {}
        labels: dict[int, str] = {}  # what branches share is sent once
        described = []
        for branch in branches:
            plain = {name: value for name, value in branch.items() if not isinstance(value, torch.Tensor)}
            named = {}
            for name, value in branch.items():
                if isinstance(value, torch.Tensor):
                    named[name] = labels.setdefault(id(value), str(len(labels)))
                    tensors[named[name]] = value.contiguous()
            described.append((plain, named))
        self._exchange(tensors, kind="begin", key=key, branches=described)

    def step(
        self,
        transformer: Any,
        branches: Sequence[Mapping[str, Any]],
        groups: Groups,
        inputs: Mapping[str, torch.Tensor],
    ) -> list[torch.Tensor]:
        """One prediction for each branch."""
        inputs = {name: tensor.contiguous() for name, tensor in inputs.items()}
        self._exchange(inputs, kind="step")
        with self._explained():
            return exchange.predict(transformer, inputs, branches, groups, self._await)

    def pace(self, *, ahead: int, is_first: bool) -> None:
        """Wait until the device is at most ``ahead`` exchanges behind, with an eye on the ranks."""
        seconds = FIRST_STEP_SECONDS if is_first else STEP_SECONDS
        while len(self._pending) > ahead:
            self._poll([self._pending[0]], seconds)
            self._pending.popleft()

    @property
    def device(self) -> torch.device:
        """That of rank 0."""
        return self._devices[0]

    @property
    def is_closed(self) -> bool:
        """Whether the other ranks are ended."""
        return self._is_closed.is_set()

    def check(self) -> None:
        """Do nothing while all ranks are well.

        :raises EngineUnusable: one is not; another engine starts new ones.
        """
        if self._failure is not None:
            self.close()
            raise self._failure

    def close(self) -> None:
        """End the other ranks."""
        if self._is_closed.is_set():
            return
        self._is_closed.set()
        is_well = self._failure is None
        for follower in self._followers:
            if is_well:
                with suppress(OSError):
                    exchange.say(follower.connection, kind="leave")
            else:
                follower.process.kill()
        if self._is_joined and (is_well or self.device.type != "cuda"):
            exchange.leave()
        elif self._is_joined:
            # NCCL would wait for the rank that is gone, and so would an interpreter that ends in order.
            atexit.register(os._exit, 1)
        for follower in self._followers:
            try:
                follower.process.wait(timeout=5.0)
            except subprocess.TimeoutExpired:
                follower.process.kill()
                follower.process.wait()
            follower.connection.close()
        self._directory.cleanup()

    def _start(self, rank: int) -> _Follower:
        ours, theirs = Pipe()
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "ourvidz_wan.parallel.follower", str(theirs.fileno())],
                env=without_keys(os.environ),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )
        finally:
            theirs.close()
        device = self._devices[rank]
        follower = _Follower(rank, device, process, ours)
        threads = torch.get_num_threads() if device.type == "cpu" else 0
        exchange.say(ours, kind="start", rank=rank, ranks=self.size, device=str(device), threads=threads)
        return follower

    def _await_answers(self) -> None:
        deadline = time.monotonic() + LOAD_SECONDS
        while late := [follower for follower in self._followers if follower.answers == 0]:
            self.check()
            if time.monotonic() > deadline:
                self._fail(EngineUnusable(f"{late[0]} did not load its weights within {LOAD_SECONDS:g} s"))
            time.sleep(0.01)
        for follower in self._followers:
            follower.answers = 0

    def _tell_all(self, **message: Any) -> None:
        self.check()
        while self._dropped:
            self._send(kind="drop", key=self._dropped.popleft())
        self._send(**message)

    def _send(self, **message: Any) -> None:
        for follower in self._followers:
            # Whoever is gone is noticed by the thread that watches, with its reason.
            with suppress(OSError):
                exchange.say(follower.connection, **message)

    def _exchange(self, tensors: Mapping[str, torch.Tensor], **message: Any) -> None:
        self.check()
        self._tell_all(**message, tensors=exchange.shapes_of(tensors))
        with self._explained():
            self._await(exchange.send_tensors(tensors))

    def _await(self, works: Sequence[Any]) -> None:
        if self.device.type != "cuda":
            self._poll(works, FIRST_STEP_SECONDS)
        for work in works:
            work.wait()  # on a GPU only its stream waits
        if self.device.type == "cuda":
            self._pending.extend(works[-1:])

    def _poll(self, works: Sequence[Any], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not all(work.is_completed() for work in works):
            self.check()
            if time.monotonic() > deadline:
                self._fail(EngineUnusable(f"the ranks did not exchange a step within {seconds:g} s; they are ended"))
            time.sleep(_POLL_SECONDS)

    def _fail(self, error: JobError) -> None:
        self._note(error)
        self.check()

    def _note(self, error: JobError) -> None:
        if self._failure is None:
            self._failure = error

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """What goes wrong here because a rank is gone is told as that; all else leaves the ranks out of step, too."""
        try:
            yield
        except JobError:
            raise
        except Exception as error:
            deadline = time.monotonic() + _REASON_SECONDS
            while self._failure is None and time.monotonic() < deadline:
                time.sleep(0.01)
            self._note(_error_of("rank 0", type(error).__name__, str(error)))
            self.check()

    def _watch(self) -> None:
        while self._failure is None:
            if self._is_closed.is_set():
                return
            with suppress(OSError):  # closed meanwhile
                ready = wait([follower.connection for follower in self._followers], timeout=_WATCH_SECONDS)
                for follower in self._followers:
                    if follower.connection in ready:
                        self._hear(follower)
                    elif time.monotonic() - follower.heard_at > self._silent_seconds:
                        self._note(EngineUnusable(f"{follower} has not answered for {self._silent_seconds:g} s"))
                        follower.process.kill()
        if self._is_joined and self.device.type == "cuda":
            # Whatever waits for the device now waits for a rank that is gone: only this process's end helps.
            time.sleep(_LAST_RESORT_SECONDS)
            sys.stderr.write(f"\nRankError: {self._failure}\n")
            sys.stderr.flush()
            os._exit(1)

    def _hear(self, follower: _Follower) -> None:
        try:
            message = exchange.hear(follower.connection)
        except (EOFError, OSError, ValueError):
            if not self._is_closed.is_set():
                self._note(EngineUnusable(f"{follower} died: {_ending(follower.process)}"))
            return
        follower.heard_at = time.monotonic()
        match message["kind"]:
            case "done":
                follower.answers += 1
            case "failed":
                self._note(_error_of(follower, message["error_type"], message["message"]))


class SharedPredictor:
    """A transformer of which every rank holds a copy, and which predicts on all of them.

    What one GPU launches more slowly than it works it off, an image above all, is left to ``local``.
    """

    def __init__(self, ranks: Ranks, key: str, transformer: Any, groups: Groups, local: Predictor) -> None:
        self._ranks = ranks
        self._key = key
        self._transformer = transformer
        self._groups = groups
        self._local = local
        self._used = 1

    @property
    def plan(self) -> RankPlan:
        """Who predicts what."""
        return self._groups.plan

    @property
    def facts(self) -> dict[str, Any]:
        """How many GPUs predicted for the last job; and whose attention, where ours was not asked."""
        facts: dict[str, Any] = {"gpus": self._used}
        processor = self._transformer.blocks[0].attn1.processor
        if self._used > 1 and self.plan.context > 1 and isinstance(processor, KernelAttnProcessor):
            facts["attention"] = processor.kernel_of_diffusers.value
        return facts

    @contextmanager
    def job(self, branches: Sequence[Branch]) -> Iterator[Predict]:
        """See :class:`Predictor`. Whatever ends the job between two steps leaves the ranks ready for the next.

        :raises EngineUnusable: a rank is gone.
        """
        with ExitStack() as stack:
            chosen: Predict | None = None

            def predict(hidden_states: torch.Tensor, timestep: torch.Tensor) -> Sequence[torch.Tensor]:
                nonlocal chosen
                if chosen is None:  # only now the size is known
                    is_shared = self._is_worth_it(hidden_states)
                    chosen = stack.enter_context(self._on_all(branches) if is_shared else self._local.job(branches))
                    self._used = self._busy_ranks(len(branches)) if is_shared else 1
                return chosen(hidden_states, timestep)

            yield predict

    def forget_graphs(self) -> None:
        """See :class:`Predictor`. What is shared is not replayed."""
        self._local.forget_graphs()

    def _is_worth_it(self, hidden_states: torch.Tensor) -> bool:
        is_launch_bound = exchange.tokens_of(self._transformer, hidden_states) <= LAUNCH_BOUND_TOKENS
        return hidden_states.device.type != "cuda" or not is_launch_bound

    def _busy_ranks(self, branches: int) -> int:
        return sum(bool(self.plan.branches_of(rank, branches)) for rank in range(self.plan.ranks))

    @contextmanager
    def _on_all(self, branches: Sequence[Branch]) -> Iterator[Predict]:
        steps = itertools.count()

        def predict(hidden_states: torch.Tensor, timestep: torch.Tensor) -> Sequence[torch.Tensor]:
            inputs = {"hidden_states": hidden_states, "timestep": timestep.to(hidden_states.device)}
            predictions = self._ranks.step(self._transformer, branches, self._groups, inputs)
            self._ranks.pace(ahead=EXCHANGES_AHEAD, is_first=next(steps) <= EXCHANGES_AHEAD)
            return predictions

        exchange.share_context(self._transformer, self._groups)
        try:
            self._ranks.begin(self._key, branches)
            yield predict
            self._ranks.pace(ahead=0, is_first=next(steps) <= EXCHANGES_AHEAD)
        finally:
            exchange.unshare_context(self._transformer, self._groups)


_world: Ranks | None = None


def share_predictions(
    transformer: Any, local: Predictor, ckpt_dir: Path, task: Task, *, gpus: int, device: torch.device
) -> Predictor:
    """A predictor of ``gpus`` GPUs for the ``transformer`` that this process loaded; ``local`` where one has to do.

    That is so of all but text-to-video, whose steps diffusers takes. The other ranks live as long as
    this process, and hold a second model only where its plan is as large.

    :raises GenerationError: this process does not see so many.
    :raises ModelUnavailable: another rank could not load the weights.
    """
    global _world  # noqa: PLW0603 - as torch.distributed: one world in a process
    plan = plan_ranks(gpus, heads=transformer.config.num_attention_heads)
    world = None if _world is None or _world.is_closed else _world
    if plan.ranks == 1 or task.pipeline is not Pipeline.TEXT or (world is not None and plan.ranks != world.size):
        logger.warning("%s runs on one GPU of %d", task.name, gpus)
        return local
    if world is None:
        world = _world = Ranks(plan.ranks, device)
        atexit.register(world.close)
    return world.share(transformer, local, ckpt_dir, task, plan)


def devices_of(ranks: int, device: torch.device) -> list[torch.device]:
    """The devices of all ranks: ``device``, and after it the others that this process sees.

    :raises GenerationError: there are too few.
    """
    if device.type != "cuda":
        return [device] * ranks
    own = device.index or 0
    numbers = [own, *(number for number in range(torch.cuda.device_count()) if number != own)]
    if len(numbers) < ranks:
        raise GenerationError(
            f"a WAN job shall use {ranks} GPUs and this process sees {len(numbers)};"
            " give the worker more (CUDA_VISIBLE_DEVICES), or lower OURVIDZ_WAN_GPUS"
        )
    return [torch.device("cuda", number) for number in numbers[:ranks]]


def _ending(process: subprocess.Popen[bytes]) -> str:
    try:
        return ending_of(process.wait(timeout=2.0))
    except subprocess.TimeoutExpired:
        return "its pipe closed"


def _error_of(rank: object, error_type: str, message: str) -> JobError:
    said = f"{rank} failed: {error_type}: {message}"
    if "out of memory" in said.lower() or error_type == "OutOfMemoryError":
        return OutOfMemory(f"a GPU has too little memory for its part of this job: {said}")
    return ModelUnavailable(said) if error_type == "ModelUnavailable" else EngineUnusable(said)
