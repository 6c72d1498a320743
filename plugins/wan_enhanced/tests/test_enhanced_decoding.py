"""Tokens one after another: those that transformers' own loop makes, by every decoder."""

from __future__ import annotations

import pytest
import torch
from ourvidz_wan_enhanced.decoding import (
    CACHE_TOKENS,
    REPETITION_PENALTY,
    SPANS,
    TOP_K,
    Draws,
    GraphedDecoder,
    PlainDecoder,
    TokenChoice,
    is_graphable,
    make_decoder,
)
from ourvidz_wan_enhanced.effort import Effort, finish_in_time
from ourvidz_wan_enhanced.layers import FixedCacheModel, decode_layer, fuse_projections
from ourvidz_wan_enhanced.local import LocalWriter, load_writer
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from ourvidz_core.engine.weights import Weights

GIVEN = tuple(range(40, 70))


SIZES = {
    "vocab_size": 200,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "max_position_embeddings": 4096,
}


def make_model(**changes) -> Qwen2ForCausalLM:
    """Qwen2 as published, with groups of query heads, only small and untaught."""
    torch.manual_seed(3)
    return _settled(Qwen2ForCausalLM(Qwen2Config(**SIZES | changes)))


def _settled(model):
    """A model whose norms and biases are not all ones and zeros, as those of an untaught one are."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1:
                weight.copy_(torch.rand_like(weight) + (0.5 if "norm" in name else -0.5))
    return model.eval().requires_grad_(False)


def forced(model, given: torch.Tensor, number: int, compiled=None) -> list[torch.Tensor]:
    """The scores of the fixed cache after each of the last ``number`` tokens, of a model that is fused from here on."""
    fixed = FixedCacheModel(model, room=64, compiled=compiled)
    fixed.reserve()
    found = []
    with torch.inference_mode():
        for place in range(given.shape[1]):
            mask = torch.where(torch.arange(64) > place, -torch.inf, 0.0).to(model.dtype)
            found.append(fixed.next_scores(given[:, place : place + 1], torch.tensor([place]), mask))
    return found[-number:]


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def graphed():
    decoder = GraphedDecoder(make_model())
    decoder.prepare(GIVEN[:5])
    return decoder


@pytest.fixture
def compiles():
    """How many graphs were compiled since the test began, none of which was there before."""
    import torch._dynamo

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]


class DrawnInTheLoop(LogitsProcessor):
    """The rule of the draw in transformers' own loop: leaves the model only the token that is drawn."""

    def __init__(self, draws: Draws, start: int) -> None:
        self.numbers = torch.rand(draws.max_tokens + 1, generator=torch.Generator().manual_seed(draws.seed)).tolist()
        self.draws, self.start = draws, start

    def __call__(self, input_ids, scores):
        likely, tokens = scores.topk(min(TOP_K, scores.shape[-1]))
        shares = torch.softmax(likely / (self.draws.temperature or 1.0), dim=-1)[0].tolist()
        kept, total = [], 0.0
        for share in shares if self.draws.temperature else shares[:1]:
            if total >= self.draws.top_p:
                break
            total += share
            kept.append(total)
        number = self.numbers[input_ids.shape[1] - self.start] * total
        place = next((place for place, reached in enumerate(kept) if reached > number), len(kept) - 1)
        return torch.full_like(scores, -torch.inf).index_fill(1, tokens[0, place : place + 1], 0.0)


def generated(model, draws: Draws) -> list[int]:
    given = torch.tensor([GIVEN])
    config = GenerationConfig(
        do_sample=False, repetition_penalty=REPETITION_PENALTY, pad_token_id=0, max_new_tokens=draws.max_tokens
    )
    whole = model.generate(
        given,
        attention_mask=torch.ones_like(given),
        generation_config=config,
        logits_processor=LogitsProcessorList([DrawnInTheLoop(draws, len(GIVEN))]),
    )
    return whole[0, len(GIVEN) :].tolist()


def decoded(decoder, draws: Draws, given=GIVEN) -> list[int]:
    with torch.inference_mode():
        decoder.begin(given, draws)
        for _ in range(draws.max_tokens - 1):
            decoder.step()
    return [decoder.token(index) for index in range(draws.max_tokens)]


