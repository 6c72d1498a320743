"""What counts as an enhanced prompt, sentence by sentence."""

# ruff: noqa: RUF001 - the signs of other scripts are meant.

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ourvidz_wan_enhanced.checks import fault_of, finished_part, key_words, tidied
from ourvidz_wan_enhanced.instructions import Instructions, read_instructions

from ourvidz_core.errors import SettingsError

INSTRUCTIONS = read_instructions()
PROMPT = "a lighthouse on a rocky coast at sunset"
GOOD = "A tall lighthouse stands on a rocky coast, the sunset glowing orange behind it as waves roll in."


def fault(text, prompt=PROMPT, max_tokens=256):
    return fault_of(tidied(text), prompt=prompt, instruction=INSTRUCTIONS.video.system, max_tokens=max_tokens)


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        (GOOD, PROMPT),
        (f'  "{GOOD}"\n', PROMPT),
        (GOOD.replace(", ", ",\n"), PROMPT),
        ("Foxes with thick red fur trot through fresh snow under bare birches.", "a fox in the snow"),
        ("Great waves crash against a lighthouse on the coast at sunset.", PROMPT),
        ("OK corral signs swing in the wind as two gunmen face each other at noon.", "two gunmen at the ok corral"),
        ("一只红色的狐狸在雪地里奔跑，晨光从左侧照来，镜头缓缓跟随。", "一只狐狸在雪地里"),
        ("Рыжая лиса бежит по свежему снегу, мягкий утренний свет слева.", "лиса бежит по снегу"),
        ("赤い狐が雪の中を走る、柔らかな朝の光、カメラがゆっくり追う。", "雪の中の狐"),
        ("🦊❄️ a red fox leaps over a drift of snow in soft light", "🦊❄️"),
        ("A prompt reply arrives: a messenger on horseback gallops up to the castle.", "a messenger at a castle"),
    ],
    ids=["plain", "quoted", "lines", "inflected", "great", "ok", "Chinese", "Russian", "Japanese", "emoji", "prompt"],
)
def test_a_prompt_is_a_prompt(text, prompt):
    assert fault(text, prompt) is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "nothing"),
        (" \n\t", "nothing"),
        ("...", "nothing"),
        ("A LIGHTHOUSE on a rocky coast, at sunset!", "unchanged"),
        (INSTRUCTIONS.video.system, "instruction"),
        (f"{GOOD} Write in the language of the idea. Write a single flowing paragraph of text.", "instruction"),
        (f"Sure, here is your prompt: {GOOD}", "talks"),
        (f"Sure! {GOOD}", "talks"),
        (f"Here's the video prompt. {GOOD}", "talks"),
        (f"Enhanced prompt: {GOOD}", "talks"),
        (f"Certainly! {GOOD}", "talks"),
        (f"{GOOD} Let me know if you would like changes.", "talks"),
        ("当然，以下是优化后的提示词：" + GOOD, "talks"),
        ("I'm sorry, but I can't help with a lighthouse on a rocky coast at sunset.", "refused"),
        ("As an AI language model I see no lighthouse, coast or sunset.", "refused"),
        (f"# Lighthouse\n{GOOD}", "markup"),
        (f"- {GOOD}\n- more of the sunset", "markup"),
        (f"1. {GOOD}", "markup"),
        (f"**Subject**: {GOOD}", "markup"),
        (f"```\n{GOOD}\n```", "markup"),
        (f"{GOOD} <|im_start|>user", "markup"),
        (f"{GOOD}\n\nThe camera moves forward.", "paragraph"),
        ("海岸上的灯塔在日落时分闪闪发光。", "language"),
        ("A man reads a newspaper in a crowded train at noon.", "0 of the prompt's 4 key words"),
        (f"{GOOD} \ufffd", "broken"),
        (f"{GOOD} \x07", "broken"),
        (GOOD * 40, "longer"),
    ],
)
def test_what_is_wrong_is_named(text, says):
    assert says in str(fault(text))


def test_a_translation_is_no_enhancement():
    assert fault("A fox runs across the snow in soft light.", "un zorro corre sobre la nieve") is not None
    assert "language" in str(fault("A fox runs across the snow in soft light.", "一只狐狸在雪地里"))


def test_key_words_say_what_is_shown():
    assert key_words("Please make me a video of the Lighthouse, with 3 lighthouse keepers") == ("lighthouse", "keepers")
    assert key_words("一只狐狸") == ("狐", "狸")
    assert key_words("🦊 42") == ()
    assert len(key_words(" ".join(f"word{letter}" for letter in "abcdefghijklmnop"))) == 8


def test_a_text_that_was_cut_ends_with_its_last_sentence():
    assert finished_part("One. Two, and thr") == "One."
    assert finished_part("f/2.8 lens") == ""
    assert finished_part("狐狸在跑。镜头") == "狐狸在跑。"


@given(st.text(max_size=200), st.text(max_size=80))
def test_no_text_of_a_model_breaks_the_checks(text, prompt):
    fault(text, prompt)
    finished_part(text)


def test_the_instructions_are_data_that_can_be_replaced(tmp_path):
    assert isinstance(INSTRUCTIONS, Instructions)
    assert "camera" in INSTRUCTIONS.video.system
    assert "motion" not in INSTRUCTIONS.image.system
    own = tmp_path / "own.toml"
    own.write_text(
        '[image]\nsystem = "Paint."\ncompletion = "{prompt} ->"\n'
        '[video]\nsystem = "Film."\ncompletion = "{prompt} =>"\n'
    )
    assert read_instructions(own).video.system == "Film."
    own.write_text('[image]\nsystem = "Paint."\ncompletion = "no field"\n')
    with pytest.raises(SettingsError, match="OURVIDZ_ENHANCER_INSTRUCTIONS"):
        read_instructions(own)
    with pytest.raises(SettingsError, match=r"gone\.toml"):
        read_instructions(tmp_path / "gone.toml")
