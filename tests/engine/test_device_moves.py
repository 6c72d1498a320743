"""What only a GPU can show of the memory pool: moves to pinned memory and back, and memory that really runs out."""

from __future__ import annotations

import contextlib
import gc
import zlib
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import nn

from ourvidz_core.engine.device_memory import GIB
from ourvidz_core.engine.graphs import GraphedCall
from ourvidz_core.engine.models import ModelCache
from ourvidz_core.engine.weights import Weights
from ourvidz_core.plugins.residency import Work

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120)]

MIB = 2**20


class Net(nn.Module):
    """All that weights may be: strided for images, tied, a buffer, half precision, a slice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        self.embed = nn.Embedding(5000, 64)
        self.head = nn.Linear(64, 5000, bias=False)
        self.head.weight = self.embed.weight
        self.brief = nn.Parameter(torch.randn(3, dtype=torch.bfloat16))
        self.register_buffer("table", torch.randn(8, 6))
        self.requires_grad_(False)

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        scored: torch.Tensor = self.head(given) + self.table[1, 0] + self.brief.float().sum()
        return scored


class Block(nn.Module):
    """Takes ``mib`` of the device."""

    def __init__(self, mib: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator("cuda").manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(mib * MIB // 4, device="cuda", generator=generator))
        self.requires_grad_(False)


@pytest.fixture
def net() -> Net:
    made = Net().cuda()
    made.table = made.table[:, 1:3]
    return made


@pytest.fixture
def weights(net: Net) -> Weights:
    return Weights([net], torch.device("cuda"))


@contextlib.contextmanager
def capped(beyond_bytes: int) -> Iterator[ModelCache]:
    """torch's allocator may take so much more than what is in use, and so may the models of a cache."""
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.empty_cache()
    _, total = torch.cuda.mem_get_info()
    cap = torch.cuda.memory_reserved() + beyond_bytes
    torch.cuda.set_per_process_memory_fraction(cap / total)
    cache = ModelCache(cap / GIB)
    try:
        yield cache
        assert torch.cuda.memory_reserved() <= cap
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        cache.clear()


def tensors(net: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(net.named_parameters(remove_duplicate=False)), **dict(net.named_buffers())}


def filled(mib: int, value: float) -> torch.Tensor:
    """Leaves nothing of what lay in freed memory."""
    return torch.full((mib * MIB // 4,), value, device="cuda")


def test_weights_come_back_from_pinned_memory_as_they_were(
    net: Net, weights: Weights, caplog: pytest.LogCaptureFixture
) -> None:
    before = {name: tensor.clone() for name, tensor in tensors(net).items()}
    strides = {name: tensor.stride() for name, tensor in tensors(net).items() if name != "table"}

    for _ in range(2):
        weights.to_host()
        assert {tensor.device.type for tensor in tensors(net).values()} == {"cpu"}
        assert {tensor.is_pinned() for tensor in tensors(net).values()} == {weights.is_pinned}
        # A container may forbid it, which has to be said.
        assert weights.is_pinned or "could not be pinned (CUDA error" in caplog.text
        assert all(torch.equal(tensor, before[name].cpu()) for name, tensor in tensors(net).items())
        nan = filled(8, float("nan"))
        weights.to_device()
        assert all(tensor.is_cuda for tensor in tensors(net).values())
        assert all(torch.equal(tensor, before[name]) for name, tensor in tensors(net).items())
        del nan

    assert {name: tensor.stride() for name, tensor in tensors(net).items() if name != "table"} == strides
    assert net.head.weight.data_ptr() == net.embed.weight.data_ptr()


def test_weights_leave_the_device_and_none_of_its_memory_is_kept() -> None:
    block = Block(64, seed=1)
    weights = Weights([block], torch.device("cuda"))
    gc.collect()
    before = torch.cuda.memory_allocated()

    weights.to_host()
    assert before - torch.cuda.memory_allocated() >= 64 * MIB

    weights.to_device()
    assert torch.cuda.memory_allocated() <= before


def test_weights_that_were_changed_in_place_on_the_device_leave_as_they_are(net: Net, weights: Weights) -> None:
    weights.to_host()
    weights.to_device()
    with torch.no_grad():
        net.head.weight.mul_(2)
    expected = net.embed.weight.clone()

    assert weights.to_host() > 0
    weights.to_device()

    assert torch.equal(net.embed.weight, expected)


def test_a_graph_is_recorded_anew_where_the_weights_lie_now(net: Net, weights: Weights) -> None:
    graphed = GraphedCall(net.forward, module=net, clones=True)
    given = torch.randn(2, 64, device="cuda")
    with torch.no_grad():
        expected = graphed(given)
        torch.testing.assert_close(expected, net(given))
        assert len(graphed) == 1, "it was recorded"
        for _ in range(2):
            weights.to_host()
            # Where they were there is something else, which a graph of old would read.
            kept = filled(8, float("nan"))
            weights.to_device()
            assert torch.equal(graphed(given), expected)
            assert torch.equal(graphed(given), expected)
            assert len(graphed) == 1
            del kept


def test_models_take_turns_under_a_cap_and_keep_their_values() -> None:
    with capped(160 * MIB) as cache:
        expected = {key: _checksum(_block(cache, key)) for key in ("a", "b", "c")}
        for key in ("a", "b", "c", "b", "a"):
            assert _checksum(_block(cache, key)) == expected[key]
        assert cache.traffic.loads == 3, "none was dropped"
        assert cache.traffic.to_device >= 3


def test_an_operation_that_runs_out_of_memory_is_called_again_with_the_device_to_itself() -> None:
    calls: list[str] = []

    def work() -> float:
        calls.append("begun")
        taken = filled(120, 2.0)
        calls.append("done")
        return float(taken[-1])

    with capped(200 * MIB) as cache:
        idle, used = _checksum(_block(cache, "idle")), _checksum(_block(cache, "used"))
        # Nobody measured it yet, so no room was made.
        assert cache.residence("used").run(work, work=Work(name="work")) == 2.0
        assert calls == ["begun", "begun", "done"]
        assert (cache.traffic.retries, cache.traffic.to_host) == (1, 1)
        assert _checksum(_block(cache, "used")) == used
        assert _checksum(_block(cache, "idle")) == idle

        calls.clear()
        # What did not fit is known now, and who is idle leaves before.
        assert cache.residence("used").run(work, work=Work(name="work")) == 2.0
        assert calls == ["begun", "done"]


def test_what_does_not_fit_even_alone_says_so_and_leaves_a_device_that_works() -> None:
    with capped(120 * MIB) as cache:
        expected = _checksum(_block(cache, "a"))
        with pytest.raises(torch.OutOfMemoryError):
            cache.residence("a").run(lambda: filled(512, 1.0), work=Work(name="work"))
        assert _checksum(_block(cache, "a")) == expected
        assert float(filled(16, 3.0)[-1]) == 3.0


def _block(cache: ModelCache, key: str) -> Block:
    return cache.get(key, partial(Block, 64, seed=ord(key[0])), vram_gb=64 / 1024)


def _checksum(block: Block) -> int:
    """Of every bit, and without any of the device's memory."""
    assert block.weight.is_cuda
    return zlib.crc32(block.weight.cpu().numpy())
