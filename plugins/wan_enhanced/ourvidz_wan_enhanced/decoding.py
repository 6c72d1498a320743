"""Tokens one after another: how likely each is, which one is drawn, and the step that a GPU repeats without its host.

transformers' ``generate`` launches each small kernel of each token from Python and waits for
the token; a GPU is idle most of that time. Here the whole step, from a token to the next one
drawn, is recorded once as a CUDA graph. Nothing in it comes from the host: the place in the
cache, the numbers of the draw and what was said already lie on the device.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from attrs import frozen
from transformers import DynamicCache

from ourvidz_core.engine.compilation import CompiledCall, may_compile
from ourvidz_core.engine.graphs import GraphedCall
from ourvidz_wan_enhanced.layers import LAYERED_TYPES, FixedCacheModel, decode_layer

logger = logging.getLogger(__name__)

#: Only the likeliest tokens are drawn from, and what was said becomes a little less likely: as Qwen2.5 ships it.
TOP_K = 20
REPETITION_PENALTY = 1.05
#: Room of a fixed cache: every instruction of ours, 2000 characters of any script, 384 tokens of an answer.
CACHE_TOKENS = 3072
#: A step looks at this much of the cache, the least that holds what was said; each size is a graph of its own.
SPANS = (1024, 2048, CACHE_TOKENS)
#: Tokens that the device may be ahead of the host, which looks for the end: so many are drawn in vain.
STEPS_AHEAD = 2
#: Logits of a graph that differ by more, relatively, are of another model: in half precision it is about 0.01.
_TOLERANCE = 0.1


@frozen(kw_only=True)
class Draws:
    """How the tokens of one text are drawn."""

    seed: int
    max_tokens: int
    #: 0 takes the likeliest token each time.
    temperature: float
    top_p: float


class TokenChoice:
    """Draws tokens by numbers of its own sequence, on the device of the scores. One text at a time.

    transformers draws from torch's global generator: another job's noise would depend on
    how many words a prompt was given, and its wording on the noise.
    """

    def __init__(self, vocabulary: int, *, device: torch.device, room: int = CACHE_TOKENS) -> None:
        #: The tokens drawn so far, in their order, and how many they are.
        self.tokens = torch.zeros(room, dtype=torch.long, device=device)
        self.count = torch.zeros(1, dtype=torch.long, device=device)
        self._numbers = torch.zeros(room, device=device)
        self._is_seen = torch.zeros(vocabulary, dtype=torch.bool, device=device)
        self._temperature = torch.ones((), device=device)
        self._top_p = torch.ones((), device=device)

    def begin(self, given: torch.Tensor, draws: Draws) -> None:
        """A new text, after the tokens ``given``."""
        numbers = torch.rand(draws.max_tokens + 1, generator=torch.Generator("cpu").manual_seed(draws.seed))
        self._numbers[: len(numbers)].copy_(numbers)
        # Of no share at all, the likeliest token is left.
        self._temperature.fill_(draws.temperature or 1.0)
        self._top_p.fill_(draws.top_p if draws.temperature else 0.0)
        self._is_seen.zero_()
        self._is_seen[given] = True
        self.count.zero_()

    def draw(self, scores: torch.Tensor) -> torch.Tensor:
        """The next token, drawn by its ``scores`` (1, vocabulary), and remembered. Waits for nothing."""
        scores = scores.float()
        less = torch.where(scores < 0, scores * REPETITION_PENALTY, scores / REPETITION_PENALTY)
        scores = torch.where(self._is_seen, less, scores)
        likely, tokens = scores.topk(min(TOP_K, scores.shape[-1]))
        shares = torch.softmax(likely / self._temperature, dim=-1)
        reached = shares.cumsum(dim=-1)
        # The likeliest tokens that together make top_p, the one that reaches it included.
        reached = reached.where(reached - shares < self._top_p, torch.inf)
        total = reached.where(reached < torch.inf, 0.0).amax(dim=-1, keepdim=True)
        number = self._numbers.index_select(0, self.count)
        # At least the first, for at a share of 0 none is reached.
        token = tokens.gather(-1, (reached <= number * total).sum(dim=-1, keepdim=True))
        self._is_seen.index_fill_(0, token[0], True)
        self.tokens.index_copy_(0, self.count, token[0])
        self.count.add_(1)
        return token


class Decoder(Protocol):
    """Continues a text, token by token."""

    #: Tokens that may be asked for before the first of them is read.
    steps_ahead: int
    #: Tokens that a text may have, those drawn included.
    room: float

    @property
    def manner(self) -> str:
        """How it works, in words: for facts."""
        ...

    def begin(self, given: Sequence[int], draws: Draws) -> None:
        """Read ``given`` and draw the first token after it."""
        ...

    def step(self) -> None:
        """Draw one more token."""
        ...

    def token(self, index: int) -> int:
        """The token of a step, the first being 0; waits until it is drawn."""
        ...

    def forget(self) -> None:
        """Free what can be made again: the weights leave the device."""
        ...


class PlainDecoder:
    """Runs the model as ``generate`` does, for every architecture and device."""

    steps_ahead = 0
    room = math.inf
    manner = "plain"

    def __init__(self, model: Any) -> None:
        self._model = model
        self._choice = TokenChoice(_vocabulary(model), device=model.device)
        self._keeps_logits = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}
        self._cache = DynamicCache(config=model.config)
        self._last: Any = None

    def begin(self, given: Sequence[int], draws: Draws) -> None:
        """See :meth:`Decoder.begin`."""
        tokens = torch.tensor([given], device=self._model.device)
        self._choice.begin(tokens[0], draws)
        self._cache = DynamicCache(config=self._model.config)
        self._last = self._choice.draw(self.scores(tokens))

    def step(self) -> None:
        """See :meth:`Decoder.step`."""
        self._last = self._choice.draw(self.scores(self._last))

    def token(self, index: int) -> int:
        """See :meth:`Decoder.token`."""
        return int(self._choice.tokens[index])

    def forget(self) -> None:
        """See :meth:`Decoder.forget`."""
        self._cache = DynamicCache(config=self._model.config)

    def scores(self, tokens: torch.Tensor) -> torch.Tensor:
        """The scores (1, vocabulary) after ``tokens`` (1, number), which come after those of the calls before."""
        answer = self._model(tokens, past_key_values=self._cache, use_cache=True, **self._keeps_logits)
        scores: torch.Tensor = answer.logits[:, -1]
        return scores


class GraphedDecoder:
    """Runs a step as a CUDA graph over a cache of a fixed size. On a CPU the same, call by call.

    Prepare it before its first text, while nothing else works on the device: recording and
    compiling take their time. From then on a step is one launch, from any thread. Weights
    that were moved since are noticed at the next text, and the graphs are recorded anew: in
    that text's thread, while the engine's own waits for it and leaves the device alone. Should
    its deadline pass meanwhile, what the engine does then neither enters the graph nor breaks it.
    """

    room: float = CACHE_TOKENS

    def __init__(self, model: Any, *, compiled: bool | None = None) -> None:
        self._model = model
        self._device: torch.device = model.device
        self._has_graphs = self._device.type == "cuda"
        self.steps_ahead = STEPS_AHEAD if self._has_graphs else 0
        self._choice = TokenChoice(_vocabulary(model), device=self._device)
        self._position = torch.zeros(1, dtype=torch.long, device=self._device)
        self._token = torch.zeros((1, 1), dtype=torch.long, device=self._device)
        self._advance_once = GraphedCall(self._advance, name="the language model's step")
        self._recorded_weights: tuple[int, ...] = ()
        may = may_compile(str(self._device)) if compiled is None else compiled
        self._compiled = CompiledCall(decode_layer, name="the language model", fullgraph=True) if may else None
        self._fixed = FixedCacheModel(model, room=CACHE_TOKENS, compiled=self._compiled)
        self._given = 0
        self._steps = 0
        if self._has_graphs:
            self._drawn = torch.zeros(CACHE_TOKENS, dtype=torch.long, pin_memory=True)
            self._is_drawn = [torch.cuda.Event() for _ in range(STEPS_AHEAD + 2)]

    @property
    def manner(self) -> str:
        """See :class:`Decoder`."""
        is_compiled = self._compiled is not None and self._compiled.is_compiled
        names = [name for name, is_used in (("graph", len(self._advance_once)), ("compiled", is_compiled)) if is_used]
        return " and ".join(names) or "fixed cache"

    def prepare(self, probe: Sequence[int]) -> None:
        """Compile and record the steps, and hold them against the model as it comes.

        :raises ValueError: they give other scores for ``probe`` and what follows it.
        """
        plain = PlainDecoder(self._model)
        given = torch.tensor([probe], device=self._device)
        expected = [plain.scores(given[:, :-1]), plain.scores(given[:, -1:])]
        try:
            self._fixed.reserve()
            found = [self._read(given[:, :-1])]
            self._token.copy_(given[:, -1:])
            found.append(self._next(self._token, self._position, SPANS[0]))
            for ours, theirs in zip(found, expected, strict=True):
                error = float((ours.float() - theirs.float()).norm() / theirs.float().norm())
                if not error < _TOLERANCE:
                    raise ValueError(f"its scores differ from the model's by {error:.2g}")
            self._record()
        except BaseException:
            self.forget()
            raise

    def begin(self, given: Sequence[int], draws: Draws) -> None:
        """See :meth:`Decoder.begin`.

        :raises ValueError: the text could become longer than the cache.
        """
        if len(given) + draws.max_tokens > self.room:
            raise ValueError(f"{len(given)} tokens and {draws.max_tokens} more are too many; {self.room} have room")
        if self._weights() != self._recorded_weights:
            self._record()
        tokens = torch.tensor([given], device=self._device)
        self._choice.begin(tokens[0], draws)
        self._token.copy_(self._choice.draw(self._read(tokens)))
        self._given = len(given)
        self._steps = 0
        self._hand_over()

    def step(self) -> None:
        """See :meth:`Decoder.step`."""
        if not self._recorded_weights:  # a text that nobody waits for any more
            raise RuntimeError("the weights left the device in the middle of a text")
        self._advance_once(self._position, _span(self._given + self._steps + 1))
        self._steps += 1
        self._hand_over()

    def token(self, index: int) -> int:
        """See :meth:`Decoder.token`."""
        if not self._has_graphs:
            return int(self._choice.tokens[index])
        # Without the interpreter's lock: others go on while the device works.
        self._is_drawn[index % len(self._is_drawn)].synchronize()
        return int(self._drawn[index])

    def forget(self) -> None:
        """See :meth:`Decoder.forget`. The next text begins with recording."""
        self._recorded_weights = ()
        self._advance_once.forget()
        self._fixed.forget()

    def _hand_over(self) -> None:
        """Have the last token copied to the host, when the device comes to it."""
        if self._has_graphs:
            at = self._steps
            self._drawn[at : at + 1].copy_(self._choice.tokens[at : at + 1], non_blocking=True)
            # A thread's own device is the first, whatever the model's.
            self._is_drawn[at % len(self._is_drawn)].record(torch.cuda.current_stream(self._device))

    def _read(self, tokens: torch.Tensor) -> torch.Tensor:
        """Fill the cache with a text from its beginning; the scores (1, vocabulary) after it."""
        cache = DynamicCache(config=self._model.config)
        answer = self._model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        for index, kept in enumerate(cache.layers):
            self._fixed.keep(index, kept.keys, kept.values)
        self._position.fill_(tokens.shape[1])
        scores: torch.Tensor = answer.logits[:, -1]
        return scores

    def _next(self, token: torch.Tensor, position: torch.Tensor, span: int) -> torch.Tensor:
        """The scores (1, vocabulary) after ``token`` (1, 1), which goes to ``position`` (1) of the cache."""
        is_hidden = torch.arange(span, device=self._device) > position
        mask = torch.zeros(span, dtype=self._model.dtype, device=self._device).masked_fill(is_hidden, -torch.inf)
        return self._fixed.next_scores(token, position, mask)

    def _advance(self, position: torch.Tensor, span: int) -> None:
        """One step, on the device alone. ``position`` (1) is where the last token goes in the cache."""
        self._token.copy_(self._choice.draw(self._next(self._token, position, span)))
        self._position.add_(1)

    def _record(self) -> None:
        """Record a graph for each span. What the steps do to a text is undone by the next beginning."""
        self._advance_once.forget()
        self._fixed.reserve()
        for span in SPANS:
            self._position.fill_(1)
            self._choice.count.zero_()
            started = time.monotonic()
            self._advance_once(self._position, span)
            logger.info("steps for up to %d tokens are ready after %.1f s", span, time.monotonic() - started)
        self._recorded_weights = self._weights()

    def _weights(self) -> tuple[int, ...]:
        return tuple(parameter.data_ptr() for parameter in self._model.parameters())


def make_decoder(model: Any, probe: Sequence[int]) -> Decoder:
    """The fastest decoder that gives ``model``'s own scores, prepared; ``probe`` is any text of a few tokens."""
    if model.device.type != "cuda" or not is_graphable(model):
        return PlainDecoder(model)
    started = time.monotonic()
    logger.info("compiling and recording what the language model repeats")
    try:
        decoder = GraphedDecoder(model)
        with torch.inference_mode():
            decoder.prepare(probe)
    # Whatever ails recording or compiling, the model itself may still work.
    except Exception as error:
        if "out of memory" in str(error).lower():
            raise
        logger.warning("the language model is not recorded and runs slower: %s", error, exc_info=True)
        return PlainDecoder(model)
    logger.info("the language model is ready after %.1f s: %s", time.monotonic() - started, decoder.manner)
    return decoder


def is_graphable(model: Any) -> bool:
    """Whether the architecture is one that :class:`GraphedDecoder` knows."""
    config = model.config.get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None) or ["full_attention"]
    sees_all = set(kinds) == {"full_attention"}
    return config.model_type in LAYERED_TYPES and sees_all and config.hidden_act == "silu"


def _span(tokens: int) -> int:
    return next(span for span in SPANS if span >= tokens)


def _vocabulary(model: Any) -> int:
    return int(model.get_output_embeddings().weight.shape[0])
