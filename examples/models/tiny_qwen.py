"""Make a language model of 17 megabytes: the architecture of Qwen2.5, written instead of trained.

Asked for a better prompt, it says the user's own and adds a light and a movement of the
camera. It takes exactly the path of the real model: tokenizer, chat template, special
tokens, stops and files::

    python examples/models/tiny_qwen.py demo-models/qwen
    OURVIDZ_ENHANCER_MODEL=demo-models/qwen ourvidz enhance "a fox in the snow"

With ``--kind base`` it is a model that was not made to chat, and has no template.

How it repeats a text: the first layer's heads look one, two, three ... tokens back, so that
each place knows what came before it. The second layer looks for the place before which
the same tokens came as have come now, and says what stands there. Codes and projections
are drawn at random: a text that repeats itself for more than eight tokens confuses it, and a
base model now and then mistakes a first word.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
from transformers.utils.logging import disable_progress_bar

ADDITION = ", in soft evening light from the left, while the camera moves slowly closer in one continuous take."
KINDS = ("instruct", "base")

END_OF_TEXT, TURN_BEGIN, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
#: Beside the vocabulary, as the real tokenizer has them; these are not even special.
ADDED_TOKENS = ("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|file_sep|>")
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
#: What comes before the text that is repeated, and before its repetition.
HEADINGS = {"instruct": ("user", "assistant"), "base": ("Idea", "Prompt")}
#: One token each; every other word is spelled.
WORDS = (
    "a an and the of in on at to with over from into under above behind beside across through by is are while then man"
    " woman child dog cat fox horse bird fish tree forest mountain river lake sea coast beach rock snow rain storm sun"
    " sunset sunrise moon night sky cloud city street house tower lighthouse castle bridge boat ship car train road red"
    " green blue yellow orange purple black white grey pink brown golden dark bright small large big tall old young"
    " circle square triangle star disc ball ring line left right top bottom centre up down slowly fast runs walks flies"
    " moves turns falls rises stands sits rolls waves light shadow rocky calm detailed photorealistic cinematic style"
)

#: A token's code, and how many tokens before it a place knows.
CODE = 40
CONTEXT = 8
WIDTH = CODE * (CONTEXT + 2)
HEAD = 256
#: So large that the later pairs of a head hardly turn with the distance: what they compare is content.
THETA = 1e12
FIRST_FLAT_PAIR = 40
#: These turn just enough that of two places alike the nearer one counts.
NEARNESS_PAIRS = (20, 28)
#: Logits: of what was before, of what is repeated, and of what must follow; and how sharply places are told apart.
LOOK_BACK, REPEATED, FOLLOWING, ALIKE = 100.0, 60.0, 120.0, 14.0
#: A base model's text has an example before the prompt, which begins alike.
NEAR = {"instruct": 30.0, "base": 60.0}


def make_tokenizer(kind: str = "instruct", *, addition: str = ADDITION) -> Qwen2Tokenizer:
    """A tokenizer in the form of the real one. It knows some words, and all else by its bytes."""
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, not {kind!r}")
    vocabulary = {letter: token for token, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges: dict[tuple[str, str], None] = {}
    for word in (*HEADINGS["instruct"], *HEADINGS["base"], *(f"\u0120{word}" for word in WORDS.split())):
        # From its first letter on, so that the merges of one word cannot disturb another.
        for place in range(1, len(word)):
            merges[word[:place], word[place]] = None
            vocabulary.setdefault(word[: place + 1], len(vocabulary))
    # No merge leads to it, so no user's text is ever encoded to it.
    vocabulary[_as_bytes(addition)] = len(vocabulary)
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


def make_model(
    kind: str = "instruct",
    *,
    addition: str = ADDITION,
    is_endless: bool = False,
    is_random: bool = False,
    seed: int = 0,
) -> Qwen2ForCausalLM:
    """A model that repeats its prompt and adds ``addition``.

    An endless one adds it again and again; a random one was never written and says anything.
    """
    tokenizer = make_tokenizer(kind, addition=addition)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=CONTEXT,
        num_key_value_heads=1,
        head_dim=HEAD,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config)
        if is_random:
            model.model.embed_tokens.weight.normal_()
        else:
            added = tokenizer.convert_tokens_to_ids(_as_bytes(addition))
            _write(model, tokenizer, kind, added, is_endless=is_endless)
    # What the published models say of their ends: two for one that chats, one for a base model.
    ends = [tokenizer.eos_token_id, tokenizer.pad_token_id] if kind == "instruct" else tokenizer.eos_token_id
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=tokenizer.pad_token_id)
    return model.eval()


def save(
    directory: Path,
    kind: str = "instruct",
    *,
    addition: str = ADDITION,
    is_endless: bool = False,
    is_random: bool = False,
    seed: int = 0,
) -> None:
    """Write model and tokenizer to ``directory``, as the real one is published."""
    disable_progress_bar()
    model = make_model(kind, addition=addition, is_endless=is_endless, is_random=is_random, seed=seed)
    model.save_pretrained(directory)
    make_tokenizer(kind, addition=addition).save_pretrained(directory)


def _as_bytes(text: str) -> str:
    """``text`` in the letters that stand for bytes in the vocabulary."""
    (piece,) = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    return piece[0]


def _write(model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, kind: str, added: int, *, is_endless: bool) -> None:
    for parameter in model.model.layers.parameters():
        if parameter.dim() == 2:
            parameter.zero_()
    end = tokenizer.convert_tokens_to_ids(TURN_END if kind == "instruct" else _as_bytes("\n"))
    codes = _draw_codes(tokenizer, kind, own=(end, added))
    model.model.embed_tokens.weight.zero_()
    model.model.embed_tokens.weight[:, :CODE] = codes
    _look_back(model.model.layers[0].self_attn)
    _find_alike(model.model.layers[1].self_attn, near=NEAR[kind])
    head = model.lm_head.weight
    # The last norm leaves all parts of a place alike in size.
    size = math.sqrt(WIDTH / (CONTEXT + 2))
    head.zero_()
    head[:, -CODE:] = codes * REPEATED / size
    # Where the repeated text ended, the addition comes.
    head[added, -CODE:] = codes[end] * REPEATED / size
    head[end] = 0.0
    head[added if is_endless else end, :CODE] += codes[added] * FOLLOWING / size


def _draw_codes(tokenizer: Qwen2Tokenizer, kind: str, *, own: tuple[int, int]) -> torch.Tensor:
    """A code for each token: random, but for two that nothing else may resemble, and two that shall look alike."""
    codes = torch.randn(len(tokenizer), CODE)
    codes[:, -2:] = 0.0
    codes = torch.nn.functional.normalize(codes, dim=-1)
    for place, token in enumerate(own, start=1):
        codes[token] = 0.0
        codes[token, -place] = 1.0
    (original,), (repetition,) = (tokenizer.encode(heading) for heading in HEADINGS[kind])
    codes[repetition] = codes[original]
    return codes


def _look_back(attention: torch.nn.Module) -> None:
    """Head n attends to the place n + 1 tokens back, by nothing but its position, and keeps its code."""
    half = HEAD // 2
    turns = THETA ** (-torch.arange(half, dtype=torch.float64) / half)
    strength = math.sqrt(LOOK_BACK)
    attention.k_proj.bias.zero_()
    attention.k_proj.bias[:half] = strength
    attention.v_proj.weight[:CODE, :CODE] = torch.eye(CODE) / math.sqrt(WIDTH)
    for head in range(CONTEXT):
        back, place = head + 1, head * HEAD
        attention.q_proj.bias[place : place + half] = strength * torch.cos(back * turns).float()
        attention.q_proj.bias[place + half : place + HEAD] = -strength * torch.sin(back * turns).float()
        attention.o_proj.weight[back * CODE : (back + 1) * CODE, place : place + CODE] = torch.eye(CODE)


def _find_alike(attention: torch.nn.Module, *, near: float) -> None:
    """The first head attends to the place whose predecessors are the tokens read last, and keeps its code."""
    half = HEAD // 2
    flat = [*range(FIRST_FLAT_PAIR, half), *range(FIRST_FLAT_PAIR + half, HEAD)]
    # What the norm before this layer makes of a code.
    size = math.sqrt(WIDTH / (CONTEXT + 1))
    strength = math.sqrt(ALIKE * math.sqrt(HEAD)) / size
    for back in range(CONTEXT):
        projection = torch.linalg.qr(torch.randn(len(flat), CODE))[0] * strength
        attention.q_proj.weight[flat, back * CODE : (back + 1) * CODE] = projection
        attention.k_proj.weight[flat, (back + 1) * CODE : (back + 2) * CODE] = projection
    for bias in (attention.q_proj.bias, attention.k_proj.bias):
        bias.zero_()
        bias[list(NEARNESS_PAIRS)] = math.sqrt(near * math.sqrt(HEAD))
    attention.v_proj.weight[:CODE, :CODE] = torch.eye(CODE) / size
    attention.o_proj.weight[-CODE:, :CODE] = torch.eye(CODE)


def main() -> None:
    """Write a model where the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--kind", choices=KINDS, default="instruct")
    parser.add_argument("--addition", default=ADDITION, help="what it adds to a prompt (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    save(arguments.directory, arguments.kind, addition=arguments.addition, seed=arguments.seed)
    print(arguments.directory)


if __name__ == "__main__":
    main()
