"""A causal language model from a local directory, Qwen2.5-7B or any other that transformers knows.

The user's text can neither end its turn nor begin another: it is encoded apart from the
template, and never to a token that the tokenizer was given beside its vocabulary.
"""

from __future__ import annotations

import re
import threading
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CompileConfig,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.utils.logging import disable_progress_bar

from ourvidz_core.errors import ModelUnavailable
from ourvidz_wan_enhanced.effort import DeadlinePassed, Effort
from ourvidz_wan_enhanced.instructions import PROMPT_FIELD, Instruction, read_instructions
from ourvidz_wan_enhanced.writers import Draft, Task

#: Stands for the user's text while the template is rendered: of a private area, so no template has it.
_MARK = "\ue000user\ue001"
_PROBE = "a fox"
#: Only the likeliest tokens are drawn from, and what was said becomes a little less likely: as Qwen2.5 ships it.
TOP_K = 20
REPETITION_PENALTY = 1.05
#: Room of the static cache: every instruction of ours, 2000 characters of any script, 384 tokens of an answer.
#: One length for all prompts, since each other length would be compiled anew.
CACHE_TOKENS = 3072


class LocalWriter:
    """A loaded model with its tokenizer. One prompt at a time."""

    def __init__(self, model: Any, tokenizer: Any, *, name: str) -> None:
        self.name = name
        self._model = model
        self._tokenizer = tokenizer
        self._added = tokenizer.get_added_vocab()
        self._ends = _end_tokens(model, tokenizer)
        #: Whether the model was trained for its chat template, and not only shipped with one.
        self.is_chat = _is_chat(tokenizer, _stated_ends(model))
        # An abandoned effort ends at its next token; until then the model is taken.
        self._is_free = threading.Lock()
        model.generation_config = self._generation_config()

    def write(self, task: Task, effort: Effort) -> Draft:
        """See :meth:`~ourvidz_wan_enhanced.writers.Writer.write`."""
        if not self._is_free.acquire(timeout=effort.seconds_left):
            raise DeadlinePassed
        try:
            with torch.inference_mode():
                return self._write(task, effort)
        finally:
            self._is_free.release()

    def warm_up(self) -> None:
        """Compile what decoding runs, so that no prompt's deadline pays for it."""
        instruction = read_instructions().image
        self.write(
            Task(prompt="a fox", instruction=instruction, seed=0, max_tokens=4, temperature=0.7, top_p=0.8),
            Effort(600.0),
        )

    def encode(self, instruction: Instruction, prompt: str) -> list[int]:
        """The tokens that the model reads."""
        if self.is_chat:
            before, after = self._around_the_prompt(instruction.system)
        else:
            before, after = instruction.completion.split(PROMPT_FIELD)
            # Words begin with their space, and a line break of the user's would begin another idea.
            before, prompt = before.rstrip(), f" {' '.join(prompt.split())}"
        return [
            *self._tokenizer.encode(before, add_special_tokens=not self.is_chat),
            *self.encode_text(prompt),
            *self._tokenizer.encode(after, add_special_tokens=False),
        ]

    def encode_text(self, text: str) -> list[int]:
        """``text`` as nothing but text: what looks like a token of the template is spelled out."""
        names = sorted((name for name in self._added if len(name) > 1), key=len, reverse=True)
        cuts = [match.start() + 1 for match in re.finditer("|".join(map(re.escape, names)), text)] if names else []
        pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, None], strict=True)]
        tokens = [
            token for piece in pieces if piece for token in self._tokenizer.encode(piece, add_special_tokens=False)
        ]
        strange = set(tokens) & set(self._added.values())
        return [token for token in tokens if token not in strange]

    def _write(self, task: Task, effort: Effort) -> Draft:
        given = torch.tensor([self.encode(task.instruction, task.prompt)], device=self._model.device)
        start = given.shape[1]
        watch = _Watch(effort, start)
        stops: list[StoppingCriteria] = [watch]
        if not self.is_chat:
            stops.append(_ParagraphEnd(self._tokenizer, start))
        whole = self._model.generate(
            given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=task.max_tokens,
            logits_processor=LogitsProcessorList([_SeededChoice(task, start)]),
            stopping_criteria=StoppingCriteriaList(stops),
        )
        if watch.is_over:
            raise DeadlinePassed
        tokens = [token for token in whole[0, start:].tolist() if token not in self._ends]
        text = self._tokenizer.decode(tokens, skip_special_tokens=True)
        effort.tokens = len(tokens)
        has_ended = len(tokens) < task.max_tokens
        if not self.is_chat:
            text, line_end, _ = text.lstrip().partition("\n")
            has_ended = has_ended or bool(line_end)
        return Draft(text=text, tokens=len(tokens), is_finished=has_ended, model=self.name)

    def _around_the_prompt(self, system: str) -> tuple[str, str]:
        rendered: str = self._tokenizer.apply_chat_template(
            [{"role": "system", "content": system}, {"role": "user", "content": _MARK}],
            tokenize=False,
            add_generation_prompt=True,
        )
        parts = rendered.split(_MARK)
        if len(parts) != 2:
            raise ModelUnavailable(f"the chat template of {self.name} shows a user's message {len(parts) - 1} times")
        return parts[0], parts[1]

    def _generation_config(self) -> GenerationConfig:
        config = GenerationConfig(
            # The draw is ours, see _SeededChoice.
            do_sample=False,
            repetition_penalty=REPETITION_PENALTY,
            eos_token_id=sorted(self._ends) or None,
            pad_token_id=min(self._ends, default=0),
        )
        if self._model.device.type == "cuda":
            config.cache_implementation = "static"
            config.max_cache_len = CACHE_TOKENS
            # Without CUDA graphs: those belong to the thread that recorded them, and each prompt has its own.
            config.compile_config = CompileConfig(mode="default")
        return config


def load_writer(directory: Path, *, device: str = "cpu") -> LocalWriter:
    """Load the model in ``directory`` for ``device``. Offline, and without code from its files.

    :raises ModelUnavailable: a file is missing or cannot be read.
    """
    disable_progress_bar()
    place = torch.device(device)
    if not directory.is_dir():
        raise ModelUnavailable(f"{directory} is no directory; OURVIDZ_ENHANCER_MODEL names that of a language model")
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=torch.bfloat16 if place.type == "cuda" else torch.float32,
            device_map={"": place},
            local_files_only=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        if "CUDA" in str(error):  # the device's fault, not the file's
            raise
        raise ModelUnavailable(f"the language model in {directory} cannot be used: {error}") from error
    if tokenizer.decode(tokenizer.encode(_PROBE, add_special_tokens=False)) != _PROBE:
        # Where its files are missing, transformers makes one without a vocabulary.
        raise ModelUnavailable(f"the language model in {directory} has no tokenizer; its tokenizer.json is missing")
    model.eval().requires_grad_(False)
    writer = LocalWriter(model, tokenizer, name=directory.name)
    if place.type == "cuda":
        writer.warm_up()
    return writer


class _SeededChoice(LogitsProcessor):  # type: ignore[misc]
    """Draws each token by a number of its own sequence, and leaves the model only that one.

    transformers draws from torch's global generator: another job's noise would depend on
    how many words a prompt was given, and its wording on the noise.
    """

    def __init__(self, task: Task, start: int) -> None:
        generator = torch.Generator("cpu").manual_seed(task.seed)
        self._draws = torch.rand(task.max_tokens + 1, generator=generator).tolist()
        self._start = start
        self._temperature = task.temperature
        self._top_p = task.top_p

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        likely, tokens = scores.topk(min(TOP_K, scores.shape[-1]))
        if self._temperature == 0.0:
            chosen = tokens[:, :1]
        else:
            shares = torch.softmax(likely / self._temperature, dim=-1)
            reached = shares.cumsum(dim=-1)
            # The likeliest tokens that together make top_p, the one that reaches it included.
            reached = reached.where(reached - shares < self._top_p, torch.inf)
            total = reached.where(reached < torch.inf, 0.0).amax(dim=-1, keepdim=True)
            draw = self._draws[min(input_ids.shape[1] - self._start, len(self._draws) - 1)]
            chosen = tokens.gather(-1, (reached <= draw * total).sum(dim=-1, keepdim=True))
        only: torch.FloatTensor = torch.full_like(scores, -torch.inf).scatter(-1, chosen, 0.0)
        return only


class _Watch(StoppingCriteria):  # type: ignore[misc]
    """Ends the generation when nobody waits for it; counts its tokens."""

    def __init__(self, effort: Effort, start: int) -> None:
        self._effort = effort
        self._start = start
        self.is_over = False

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **_: Any) -> torch.BoolTensor:  # noqa: ARG002
        self._effort.tokens = input_ids.shape[1] - self._start
        self.is_over = self._effort.is_over
        return _for_each(input_ids, self.is_over)


class _ParagraphEnd(StoppingCriteria):  # type: ignore[misc]
    """Ends a base model's generation with its first line; it would go on with the next idea."""

    def __init__(self, tokenizer: Any, start: int) -> None:
        self._tokenizer = tokenizer
        self._start = start

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **_: Any) -> torch.BoolTensor:  # noqa: ARG002
        text: str = self._tokenizer.decode(input_ids[0, self._start :], skip_special_tokens=True)
        return _for_each(input_ids, "\n" in text.lstrip())


def _for_each(input_ids: torch.LongTensor, is_over: bool) -> torch.BoolTensor:
    answer: Any = torch.full((input_ids.shape[0],), is_over, dtype=torch.bool, device=input_ids.device)
    return answer


def _stated_ends(model: Any) -> set[int]:
    """The end tokens that the model's own files state."""
    for config in (model.generation_config, model.config):
        stated = getattr(config, "eos_token_id", None)
        if stated is not None:
            return {stated} if isinstance(stated, int) else set(stated)
    return set()


def _end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Every special token ends a prompt: none is ever part of one."""
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    return frozenset(special | _stated_ends(model) | {int(token) for token in tokenizer.all_special_ids})


def _is_chat(tokenizer: Any, stated_ends: set[int]) -> bool:
    """Whether what ends a turn in the chat template is what ends the model's own texts.

    Base models are published with a chat template too; theirs end with another token.
    """
    if not tokenizer.chat_template:
        return False
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": _MARK}], tokenize=False
    )
    behind = tokenizer.encode(rendered.rpartition(_MARK)[2], add_special_tokens=False)
    return bool(behind) and behind[0] in stated_ends