@pytest.mark.parametrize(
    "draws",
    [
        Draws(seed=1, max_tokens=24, temperature=0.7, top_p=0.8),
        Draws(seed=2, max_tokens=24, temperature=2.0, top_p=1.0),
        Draws(seed=3, max_tokens=24, temperature=0.0, top_p=0.8),
    ],
    ids=["as set", "free", "greedy"],
)
def test_every_decoder_makes_the_tokens_of_transformers_own_loop(draws, model, graphed):
    expected = generated(model, draws)
    assert len(set(expected)) > 5
    assert decoded(PlainDecoder(model), draws) == expected
    assert decoded(graphed, draws) == expected
    # Nothing of one text is left in the next.
    other = Draws(seed=9, max_tokens=5, temperature=1.0, top_p=0.9)
    decoded(graphed, other, given=GIVEN[:7])
    assert decoded(graphed, draws) == expected


def test_a_fixed_cache_gives_the_scores_of_a_growing_one_also_past_its_first_span(model, graphed):
    given = torch.tensor([[(7 * place) % 200 for place in range(SPANS[0] + 40)]])
    plain, start = PlainDecoder(model), SPANS[0] - 3
    with torch.inference_mode():
        expected = [plain.scores(given[:, :start])]
        expected += [plain.scores(given[:, place : place + 1]) for place in range(start, start + 6)]
        graphed.begin(given[0, :start].tolist(), Draws(seed=0, max_tokens=20, temperature=0.0, top_p=1.0))
        found = []
        for place in range(start, start + 6):
            span = SPANS[0] if place < SPANS[0] else SPANS[1]
            found.append(graphed._next(given[:, place : place + 1], graphed._position, span))
            graphed._position.add_(1)
    for ours, theirs in zip(found, expected[1:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (Qwen2Config(**SIZES), Qwen2ForCausalLM),
        (Qwen3Config(**SIZES, head_dim=16), Qwen3ForCausalLM),
        (LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True, tie_word_embeddings=True), LlamaForCausalLM),
    ],
    ids=["qwen2", "qwen3", "llama"],
)
def test_a_token_gets_the_scores_that_transformers_gives_it(config, kind):
    torch.manual_seed(4)
    model = _settled(kind(config))
    assert is_graphable(model)
    given = torch.tensor([GIVEN])
    with torch.inference_mode():
        expected = model(given).logits[0, -6:]
    torch.testing.assert_close(torch.cat(forced(model, given, 6)), expected, rtol=1e-4, atol=1e-4)
    # The model's own code goes on as before with the fused weights.
    with torch.inference_mode():
        torch.testing.assert_close(model(given).logits[0, -6:], expected, rtol=1e-5, atol=1e-5)


def test_in_half_precision_the_scores_are_as_near_to_the_exact_ones_as_those_of_transformers():
    sizes = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "initializer_range": 0.07}
    exact, model = make_model(**sizes), make_model(**sizes).bfloat16()
    given = torch.tensor([GIVEN])
    with torch.inference_mode():
        expected = exact(given).logits[0, -20:]
        plain = PlainDecoder(model)
        theirs = torch.cat([plain.scores(token[None, None]) for token in given[0]])[-20:]

    def error(scores: torch.Tensor) -> float:
        return float((scores.float() - expected).norm() / expected.norm())

    compiled = torch.compile(decode_layer, backend="aot_eager", fullgraph=True, dynamic=False)
    for made in (None, compiled):
        assert 0 < error(torch.cat(forced(model, given, 20, made))) < 1.25 * error(theirs) < 0.2


def test_all_layers_are_compiled_once_for_each_span(model, compiles):
    decoder = GraphedDecoder(make_model())
    decoder._fixed._decode_layer = torch.compile(decode_layer, backend="aot_eager", fullgraph=True, dynamic=False)
    with torch.inference_mode():
        decoder.prepare(GIVEN[:5])
    draws = Draws(seed=1, max_tokens=12, temperature=0.7, top_p=0.8)
    assert decoded(decoder, draws) == decoded(PlainDecoder(model), draws)
    assert compiles() == len(SPANS)


def test_fused_weights_are_there_once_and_move_as_others_do():
    model = make_model()
    before = Weights([model], torch.device("cpu")).size_bytes
    given = torch.tensor([GIVEN])
    with torch.inference_mode():
        expected = forced(model, given, 1)[0]
        fuse_projections(model)  # nothing is left to fuse
    weights = Weights([model], torch.device("cpu"))
    assert weights.size_bytes == before
    weights.to_host()
    assert torch.equal(forced(model, given, 1)[0], expected)


def test_a_text_that_has_no_room_is_refused(graphed):
    with pytest.raises(ValueError, match=f"{CACHE_TOKENS} have room"):
        graphed.begin([1] * (CACHE_TOKENS - 10), Draws(seed=0, max_tokens=11, temperature=0.0, top_p=1.0))


