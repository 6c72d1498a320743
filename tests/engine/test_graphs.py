"""Graphs change how a function is launched and nothing of its results; pacing keeps the host near the device."""

from __future__ import annotations

import logging

import pytest
import torch

from ourvidz_core.engine.graphs import GraphedCall
from ourvidz_core.engine.pacing import StepPacer


def scaled(tensors: dict[str, torch.Tensor], *, by: float) -> tuple[torch.Tensor, torch.Tensor]:
    return tensors["a"] * by + tensors["b"], tensors["a"] - tensors["b"]


def test_without_a_gpu_the_function_is_called_as_it_is():
    calls = []

    def function(tensor: torch.Tensor) -> torch.Tensor:
        calls.append(tensor)
        return tensor + 1

    graphed = GraphedCall(function)
    given = torch.zeros(2)

    with torch.no_grad():
        assert torch.equal(graphed(given), torch.ones(2))
        assert torch.equal(graphed(given), torch.ones(2))

    assert [tensor is given for tensor in calls] == [True, True]
    assert len(graphed) == 0
    graphed.forget()


def test_without_a_gpu_nothing_is_waited_for():
    pacer = StepPacer("cpu")
    for _ in range(5):
        pacer.step()


def noisy(tensor: torch.Tensor, *, is_read: bool = False) -> torch.Tensor:
    """What a graph cannot have in it where it ``is_read``: the host waits for a value."""
    noise = tensor + torch.rand_like(tensor)
    return noise * float(noise.sum()) if is_read else noise


@pytest.mark.gpu
class TestOnTheGpu:
    def test_a_replay_sees_the_new_values_of_each_shape(self):
        graphed = GraphedCall(scaled)
        with torch.no_grad():
            for size in (3, 5, 3, 5, 3):
                a, b = torch.randn(2, size, device="cuda")
                for result, expected in zip(graphed({"a": a, "b": b}, by=2.0), (a * 2 + b, a - b), strict=True):
                    assert torch.equal(result, expected)
        assert len(graphed) == 2

    def test_the_next_call_overwrites_a_result_unless_clones_are_asked_for(self):
        one, two = torch.ones(4, device="cuda"), torch.full((4,), 2.0, device="cuda")
        with torch.no_grad():
            plain, cloning = GraphedCall(torch.neg), GraphedCall(torch.neg, clones=True)
            first, cloned = plain(one), cloning(one)
            plain(two), cloning(two)
        assert torch.equal(first, -two)
        assert torch.equal(cloned, -one)

    def test_another_number_is_another_graph(self):
        graphed = GraphedCall(scaled)
        a, b = torch.randn(2, 4, device="cuda")
        with torch.no_grad():
            assert torch.equal(graphed({"a": a, "b": b}, by=2.0)[0], a * 2 + b)
            assert torch.equal(graphed({"a": a, "b": b}, by=3.0)[0], a * 3 + b)
        assert len(graphed) == 2

    def test_only_the_newest_graphs_are_kept_and_forgetting_frees_them(self):
        graphed = GraphedCall(torch.neg, capacity=2)
        with torch.no_grad():
            for size in (1, 2, 3, 2, 1, 3):
                given = torch.randn(size, device="cuda")
                assert torch.equal(graphed(given), -given)
            assert len(graphed) == 2
            graphed.forget()
            assert len(graphed) == 0
            assert torch.equal(graphed(given), -given)

    def test_what_cannot_be_captured_runs_as_it_is_with_one_warning(self, caplog: pytest.LogCaptureFixture):
        graphed = GraphedCall(lambda tensor: tensor * float(tensor.sum()))
        with torch.no_grad(), caplog.at_level(logging.WARNING):
            for _ in range(3):
                given = torch.randn(4, device="cuda")
                assert torch.equal(graphed(given), given * float(given.sum()))
                graphed.forget()
        assert len(graphed) == 0
        assert caplog.text.count("without a CUDA graph") == 1

    def test_after_a_broken_capture_the_seed_gives_its_numbers_and_memory_is_given_back(self):
        torch.manual_seed(7)
        expected = torch.stack([torch.rand(4, device="cuda") for _ in range(3)])
        stream = torch.cuda.current_stream()

        torch.manual_seed(7)
        drawn = [torch.rand(4, device="cuda")]
        with torch.no_grad():
            GraphedCall(lambda tensor: tensor * float(tensor.sum()))(drawn[0])
        drawn += [torch.rand(4, device="cuda") for _ in range(2)]

        assert torch.equal(torch.stack(drawn), expected)
        assert torch.cuda.current_stream() == stream
        assert not torch.cuda.is_current_stream_capturing()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        large = torch.empty(2**26, dtype=torch.uint8, device="cuda")
        assert torch.cuda.memory_reserved() > before
        del large
        torch.cuda.empty_cache()
        assert torch.cuda.memory_reserved() <= before

    def test_graphs_from_before_and_after_a_broken_capture_draw_the_numbers_of_the_seed(self):
        graphed = GraphedCall(noisy, clones=True)
        shorter, longer = torch.ones(4, device="cuda"), torch.ones(5, device="cuda")
        with torch.no_grad():
            graphed(shorter)
            graphed(shorter, is_read=True)
            graphed(longer)
            assert len(graphed) == 2
            for given in (shorter, longer):
                torch.manual_seed(3)
                expected = [noisy(given) for _ in range(2)]
                torch.manual_seed(3)
                assert torch.equal(graphed(given), expected[0])
                assert torch.equal(graphed(given), expected[1])

    def test_weights_that_have_moved_are_found_where_they_are(self):
        linear = torch.nn.Linear(4, 4, device="cuda")
        graphed = GraphedCall(linear, module=linear)
        given = torch.randn(2, 4, device="cuda")
        with torch.no_grad():
            graphed(given)
            old = [parameter.data for parameter in linear.parameters()]
            for parameter in linear.parameters():
                parameter.data = parameter.data.clone() * 2
            for data in old:
                data.zero_()
            assert torch.allclose(graphed(given), torch.nn.functional.linear(given, linear.weight, linear.bias))

    def test_a_result_whose_tensors_cannot_be_seen_runs_as_it_is(self, caplog: pytest.LogCaptureFixture):
        class Box:
            def __init__(self, tensor: torch.Tensor) -> None:
                self.tensor = tensor

        graphed = GraphedCall(lambda tensor: Box(tensor + 1), name="the packer", clones=True)
        with torch.no_grad(), caplog.at_level(logging.WARNING):
            first, second = (graphed(torch.full((2,), value, device="cuda")) for value in (1.0, 2.0))
        assert (first.tensor.tolist(), second.tensor.tolist()) == ([2.0, 2.0], [3.0, 3.0])
        assert "its result holds a Box" in caplog.text

    def test_gradients_are_recorded_as_ever(self):
        given = torch.ones(3, device="cuda", requires_grad=True)
        GraphedCall(torch.square)(given).sum().backward()
        assert torch.equal(given.grad, torch.full((3,), 2.0, device="cuda"))

    def test_the_host_is_at_most_two_steps_ahead(self):
        pacer = StepPacer("cuda")
        events = []
        large = torch.randn(4096, 4096, device="cuda")
        for _ in range(6):
            for _ in range(10):
                large = torch.tanh(large @ large)
            event = torch.cuda.Event()
            event.record()
            events.append(event)
            pacer.step()
            assert all(earlier.query() for earlier in events[:-2])
