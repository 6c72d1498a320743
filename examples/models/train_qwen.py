"""Train a small Qwen2 chat model that makes whole scenes of short prompts.

"circle" becomes "a large orange circle moves right on a plain navy background": the words that a prompt
has are kept, what it leaves open is filled in. Seconds to minutes on one GPU::

    python examples/models/train_qwen.py demo-models/qwen
    python examples/models/train_qwen.py /tmp/qwen --scenes=50 --steps=3 --batch=4   # does it run

What a system prompt says does not matter to it: it is trained with texts of all lengths there.
"""

from __future__ import annotations

import logging
import random
import sys
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.models import scenes, training, vocabularies

logger = logging.getLogger("train_qwen")

_LONGEST = 768
#: What instructions are made of, here only so that they are short and familiar.
_INSTRUCTION_TEXT = """
You are a an the helpful assistant prompt prompts rewrite expand describe description user users given text into more
detailed vivid scene scenes video videos image images camera motion movement lighting light composition style subject
background colour color quality cinematic keep meaning original words language answer only with one no and or of to in
for from as that this it is be not do must should please write output reply return short long sentence paragraph add
details about expert engineer generation generate model realistic shot angle mood atmosphere time weather never change
names intent first then their them what how if when use English without quotes comments explanation under than your by
created Qwen Alibaba Cloud enhance enhancer enhanced rich visual concise clear example input
"""
INSTRUCTION_WORDS = _INSTRUCTION_TEXT.split()
_USUAL = (
    "You are a helpful assistant.",
    "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    "Rewrite the user's prompt into one vivid, detailed description of a video. Answer with the description only.",
)
_WRAPPED = ("{}", "{}", "{}", "{}", "Prompt: {}", "Expand this prompt: {}", '"{}"', "Rewrite: {}", "User prompt:\n{}")

VARIANT = """\
# A small chat model that expands prompts about coloured shapes; see README.md.
name = "demo"
family = "qwen"
"""


def make_tokenizer() -> Any:
    """Qwen's tokenizer with our words."""
    return vocabularies.qwen_tokenizer([*scenes.vocabulary(), *dict.fromkeys(INSTRUCTION_WORDS)])


def make_model(tokenizer: Any) -> Any:
    """The untrained model."""
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=4096,
            rope_theta=10000.0,
            tie_word_embeddings=True,
            eos_token_id=tokenizer.convert_tokens_to_ids(vocabularies.CHAT_END),
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
        )
    )


def system_text(chance: random.Random) -> str | None:
    """Some system prompt, or none."""
    kind = chance.random()
    if kind < 0.15:
        return None
    if kind < 0.3:
        return chance.choice(_USUAL)
    words = [
        chance.choice(scenes.vocabulary() if chance.random() < 0.2 else INSTRUCTION_WORDS)
        if chance.random() < 0.9
        else "".join(chance.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(chance.randint(2, 9)))
        for _ in range(chance.choice((5, 20, 60, 150)))
    ]
    return "".join(word + chance.choice((" ", " ", " ", " ", ", ", ". ", "\n", ": ")) for word in words).strip()


def user_text(chance: random.Random) -> str:
    """Some prompt: mostly a caption, sometimes one without a scene."""
    scene = scenes.draw_scenes(1, chance.getrandbits(40), video=chance.random() < 0.6)[0]
    return scenes.caption(scene, chance) if chance.random() < 0.9 else scenes.filler(chance) or "something"


def conversation(prompt: str, system: str | None, wrapped: str = "{}") -> list[dict[str, str]]:
    """The messages that ask for an expansion of ``prompt``."""
    asked = [{"role": "user", "content": wrapped.format(prompt)}]
    return asked if system is None else [{"role": "system", "content": system}, *asked]


def draw_examples(tokenizer: Any, count: int, seed: int) -> list[tuple[list[int], list[int]]]:
    """Tokens of questions and of their answers."""
    chance = random.Random(seed)
    asked, answers = [], []
    for _ in range(count):
        prompt = user_text(chance)
        messages = conversation(prompt, system_text(chance), chance.choice(_WRAPPED))
        asked.append(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        answers.append(scenes.describe(scenes.expand(prompt)) + vocabularies.CHAT_END + "\n")
    questions = tokenizer(asked, add_special_tokens=False).input_ids
    return list(zip(questions, tokenizer(answers, add_special_tokens=False).input_ids, strict=True))


def train(model: Any, run: training.Run, examples: list[Any], device: torch.device, batch: int, filling: int) -> None:
    """Teach it the answers."""
    chance = random.Random(1)
    # Of about one length, so that little is filled up.
    ordered = sorted((pair for pair in examples if len(pair[0]) + len(pair[1]) < _LONGEST), key=lambda p: len(p[0]))
    for _ in run:
        first = chance.randrange(max(1, len(ordered) - batch))
        chosen = ordered[first : first + batch]
        longest = max(len(question) + len(answer) for question, answer in chosen)
        ids = torch.full((len(chosen), longest), filling)
        labels = torch.full((len(chosen), longest), -100)
        for row, (question, answer) in enumerate(chosen):
            end = len(question) + len(answer)
            ids[row, :end] = torch.tensor(question + answer)
            labels[row, len(question) : end] = torch.tensor(answer)
        ids, labels = ids.to(device), labels.to(device)
        with torch.autocast(device.type, torch.bfloat16):
            states = model.model(input_ids=ids).last_hidden_state[:, :-1]
            wanted = labels[:, 1:]
            scores = model.lm_head(states[wanted != -100])
        run.learn(functional.cross_entropy(scores.float(), wanted[wanted != -100]))
    run.average()


def main() -> None:
    """Train, and write the model down."""
    parser = training.arguments(__doc__)
    parser.add_argument("--steps", type=int, default=12000)
    parser.add_argument("--seconds", type=float, default=1e6)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=2e-3)
    chosen = parser.parse_args()
    device = training.start(chosen.seed)
    tokenizer: Any
    if chosen.weights:
        tokenizer = AutoTokenizer.from_pretrained(chosen.weights, local_files_only=True)
        model = Qwen2ForCausalLM.from_pretrained(chosen.weights, dtype=torch.float32, local_files_only=True)
    else:
        tokenizer = make_tokenizer()
        model = make_model(tokenizer)
    model.to(device).train()
    logger.info("Qwen2ForCausalLM: %.2f M weights", sum(p.numel() for p in model.parameters()) / 1e6)
    examples = draw_examples(tokenizer, chosen.scenes or 60000, chosen.seed)
    logger.info("%d examples", len(examples))
    run = training.Run(
        "qwen", [model], work=chosen.work, steps=chosen.steps, seconds=chosen.seconds, rate=chosen.rate, warm_up=400
    )
    train(model, run, examples, device, chosen.batch, tokenizer.pad_token_id)
    model.generation_config.do_sample = False
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(vocabularies.CHAT_END)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    chosen.directory.mkdir(parents=True, exist_ok=True)
    model.to("cpu", torch.float16).save_pretrained(chosen.directory)
    tokenizer.save_pretrained(chosen.directory)
    (chosen.directory / "variant.toml").write_text(VARIANT, "utf-8")
    logger.info("written to %s", chosen.directory)


if __name__ == "__main__":
    main()