def test_the_draw_follows_the_shares_of_the_likeliest_tokens():
    scores = torch.log(torch.tensor([[0.05, 0.4, 0.35, 0.2]]))
    choice = TokenChoice(4, device=torch.device("cpu"), room=4001)
    choice.begin(torch.tensor([], dtype=torch.long), Draws(seed=9, max_tokens=4000, temperature=1.0, top_p=0.7))
    for _ in range(4000):
        choice._is_seen.zero_()
        choice.draw(scores)
    counts = torch.bincount(choice.tokens[:4000], minlength=4).tolist()
    # 0.4 and 0.35 together make 0.7; the others are left out.
    assert counts[0] == counts[3] == 0
    assert counts[1] / 4000 == pytest.approx(0.4 / 0.75, abs=0.03)


def test_what_was_said_becomes_less_likely():
    choice = TokenChoice(3, device=torch.device("cpu"))
    choice.begin(torch.tensor([2]), Draws(seed=0, max_tokens=3, temperature=0.0, top_p=1.0))
    scores = torch.tensor([[1.0, 1.02, 1.03]])
    assert [int(choice.draw(scores)) for _ in range(3)] == [1, 0, 2]


def test_a_model_that_answers_otherwise_over_a_fixed_cache_is_left_as_it_was(monkeypatch):
    model = make_model()
    before = decoded(PlainDecoder(model), Draws(seed=1, max_tokens=8, temperature=0.7, top_p=0.8))
    decoder = GraphedDecoder(model)
    monkeypatch.setattr(decoder, "_next", lambda *_: torch.randn(1, 200))
    with torch.inference_mode(), pytest.raises(ValueError, match="differ from the model's"):
        decoder.prepare(GIVEN[:5])
    assert decoded(PlainDecoder(model), Draws(seed=1, max_tokens=8, temperature=0.7, top_p=0.8)) == before


def test_layers_that_see_a_window_only_are_not_recorded(model):
    assert is_graphable(model)
    sliding = make_model(use_sliding_window=True, sliding_window=8, max_window_layers=1)
    assert not is_graphable(sliding)
    mistral = MistralForCausalLM(
        MistralConfig(vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    )
    assert not is_graphable(mistral)
    assert make_decoder(model, GIVEN).manner == "plain"  # on a CPU each is


def test_a_writer_says_the_same_with_a_fixed_cache(babbling_dir, task):
    plain, other = load_writer(babbling_dir), load_writer(babbling_dir)
    decoder = GraphedDecoder(other._model)
    decoder.prepare(other.encode_text("a fox runs"))
    fixed = LocalWriter(other._model, other._tokenizer, name="fixed", decoder=decoder)
    for seed in (1, 2):
        asked = task(max_tokens=12, seed=seed)
        assert fixed.write(asked, Effort(60.0)).text == plain.write(asked, Effort(60.0)).text

    # A text that does not fit is made without it, and says so.
    decoder.room = 12
    long = fixed.write(asked, Effort(60.0))
    assert (long.text, long.decoding) == (plain.write(asked, Effort(60.0)).text, "plain")


@pytest.mark.slow
def test_compiled_decoding_makes_the_same_text_and_is_compiled_once(qwen_dir, task, compiles):
    writer, other = load_writer(qwen_dir), load_writer(qwen_dir)
    decoder = GraphedDecoder(other._model, compiled=True)
    with torch.inference_mode():
        decoder.prepare(other.encode_text("a fox runs"))
    assert decoder.manner == "compiled"
    # One for each span, and not one for each layer.
    assert compiles() == len(SPANS)
    compiled = LocalWriter(other._model, other._tokenizer, name="compiled", decoder=decoder)
    for prompt in ("a fox", "a small boat crosses a calm lake at dawn"):
        asked = task(prompt=prompt)
        effort = Effort(60.0)
        # Each prompt has a thread of its own.
        draft = finish_in_time(effort, lambda asked=asked, effort=effort: compiled.write(asked, effort))
        assert draft.text == writer.write(asked, Effort(60.0)).text
    assert compiles() == len(SPANS)


def test_what_was_recorded_is_forgotten_and_made_again(model, graphed):
    draws = Draws(seed=1, max_tokens=12, temperature=0.7, top_p=0.8)
    expected = decoded(PlainDecoder(model), draws)
    assert decoded(graphed, draws) == expected
    graphed.forget()
    with pytest.raises(RuntimeError, match="left the device"):
        graphed.step()
    assert decoded(graphed, draws) == expected
