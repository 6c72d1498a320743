"""Rank 0's side: gives the other ranks their part of each prediction, and never waits for one that is gone."""

from __future__ import annotations

import atexit
import itertools
import logging
import os
import sys
import tempfile
import time
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from attrs import asdict

from ourvidz_core.engine.follower import Message
from ourvidz_core.engine.ranks import SILENT_SECONDS, Followers, devices_of
from ourvidz_core.errors import EngineUnusable, JobError
from ourvidz_wan.attention import KernelAttnProcessor
from ourvidz_wan.parallel import exchange
from ourvidz_wan.parallel.exchange import Groups
from ourvidz_wan.parallel.plan import GPUS_VARIABLE, RankPlan, plan_ranks
from ourvidz_wan.prediction import LAUNCH_BOUND_TOKENS, Branch, Predict, Predictor
from ourvidz_wan.tasks import Pipeline, Task

logger = logging.getLogger(__name__)

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


class Ranks:
    """The ranks of this process: itself as rank 0, and the processes that it started.

    Used from one thread. There can be one at a time, because torch has one world in a process.
    """

    def __init__(self, ranks: int, device: torch.device, *, silent_seconds: float = SILENT_SECONDS) -> None:
        """Start ``ranks - 1`` processes.

        :raises GenerationError: there are not so many GPUs.
        """
        self.size = ranks
        devices = devices_of(ranks, str(device), variable=GPUS_VARIABLE)
        #: That of rank 0.
        self.device = torch.device(devices[0])
        self._is_joined = False
        self._pending: deque[Any] = deque()
        self._dropped: deque[str] = deque()
        self._keys = itertools.count()
        #: Ranks that have loaded what all were told to load.
        self._loaded: set[int] = set()
        self._directory = tempfile.TemporaryDirectory(prefix="ourvidz-ranks-")
        self._followers = Followers(
            "ourvidz_wan.parallel.follower",
            devices,
            on_answer=self._note_loaded,
            on_lost=self._end_if_stuck,
            silent_seconds=silent_seconds,
        )

    def share(self, transformer: Any, local: Predictor, ckpt_dir: Path, task: Task, plan: RankPlan) -> SharedPredictor:
        """Have the ranks of ``plan`` load the ``transformer`` of this process, too.

        :raises ModelUnavailable: a rank could not; says which and why.
        """
        key = str(next(self._keys))
        dtype = exchange.name_of(transformer.dtype)
        self._loaded.clear()
        self._tell_all(kind="load", key=key, ckpt_dir=str(ckpt_dir), task=task.name, dtype=dtype)
        self._await_loaded()
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
    def is_closed(self) -> bool:
        """Whether the other ranks are ended."""
        return self._followers.is_closed

    def check(self) -> None:
        """Do nothing while all ranks are well.

        :raises EngineUnusable: one is not; another engine starts new ones.
        """
        if not self._followers.is_well:
            self.close()
            self._followers.check()

    def close(self) -> None:
        """End the other ranks."""
        if self.is_closed:
            return
        is_well = self._followers.is_well
        self._followers.dismiss()
        if self._is_joined and (is_well or self.device.type != "cuda"):
            exchange.leave()
        elif self._is_joined:
            # NCCL would wait for the rank that is gone, and so would an interpreter that ends in order.
            atexit.register(os._exit, 1)
        self._followers.await_end()
        self._directory.cleanup()

    def _await_loaded(self) -> None:
        wanted = set(range(1, self.size))
        with self._ended_if_lost():
            if not self._followers.wait_until(lambda: self._loaded >= wanted, LOAD_SECONDS):
                late = self._followers.name(min(wanted - self._loaded))
                self._fail(EngineUnusable(f"{late} did not load its weights within {LOAD_SECONDS:g} s"))

    def _note_loaded(self, rank: int, message: Message) -> None:
        if message["kind"] == "done":
            self._loaded.add(rank)

    def _tell_all(self, **message: Any) -> None:
        self.check()
        while self._dropped:
            self._followers.tell_all(kind="drop", key=self._dropped.popleft())
        self._followers.tell_all(**message)

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
        self._followers.note(error)
        self.check()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        with self._ended_if_lost(), self._followers.explained():
            yield

    @contextmanager
    def _ended_if_lost(self) -> Iterator[None]:
        """Whoever hears that a rank is gone finds the others ended."""
        try:
            yield
        except JobError:
            self.check()
            raise

    def _end_if_stuck(self, error: JobError) -> None:
        if self._is_joined and self.device.type == "cuda":
            # Whatever waits for the device now waits for a rank that is gone: only this process's end helps.
            time.sleep(_LAST_RESORT_SECONDS)
            sys.stderr.write(f"\nRankError: {error}\n")
            sys.stderr.flush()
            os._exit(1)


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
