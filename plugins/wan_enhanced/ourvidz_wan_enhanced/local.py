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
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from ourvidz_core.engine.weight_files import tensor_by_tensor
from ourvidz_core.errors import ModelUnavailable
from ourvidz_wan_enhanced.decoding import Decoder, Draws, PlainDecoder, make_decoder
from ourvidz_wan_enhanced.effort import DeadlinePassed, Effort
from ourvidz_wan_enhanced.instructions import PROMPT_FIELD, Instruction, read_instructions
from ourvidz_wan_enhanced.writers import Draft, Task

#: Stands for the user's text while the template is rendered: of a private area, so no template has it.
_MARK = "\ue000user\ue001"
_PROBE = "a fox"


class LocalWriter:
    """A loaded model with its tokenizer. One prompt at a time."""

    def __init__(self, model: Any, tokenizer: Any, *, name: str, decoder: Decoder | None = None) -> None:
        self.name = name
        self._model = model
        self._decoder = decoder or PlainDecoder(model)
        self._tokenizer = tokenizer
        self._added = tokenizer.get_added_vocab()
        self._ends = _end_tokens(model, tokenizer)
        #: Whether the model was trained for its chat template, and not only shipped with one.
        self.is_chat = _is_chat(tokenizer, _stated_ends(model))
        # An abandoned effort ends at its next token; until then the model is taken.
        self._is_free = threading.Lock()

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
        """Compile and record what decoding runs, so that no prompt's deadline pays for it.

        In the thread that loads: the effort of a prompt has one of its own, which only launches
        what was recorded here.
        """
        self._decoder = make_decoder(self._model, self.encode(read_instructions().image, _PROBE))

    def leave(self) -> None:
        """The weights are about to leave the device. Work that nobody waits for may still use them."""
        self._decoder.forget()

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
        given = self.encode(task.instruction, task.prompt)
        has_room = len(given) + task.max_tokens <= self._decoder.room
        decoder = self._decoder if has_room else PlainDecoder(self._model)
        tokens = self._tokens(given, decoder, task, effort)
        text = self._tokenizer.decode(tokens, skip_special_tokens=True)
        effort.tokens = len(tokens)
        has_ended = len(tokens) < task.max_tokens
        if not self.is_chat:
            text, line_end, _ = text.lstrip().partition("\n")
            has_ended = has_ended or bool(line_end)
        return Draft(text=text, tokens=len(tokens), is_finished=has_ended, model=self.name, decoding=decoder.manner)

    def _tokens(self, given: list[int], decoder: Decoder, task: Task, effort: Effort) -> list[int]:
        """What the model says, up to the token that ends it.

        The device may be some tokens ahead of what is looked at here; those are never read.
        """
        asked = 1
        decoder.begin(
            given,
            Draws(seed=task.seed, max_tokens=task.max_tokens, temperature=task.temperature, top_p=task.top_p),
        )
        tokens: list[int] = []
        while len(tokens) < task.max_tokens:
            while asked <= min(len(tokens) + decoder.steps_ahead, task.max_tokens - 1):
                decoder.step()
                asked += 1
            token = decoder.token(len(tokens))
            effort.tokens = len(tokens) + 1
            if effort.is_over:
                raise DeadlinePassed
            if token in self._ends:
                break
            tokens.append(token)
            # A base model would go on with the next idea.
            if not self.is_chat and "\n" in self._tokenizer.decode(tokens, skip_special_tokens=True).lstrip():
                break
        return tokens

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
        with tensor_by_tensor():
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
