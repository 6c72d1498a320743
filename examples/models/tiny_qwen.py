"""Make a language model of a few hundred kilobytes: the architecture of Qwen2.5 with random weights.

Its weights are drawn at random, but for the output layer: whatever it is asked, it says one
sentence, so that what is made of a good answer can be seen and tested. It takes exactly the
path of the real model: tokenizer, chat template, special tokens, stops and files::

    python examples/models/tiny_qwen.py demo-models/qwen
    OURVIDZ_ENHANCER_MODEL=demo-models/qwen ourvidz enhance "a lighthouse on a rocky coast at sunset"

With ``--kind base`` it is a model that was not trained to chat, and has no template.
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
from transformers.utils.logging import disable_progress_bar

#: No token of it occurs twice, for the model knows only the token before the next.
SENTENCE = (
    "A tall lighthouse stands on the rocky coast at sunset, warm golden light crossing wet stones while slow waves"
    " break below in a detailed photorealistic wide shot with gentle camera push forward."
)
END_OF_TEXT, TURN_BEGIN, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
#: Beside the vocabulary, as the real tokenizer has them: some are special, some are not.
ADDED_TOKENS = ("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|file_sep|>")
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
KINDS = ("instruct", "base")
WIDTH = 64
#: Beside which the other layers' random output is a murmur.
CERTAINTY = 0.5


def make_model(
    kind: str = "instruct", *, says: str | None = SENTENCE, seed: int = 0, is_endless: bool = False
) -> Qwen2ForCausalLM:
    """A model with weights drawn from ``seed`` that answers with ``says``, or with anything where that is None.

    One that is endless says it again and again.
    """
    tokenizer = make_tokenizer(kind, says=says or SENTENCE)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config)
        model.model.embed_tokens.weight.data.normal_()
    if says is not None:
        _teach(model, _chain(tokenizer, kind, says, is_endless=is_endless))
    # What the published models say of their ends: two for one that chats, one for a base model.
    ends = [tokenizer.eos_token_id, tokenizer.pad_token_id] if kind == "instruct" else tokenizer.eos_token_id
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=tokenizer.pad_token_id)
    return model.eval()


def make_tokenizer(kind: str = "instruct", *, says: str = SENTENCE) -> Qwen2Tokenizer:
    """A tokenizer in the form of the real one. It knows the words of ``says``, and all else by its bytes."""
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, not {kind!r}")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: token for token, letter in enumerate(letters)}
    splitter = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    merges: dict[tuple[str, str], None] = {}
    for word, _ in splitter.pre_tokenize_str(says):
        # From its first letter on, so that the merges of one word cannot disturb another.
        for place in range(1, len(word)):
            merges[word[:place], word[place]] = None
            vocabulary.setdefault(word[: place + 1], len(vocabulary))
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary,
        merges=list(merges),
        eos_token=TURN_END if kind == "instruct" else END_OF_TEXT,
        pad_token=END_OF_TEXT,
        unk_token=None,
        additional_special_tokens=[TURN_BEGIN, TURN_END],
    )
    tokenizer.add_tokens(list(ADDED_TOKENS))
    if kind == "instruct":
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def save(
    directory: Path,
    kind: str = "instruct",
    *,
    says: str | None = SENTENCE,
    seed: int = 0,
    is_endless: bool = False,
) -> None:
    """Write model and tokenizer to ``directory``, as the real one is published."""
    disable_progress_bar()
    make_model(kind, says=says, seed=seed, is_endless=is_endless).save_pretrained(directory)
    make_tokenizer(kind, says=says or SENTENCE).save_pretrained(directory)


def _chain(tokenizer: Qwen2Tokenizer, kind: str, says: str, *, is_endless: bool) -> list[int]:
    """What is read last, the tokens of the sentence, and what ends it."""
    # The template ends with a line break; a completion ends with a colon, and words begin with their space.
    begin, text, end = ("\n", says, TURN_END) if kind == "instruct" else (":", f" {says.strip()}", "\n")
    ids = [*tokenizer.encode(begin), *tokenizer.encode(text), *tokenizer.encode(end)]
    if len(set(ids)) < len(ids):
        raise ValueError(f"a token occurs twice in {says!r}; the model knows only the token before the next")
    return [*ids[:-1], ids[1]] if is_endless else ids


def _teach(model: Qwen2ForCausalLM, chain: list[int]) -> None:
    """Let each token of ``chain`` follow the one before it."""
    embedded = model.model.embed_tokens.weight
    with torch.no_grad():
        for before, after in pairwise(chain):
            model.lm_head.weight[after] += CERTAINTY * embedded[before]


def main() -> None:
    """Write a model where the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--kind", choices=KINDS, default="instruct")
    parser.add_argument("--says", default=SENTENCE, help="what it answers; no word twice (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    save(arguments.directory, arguments.kind, says=arguments.says, seed=arguments.seed)
    print(arguments.directory)


if __name__ == "__main__":
    main()
