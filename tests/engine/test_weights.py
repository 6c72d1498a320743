"""Weights go to main memory and back, and a model computes the same to the bit."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from attrs import frozen
from torch import nn

from ourvidz_core.engine.weights import Weights, modules_of

CPU = torch.device("cpu")


class Net(nn.Module):
    """All that weights may be: strided for images, tied, a buffer, half precision, a slice, empty."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        self.embed = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight
        self.tied_otherwise = nn.Parameter(self.embed.weight.detach())
        self.brief = nn.Parameter(torch.randn(3, dtype=torch.bfloat16))
        self.register_buffer("table", torch.randn(8, 6)[:, 1:3], persistent=False)
        self.register_buffer("nothing", torch.empty(0))
        self.requires_grad_(False)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        seen = self.conv(pixels).mean((2, 3)) + self.embed(torch.tensor([1])) + self.tied_otherwise[0]
        told: torch.Tensor = self.head(seen) + self.brief.float().sum() + self.table[1, 0]
        return told


@pytest.fixture
def net() -> Net:
    return Net()


@pytest.fixture
def weights(net: Net) -> Weights:
    return Weights([net], CPU)


def places(net: nn.Module) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in (*net.parameters(), *net.buffers()) if t.numel()}


def test_what_is_tied_counts_once(weights: Weights) -> None:
    conv, embed, half, table = 3 * 4 * 9 + 4, 5 * 4, 3, 8 * 2
    assert weights.size_bytes == 4 * (conv + embed + table) + 2 * half


def test_a_model_computes_the_same_to_the_bit_wherever_its_weights_have_been(net: Net, weights: Weights) -> None:
    pixels = torch.randn(2, 3, 6, 6)
    expected = net(pixels)

    for _ in range(2):
        weights.to_host()
        assert len(places(net)) == 1, "one block of main memory holds them all"
        copy = places(net)
        assert torch.equal(net(pixels), expected)
        weights.to_device()
        assert not places(net) & copy
        assert torch.equal(net(pixels), expected)

    assert net.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert net.tied_otherwise.data_ptr() == net.embed.weight.data_ptr() == net.head.weight.data_ptr()


def test_a_copy_begins_with_a_page_so_that_torch_sees_it_pinned(net: Net, weights: Weights) -> None:
    weights.to_host()
    (block,) = places(net)
    assert block % mmap.PAGESIZE == 0
    assert not weights.is_pinned, "for a processor there is no need"


def test_weights_that_come_back_leave_a_copy_and_are_not_copied_again(net: Net, weights: Weights) -> None:
    weights.to_host()
    (block,) = places(net)
    weights.to_device()
    assert weights.host_bytes >= weights.size_bytes

    weights.to_host()

    assert places(net) == {block}


def test_weights_that_move_while_a_model_infers_stay_plain_tensors(net: Net, weights: Weights) -> None:
    with torch.inference_mode():
        weights.to_host()
        weights.to_device()

    assert not any(tensor.is_inference() for tensor in (*net.parameters(), *net.buffers()))


def test_a_copy_that_is_forgotten_takes_no_main_memory(weights: Weights) -> None:
    weights.to_host()
    weights.forget_copy()
    assert weights.host_bytes > 0, "it is all there is"
    weights.to_device()

    weights.forget_copy()

    assert weights.host_bytes == 0


def test_weights_that_were_exchanged_on_the_device_are_copied_anew(net: Net, weights: Weights) -> None:
    weights.to_host()
    weights.to_device()
    net.brief.data = torch.full((3,), 7.0, dtype=torch.bfloat16)

    weights.to_host()
    weights.to_device()

    assert net.brief.tolist() == [7.0, 7.0, 7.0]


def test_weights_that_were_changed_in_place_leave_as_they_are(net: Net, weights: Weights) -> None:
    assert weights.to_host() > 0
    weights.to_device()
    assert weights.to_host() == 0, "the copy was as good"
    weights.to_device()
    with torch.no_grad():
        net.head.weight.mul_(2)
    expected = net.embed.weight.clone()

    assert weights.to_host() > 0
    weights.to_device()

    assert torch.equal(net.embed.weight, expected)
    assert torch.equal(net.tied_otherwise, expected)


def test_a_device_without_room_leaves_the_weights_where_they_were(
    net: Net, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights.to_host()
    pixels = torch.randn(1, 3, 6, 6)
    expected = net(pixels)
    make, made = torch.empty_strided, iter(range(100))

    def run_out(*args: object, **options: object) -> torch.Tensor:
        if next(made) == 2:
            raise RuntimeError("CUDA out of memory")
        return make(*args, **options)  # type: ignore[call-overload,no-any-return]

    monkeypatch.setattr(torch, "empty_strided", run_out)
    with pytest.raises(RuntimeError):
        weights.to_device()
    monkeypatch.undo()

    assert not weights.is_on_device
    assert torch.equal(net(pixels), expected)
    weights.to_device()
    assert torch.equal(net(pixels), expected)


@frozen
class Wrapper:
    pipeline: object


def holders() -> Iterator[object]:
    module = nn.Linear(2, 2)
    for make in (
        lambda m: m,
        lambda m: SimpleNamespace(unet=m, name="x", again=m),
        lambda m: Wrapper(SimpleNamespace(unet=m)),
        lambda m: {"unet": [m]},
    ):
        yield pytest.param(make, module, id=str(type(make(module)).__name__))


@pytest.mark.parametrize(("hold", "module"), list(holders()))
def test_modules_are_found_in_what_holds_them(hold: Callable[[nn.Module], object], module: nn.Module) -> None:
    assert modules_of(hold(module)) == [module]


@pytest.mark.parametrize("other", [object(), "unet", 3, None, SimpleNamespace(a=1)], ids=lambda it: type(it).__name__)
def test_what_holds_no_module_has_none(other: object) -> None:
    assert modules_of(other) == []


def test_weights_that_somebody_else_moves_are_left_to_them() -> None:
    offloaded = nn.Sequential(nn.Linear(2, 2))
    offloaded[0]._hf_hook = object()

    assert modules_of(SimpleNamespace(a=nn.Linear(2, 2), b=offloaded)) == []
    assert modules_of(nn.Linear(2, 2, device="meta")) == []
    with torch.inference_mode():
        assert modules_of(nn.Linear(2, 2)) == []
