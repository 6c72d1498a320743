"""The tokenizers of the small models, of the classes that production models have, learnt from our captions.

Every word of the captions is a token. Text that is none of them falls apart into bytes (CLIP and
Qwen) or letters (T5), so no prompt is refused, and none ends up as an unknown token in the middle.
"""

from __future__ import annotations

import string
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer, Qwen2Tokenizer, T5Tokenizer

CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"
CHAT_START, CHAT_END, QWEN_END = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def clip_tokenizer(words: Iterable[str], *, pad_token: str = CLIP_END) -> Any:
    """CLIP's byte-level tokenizer, in which each of ``words`` is one token."""
    merges = _merges(words, end="</w>", prefix="")
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(merge) for merge in merges)]
    tokens = [*dict.fromkeys(tokens), CLIP_START, CLIP_END]
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77, pad_token=pad_token)


def t5_tokenizer(words: Iterable[str]) -> Any:
    """T5's unigram tokenizer, in which each of ``words`` is one token and all else is spelt."""
    scores = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    distinct = [word for word in dict.fromkeys(words) if len(word) > 1]
    scores += [(f"▁{word}", -2.0) for word in distinct] + [(f"▁{word.capitalize()}", -2.0) for word in distinct]
    letters = string.ascii_letters + string.digits + string.punctuation
    scores += [(letter, -6.0) for letter in letters] + [(f"▁{letter}", -5.0) for letter in letters]
    return T5Tokenizer(vocab=scores, extra_ids=0, model_max_length=512)


def qwen_tokenizer(words: Iterable[str]) -> Any:
    """Qwen's byte-level tokenizer with its chat marks, in which each of ``words`` is one token after a space."""
    distinct = list(words)
    merges = _merges([*distinct, *(word.capitalize() for word in distinct)], end="", prefix=" ")
    merges = list(dict.fromkeys([*merges, *_merges(distinct, end="", prefix="")]))
    tokens = dict.fromkeys([*sorted(ByteLevel.alphabet()), *("".join(merge) for merge in merges)])
    tokenizer = Qwen2Tokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=merges,
        eos_token=CHAT_END,
        pad_token=QWEN_END,
        model_max_length=4096,
    )
    tokenizer.add_special_tokens({"additional_special_tokens": [CHAT_START, CHAT_END]})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _merges(words: Iterable[str], *, end: str, prefix: str) -> list[tuple[str, str]]:
    """The merges that make each word one token, in the order of the words; the same every time."""
    byte_level = ByteLevel(add_prefix_space=False, use_regex=False)
    ranks: dict[tuple[str, str], int] = {}
    for word in words:
        letters = "".join(piece for piece, _ in byte_level.pre_tokenize_str(f"{prefix}{word}"))
        pieces = [*letters[:-1], f"{letters[-1]}{end}"]
        while len(pieces) > 1:
            pairs = list(pairwise(pieces))
            known = [pair for pair in pairs if pair in ranks]
            pair = min(known, key=ranks.__getitem__) if known else pairs[0]
            # What comes later never changes a word that came before: it was one token already.
            ranks.setdefault(pair, len(ranks))
            pieces = _merged(pieces, pair)
    return list(ranks)


def _merged(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for piece in pieces:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged
