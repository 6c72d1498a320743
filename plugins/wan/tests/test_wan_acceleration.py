"""What makes the transformer fast on a GPU calculates what diffusers does; shown on a CPU, in float32."""

from __future__ import annotations

import copy

import pytest
import torch
from ourvidz_wan import acceleration, attention, flash_3
from ourvidz_wan.acceleration import compile_blocks, fuse_gelu, fuse_projections, prepare_transformer, use_kernel
from ourvidz_wan.attention import Kernel, attend, best_kernel
from ourvidz_wan.parallel.exchange import Groups
from ourvidz_wan.parallel.plan import RankPlan
from ourvidz_wan.parallel.ranks import SharedPredictor
from ourvidz_wan.prediction import LocalPredictor

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pipelines(tiny_wan):
    """A text-to-video model and a VACE model."""
    return {kind: tiny_wan.make_pipeline(kind) for kind in ("t2v", "vace")}


@pytest.fixture
def transformer_of(pipelines):
    """Fresh copies of their transformers."""

    def transformer(kind="t2v"):
        return copy.deepcopy(pipelines[kind].transformer).eval().requires_grad_(False)

    return transformer


def inputs(kind="t2v", rows=1):
    generator = torch.Generator().manual_seed(1)
    given = {
        "hidden_states": torch.randn((rows, 16, 3, 10, 6), generator=generator),
        "timestep": torch.full((rows,), 700),
        "encoder_hidden_states": torch.randn((rows, 512, 32), generator=generator),
    }
    if kind == "vace":
        given["control_hidden_states"] = torch.randn((rows, 96, 3, 10, 6), generator=generator)
    return given


def predicted(transformer, **given):
    return transformer(**given, return_dict=False)[0]


@pytest.fixture
def flash_3_stand_in(monkeypatch):
    """FlashAttention 3 as some of its builds answer: with a second result."""
    calls = []

    def function(query, key, value):
        calls.append(query.shape)
        return attend(query, key, value, Kernel.TORCH).contiguous(), None

    monkeypatch.setattr(flash_3, "flash_3_function", lambda: function)
    return calls


@pytest.mark.parametrize("kernel", [kernel for kernel in Kernel if kernel is not Kernel.FLASH_3_FP8])
def test_attention_and_rotation_are_those_of_diffusers(kernel, transformer_of, flash_3_stand_in):
    plain, ours = transformer_of(), transformer_of()
    use_kernel(ours, kernel)
    torch.testing.assert_close(predicted(ours, **inputs()), predicted(plain, **inputs()), rtol=1e-5, atol=1e-6)
    # In each of two blocks the video attends to itself and to the text.
    assert len(flash_3_stand_in) == (4 if kernel is Kernel.FLASH_3 else 0)


@pytest.mark.parametrize("kind", ["t2v", "vace"])
def test_fused_and_compiled_blocks_predict_what_plain_ones_do(kind, transformer_of, monkeypatch, flash_3_stand_in):
    # The compiler's front half: it refuses what cannot be compiled as one graph.
    monkeypatch.setattr(acceleration, "BLOCK_OPTIONS", {"fullgraph": True, "backend": "eager"})
    plain, ours = transformer_of(kind), transformer_of(kind)
    use_kernel(ours, Kernel.FLASH_3)
    fuse_projections(ours)
    fuse_gelu(ours)
    compiled = compile_blocks(ours)
    torch.testing.assert_close(predicted(ours, **inputs(kind)), predicted(plain, **inputs(kind)), rtol=1e-5, atol=1e-6)
    assert len(compiled) == (2 if kind == "vace" else 1)
    assert all(call.is_compiled for call in compiled)
    assert not any("to_q." in name and "attn1" in name for name, _ in ours.named_parameters())


def test_a_cpu_keeps_the_transformer_of_diffusers(transformer_of):
    transformer = transformer_of()
    assert prepare_transformer(transformer, CPU) is None
    assert best_kernel(CPU, torch.float32, 128) is Kernel.TORCH
    assert torch.equal(predicted(transformer, **inputs()), predicted(transformer_of(), **inputs()))


@pytest.mark.parametrize(("head_dim", "tried"), [(128, [Kernel.FLASH_3, Kernel.CUDNN]), (64, [Kernel.CUDNN])])
def test_flash_attention_3_is_not_even_tried_with_heads_that_it_breaks_at(head_dim, tried, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(attention, "_works", lambda kernel, *_: bool(asked.append(kernel)))
    assert best_kernel.__wrapped__(torch.device("cuda"), torch.bfloat16, head_dim) is Kernel.TORCH
    assert asked == tried


@pytest.mark.parametrize(
    ("kernel", "context", "said"),
    [(Kernel.FLASH_3, 2, "cudnn"), (Kernel.TORCH, 2, "torch"), (Kernel.FLASH_3, 1, None)],
)
def test_the_attention_of_a_shared_prediction_is_said_as_diffusers_has_it(kernel, context, said, transformer_of):
    transformer = transformer_of()
    use_kernel(transformer, kernel)
    plan = RankPlan(offered=4, guidance=2, context=context)
    groups = Groups(plan=plan, rank=0, leaders=None, context=None)
    shared = SharedPredictor(None, "0", transformer, groups, LocalPredictor(transformer, CPU))
    shared._used = plan.ranks
    assert shared.facts == {"gpus": plan.ranks} | ({} if said is None else {"attention": said})


def test_branches_are_predicted_in_their_order(transformer_of):
    transformer = transformer_of()
    both = inputs(rows=2)
    branches = [{"encoder_hidden_states": text[None]} for text in both["encoder_hidden_states"]]
    with LocalPredictor(transformer, CPU).job(branches) as predict:
        prompted, negative = predict(both["hidden_states"][:1], both["timestep"][:1])
    for branch, prediction in zip(branches, (prompted, negative), strict=True):
        assert torch.equal(prediction, predicted(transformer, **{**inputs(), **branch}))
    assert not torch.equal(prompted, negative)
