"""What the training scripts share: an end that comes on time, averaged weights, logs, checkpoints, export.

Started by ``torchrun``, each process trains on a GPU of its own with its own scenes, and gradients are averaged.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed
from torch.nn import functional

logger = logging.getLogger(__name__)

#: Seconds between two checkpoints.
_CHECKPOINT_EVERY = 60.0
_LOGGED_EVERY = 50
#: Steps of a kind before it is recorded: what they compile and allocate is there then.
_TRIES = 3


def start(seed: int) -> torch.device:
    """Seed everything, and say where to work."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if "RANK" in os.environ:
        distributed.init_process_group()
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
    seed += rank()
    level = logging.INFO if rank() == 0 else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(name)s %(message)s", datefmt="%H:%M:%S", force=True)
    for noisy in ("transformers", "diffusers", "httpx"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    return device


def rank() -> int:
    """This process's place among those that train together; 0 writes down what they made."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The command line that all training scripts have."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("directory", type=Path, help="where to write the model, in the diffusers layout")
    parser.add_argument("--work", type=Path, default=Path("build/training"), help="logs and checkpoints to go on from")
    parser.add_argument("--weights", type=Path, help="begin with the weights of an exported model")
    parser.add_argument("--seed", type=int, default=20251122)
    parser.add_argument("--scenes", type=int, help="how many scenes to draw")
    return parser


def diffusion_arguments(
    description: str | None, *, batch: int, rate: float, plain_part: float
) -> argparse.ArgumentParser:
    """The command line of a model whose autoencoder is trained before what draws."""
    parser = arguments(description)
    parser.add_argument("--vae-steps", type=int, default=20000, help="0: the autoencoder stays as it is")
    parser.add_argument("--vae-seconds", type=float, default=1e6)
    parser.add_argument("--steps", type=int, default=100000, help="0: what draws stays as it is")
    parser.add_argument("--seconds", type=float, default=1e6)
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--rate", type=float, default=rate)
    parser.add_argument("--plain-part", type=float, default=plain_part, help="part of the training without guidance")
    return parser


def place(parts: Sequence[torch.nn.Module], device: torch.device) -> None:
    """Move what is trained to ``device``, and tell its size."""
    for part in parts:
        logger.info("%s: %.2f M weights", type(part).__name__, sum(p.numel() for p in part.parameters()) / 1e6)
        part.to(device).train()


class Run:
    """One model's training: steps until a number of them or a time is reached, whichever is first.

    Learning rates follow the part that is done, so that a run always ends with small steps,
    on a slow machine too.
    """

    def __init__(
        self,
        name: str,
        modules: Sequence[torch.nn.Module],
        *,
        work: Path,
        steps: int,
        seconds: float,
        rate: float,
        decay: float = 0.999,
        warm_up: int = 200,
        matrices: Sequence[torch.nn.Parameter] = (),
    ) -> None:
        """``matrices`` are learnt by Muon, at twice the rate; all other weights by AdamW."""
        self.name, self.modules, self.work = name, list(modules), work
        self.steps, self.seconds, self.warm_up = steps, seconds, warm_up
        self.parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
        by_muon = {id(matrix) for matrix in matrices}
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(
                [p for p in self.parameters if id(p) not in by_muon],
                lr=rate,
                betas=(0.9, 0.98),
                weight_decay=1e-4,
                fused=self.parameters[0].is_cuda,
                capturable=self.parameters[0].is_cuda,
            )
        ]
        if matrices:
            # Steps of a size for which AdamW's rates are right.
            self.optimizers.append(
                torch.optim.Muon(matrices, lr=2 * rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
            )
        self._rates = [optimizer.param_groups[0]["lr"] for optimizer in self.optimizers]
        #: The part of its rate that a step takes, and what it adds of the weights to their average: on the device.
        self._part, self._added = (torch.zeros((), device=self.parameters[0].device) for _ in range(2))
        self._graphs: dict[str, Any] = {}
        self._tries: dict[str, int] = {}
        self.decay = decay
        self.done = 0.0
        self._agreement: Any = None
        if distributed.is_initialized():
            # Of plain numbers, so that nobody waits for a GPU.
            self._agreement = distributed.new_group(backend="gloo")
            for module in modules:
                for tensor in (*module.parameters(), *module.buffers()):
                    distributed.broadcast(tensor.data, 0)
        self.averaged = [p.detach().clone() for p in self.parameters]
        self.step, self.spent = 0, 0.0
        self.log: list[dict[str, float]] = []
        self._sums: dict[str, torch.Tensor] = {}
        self._saved = time.monotonic()
        work.mkdir(parents=True, exist_ok=True)
        if self._checkpoint.is_file():
            self._resume()

    def __iter__(self) -> Iterator[int]:
        """Yield the steps that are left. On SIGTERM, write down what going on needs, and end the process."""
        stops: list[int] = []
        signal.signal(signal.SIGTERM, lambda number, _: stops.append(number))
        begun = time.monotonic() - self.spent
        while self._agree() < 1.0:
            falling = 0.5 + 0.5 * math.cos(math.pi * self.done) + 0.002
            part = min(1.0, (self.step + 1) / self.warm_up) * falling
            self._set_rates(part)
            self._part.fill_(part)
            yield self.step
            self.spent = time.monotonic() - begun
            if stops or time.monotonic() - self._saved > _CHECKPOINT_EVERY:
                self.save()
            if stops:
                raise SystemExit(f"{self.name} was stopped at step {self.step}; started again, it goes on")
        self.save()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _agree(self) -> float:
        """The part of the run that is done, from 0 to 1, the same in all processes."""
        part = torch.tensor([min(1.0, max(self.step / max(1, self.steps), self.spent / self.seconds))])
        if self._agreement is not None:
            distributed.broadcast(part, 0, group=self._agreement)
        self.done = float(part)
        return self.done

    def learn(self, loss: torch.Tensor, **parts: torch.Tensor) -> None:
        """One step against ``loss``; it and ``parts`` go into the log."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self._agreement is not None:
            self._average_gradients()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(self.averaged, [p.detach() for p in self.parameters], self._kept())
        self._count({"loss": loss, **parts})
        self._take_down()

    def learn_by(self, name: str, losses: Callable[[], Mapping[str, torch.Tensor]]) -> None:
        """One step against the ``loss`` among ``losses()``, all of which go into the log.

        On one GPU the whole step is recorded once for each ``name`` and replayed: a small model's step is some
        thousands of launches, which take the host several times as long as the device. ``losses`` must
        do the same launches each time; what it draws is drawn on the device.
        """
        self._set_rates(1.0)
        self._added.fill_(self._kept())
        if not self.parameters[0].is_cuda or self._agreement is not None:
            self._whole_step(losses)
        elif self._tries.get(name, 0) < _TRIES:
            self._tries[name] = self._tries.get(name, 0) + 1
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._whole_step(losses)
            torch.cuda.current_stream().wait_stream(stream)
        else:
            if name not in self._graphs:
                self._graphs[name] = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self._graphs[name]):
                    self._whole_step(losses)
            self._graphs[name].replay()
        self._take_down()

    def _whole_step(self, losses: Callable[[], Mapping[str, torch.Tensor]]) -> None:
        values = losses()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        values["loss"].backward()
        if self._agreement is not None:
            self._average_gradients()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        with torch.no_grad():
            before = [p.detach().clone() for p in self.parameters]
            for optimizer in self.optimizers:
                optimizer.step()
            # Rates are numbers of the host, which a recorded step would keep; a part of a whole step is the same.
            for parameter, old, averaged in zip(self.parameters, before, self.averaged, strict=True):
                parameter.copy_(torch.lerp(old, parameter, self._part))
                averaged.lerp_(parameter, self._added)
            self._count(values)

    def _set_rates(self, part: float) -> None:
        for optimizer, rate in zip(self.optimizers, self._rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * part

    def _kept(self) -> float:
        """What a step adds of the weights to their average."""
        return 1 - min(self.decay, (2 + self.step) / (11 + self.step))

    def _count(self, values: Mapping[str, torch.Tensor]) -> None:
        for key, value in values.items():
            if key not in self._sums:
                self._sums[key] = torch.zeros((), device=value.device)
            self._sums[key] += value.detach().float()

    def _take_down(self) -> None:
        self.step += 1
        if self.step % _LOGGED_EVERY == 0:
            means = {key: round(float(value) / _LOGGED_EVERY, 5) for key, value in self._sums.items()}
            for value in self._sums.values():
                value.zero_()
            self.log.append({"step": self.step, "seconds": round(self.spent, 1), **means})
            if self.step % (10 * _LOGGED_EVERY) == 0:
                logger.info("%s %s", self.name, self.log[-1])

    def _average_gradients(self) -> None:
        # A part of the model that this step did not use has no gradient, in any process.
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        together = torch.cat([gradient.flatten() for gradient in gradients])
        distributed.all_reduce(together)
        together /= distributed.get_world_size()
        parts = together.split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(
            gradients, [part.view_as(gradient) for part, gradient in zip(parts, gradients, strict=True)]
        )

    def average(self) -> None:
        """Put the averaged weights into the modules."""
        with torch.no_grad():
            for parameter, averaged in zip(self.parameters, self.averaged, strict=True):
                parameter.copy_(averaged)

    def save(self) -> None:
        """Write down what going on needs, and the loss curve."""
        self._saved = time.monotonic()
        if rank() != 0:
            return
        state = {
            "modules": [module.state_dict() for module in self.modules],
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "averaged": self.averaged,
            "step": self.step,
            "spent": self.spent,
            "log": self.log,
        }
        unfinished = self._checkpoint.with_suffix(".part")
        torch.save(state, unfinished)
        unfinished.replace(self._checkpoint)
        (self.work / f"{self.name}.json").write_text(json.dumps(self.log), "utf-8")

    @property
    def _checkpoint(self) -> Path:
        return self.work / f"{self.name}.pt"

    def _resume(self) -> None:
        state: dict[str, Any] = torch.load(self._checkpoint, map_location="cpu", weights_only=True)
        for module, weights in zip(self.modules, state["modules"], strict=True):
            module.load_state_dict(weights)
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        for averaged, saved in zip(self.averaged, state["averaged"], strict=True):
            averaged.copy_(saved)
        self.step, self.spent, self.log = state["step"], state["spent"], state["log"]
        logger.info("%s goes on from step %d", self.name, self.step)


def guided_losses(predicted: torch.Tensor, target: torch.Tensor, guidance: float) -> dict[str, torch.Tensor]:
    """What makes guidance at ``guidance`` exact.

    ``predicted`` are those with a text and then as many without; the latter learn ``target`` by themselves.
    """
    with_text, without = predicted.chunk(2)
    guided = without.detach() + guidance * (with_text - without.detach())
    guided_loss, plain_loss = functional.mse_loss(guided, target), functional.mse_loss(without, target)
    return {"loss": guided_loss + plain_loss, "guided": guided_loss, "untold": plain_loss}


def export(pipeline: Any, directory: Path, variant: str) -> None:
    """Write ``pipeline`` in half precision, in files that a repository takes, with its ``variant.toml``."""
    if rank() != 0:
        return
    directory.mkdir(parents=True, exist_ok=True)
    for component in list(pipeline.components.values()):
        if isinstance(component, torch.nn.Module):
            component.to("cpu", torch.float16)
    pipeline.save_pretrained(str(directory), max_shard_size="14MB")
    for path in directory.rglob("config.json"):
        # Where the weights that it began with lay is nobody's business.
        config = {key: value for key, value in json.loads(path.read_text("utf-8")).items() if key != "_name_or_path"}
        path.write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    (directory / "variant.toml").write_text(variant, "utf-8")


def token_rows(tokenizer: Any, texts: Sequence[str], length: int) -> torch.Tensor:
    """Tokens of many texts as int16, filled up to ``length``, the last token kept where a text is cut."""
    rows = np.full((len(texts), length), tokenizer.pad_token_id, np.int16)
    for begin in range(0, len(texts), 20000):
        for row, ids in enumerate(tokenizer(texts[begin : begin + 20000], truncation=False).input_ids, begin):
            kept = ids if len(ids) <= length else [*ids[: length - 1], ids[-1]]
            rows[row, : len(kept)] = kept
    return torch.from_numpy(rows)


def psnr(ours: torch.Tensor, exact: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures from -1 to 1, the mean over the first axis."""
    error = ((ours.float() - exact.float()) ** 2).flatten(1).mean(1) / 4
    return float((-10 * torch.log10(error.clamp(min=1e-10))).mean())


def bytes_of(pictures: torch.Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Pictures from -1 to 1, channels first, as bytes with the channels last."""
    scaled = ((pictures.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    result: np.ndarray[Any, np.dtype[np.uint8]] = scaled.movedim(1, -1).cpu().numpy()
    return result
