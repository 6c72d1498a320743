"""An OpenAI-compatible server in place of the model: the same checks, deadline and policy."""

from __future__ import annotations

import json
import time

import pytest

pytest.importorskip("openai")

from ourvidz_wan_enhanced.enhancement import enhance
from ourvidz_wan_enhanced.instructions import read_instructions
from ourvidz_wan_enhanced.server import without_tokens
from ourvidz_wan_enhanced.settings import EnhancerSettings

from ourvidz_core.settings import engine_environment, load, load_section, without_keys
from ourvidz_core.testing.servers import Answer, FileServer
from ourvidz_core.wire.job_types import ContentType

PROMPT = "a lighthouse on a rocky coast at sunset"
GOOD = "A tall lighthouse stands on a rocky coast, the sunset glowing orange behind it as waves roll in."
CHAT = "/v1/chat/completions"
KEY = "enhancer-key-canary"
DEADLINE = 1.0
TOLERANCE = 0.5


def completion(text, *, finish_reason="stop", **more):
    message = {"role": "assistant", "content": text}
    return Answer.of_json(
        {
            "id": "c",
            "object": "chat.completion",
            "created": 0,
            "model": "served",
            "choices": [{"index": 0, "message": message, "finish_reason": finish_reason}],
            "usage": {"prompt_tokens": 200, "completion_tokens": 30, "total_tokens": 230},
            **more,
        }
    )


MODELS = Answer.of_json({"object": "list", "data": [{"id": "qwen-served", "object": "model", "created": 0}]})


@pytest.fixture
def asking(context_of):
    def ask(server, prompt=PROMPT, **settings):
        context = context_of(
            **{"url": f"{server.url}/v1", "key": KEY, "deadline_seconds": DEADLINE, "cache_size": 0, **settings}
        )
        started = time.monotonic()
        enhancement = enhance(prompt, content_type=ContentType.VIDEO, seed=3, context=context)
        return enhancement, time.monotonic() - started

    return ask


def test_the_server_is_asked_as_the_model_would_be(asking):
    with FileServer({CHAT: completion(GOOD), "/v1/models": MODELS}) as server:
        enhancement, _ = asking(server, url=server.url)
        assert enhancement.prompt == GOOD
        assert enhancement.facts["enhancement_tokens"] == 30
        assert enhancement.facts["enhancement_model"] == "qwen-served"
        listed, asked = server.requests
    assert listed.path == "/v1/models"
    assert asked.headers["authorization"] == f"Bearer {KEY}"
    body = asked.json()
    assert body["model"] == "qwen-served"
    assert body["messages"] == [
        {"role": "system", "content": read_instructions().video.system},
        {"role": "user", "content": PROMPT},
    ]
    assert (body["seed"], body["max_tokens"], body["temperature"], body["top_p"]) == (3, 256, 0.7, 0.8)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (Answer(status=500, body=b"boom"), "the server answered 500"),
        (Answer.of_json({"error": {"message": f"bad key {KEY}"}}, status=401), "the server answered 401"),
        (Answer(is_lost=True), "the server cannot be reached"),
        (Answer(body=b"<html>", headers={"Content-Type": "text/html"}), "the server's answer is no chat completion"),
        (Answer.of_json({"choices": []}), "the server's answer is no chat completion"),
        (completion(None), "the model wrote nothing"),
        (completion("Sure, here is a prompt."), "it talks to the user in place of describing"),
        (completion("a lighthouse on", finish_reason="length"), "the text did not end within 256 tokens"),
        (Answer(delay_seconds=30.0), f"it was not done within {DEADLINE:g} s"),
        (
            Answer(body=b" " * 4000, piece_bytes=10, piece_delay_seconds=0.2, is_head_slow=True),
            f"it was not done within {DEADLINE:g} s",
        ),
    ],
    ids=["500", "401", "lost", "html", "no choice", "empty", "preamble", "cut", "hangs", "drips"],
)
def test_a_server_that_fails_is_reported_in_time(answer, reason, asking):
    with FileServer({CHAT: answer}) as server:
        enhancement, seconds = asking(server, served_model="qwen")
    assert enhancement.prompt is None
    assert reason in enhancement.outcome
    assert seconds < DEADLINE + TOLERANCE
    assert KEY not in json.dumps(enhancement.facts)
    assert server.host not in json.dumps(enhancement.facts)


def test_a_server_that_is_not_there_is_reported(asking):
    with FileServer({}) as server:
        pass
    enhancement, seconds = asking(server, url="http://127.0.0.1:9/v1", served_model="qwen")
    assert enhancement.outcome == "failed (the server cannot be reached)"
    assert seconds < DEADLINE + TOLERANCE


def test_a_text_cut_by_the_budget_ends_with_its_last_sentence(asking):
    with FileServer({CHAT: completion(f"{GOOD} The camera slo", finish_reason="length")}) as server:
        assert asking(server, served_model="qwen")[0].prompt == GOOD


@pytest.mark.parametrize("token", ["<|im_end|>", "<|im_start|>", "</s>", "<s>", "<start_of_turn>", "[INST]", "[/INST]"])
def test_what_the_servers_template_might_take_for_a_token_is_broken_up(token, asking):
    with FileServer({CHAT: completion(GOOD)}) as server:
        asking(server, f"{PROMPT} {token} system", served_model="qwen")
        (asked,) = server.requests
    sent = asked.json()["messages"][1]["content"]
    assert token not in sent
    assert sent.replace(" ", "") == f"{PROMPT} {token} system".replace(" ", "")


def test_other_signs_stay_as_they_are():
    text = "I <3 foxes, 2 < 3 [wide shot]"
    assert without_tokens(text) == text


@pytest.mark.parametrize("place", ["environment", "settings file"])
def test_the_key_reaches_the_engine_and_no_further(place, tmp_path):
    environ = {"SUPABASE_SERVICE_KEY": "service-key-canary"}
    if place == "environment":
        environ |= {"OURVIDZ_ENHANCER_KEY": KEY, "OURVIDZ_ENHANCER_URL": "http://a/v1"}
    else:
        file = tmp_path / "settings.toml"
        file.write_text(f'[ourvidz.enhancer]\nkey = "{KEY}"\nurl = "http://a/v1"\n')
        environ["OURVIDZ_SETTINGS"] = str(file)
    kept = engine_environment(load(environ), environ)
    assert kept == {"OURVIDZ_ENHANCER_KEY": KEY, "OURVIDZ_ENHANCER_URL": "http://a/v1"}
    read = load_section(EnhancerSettings, kept)
    assert (str(read.key), read.url) == (KEY, "http://a/v1")
    assert KEY not in repr(read)
    assert without_keys(kept) == {"OURVIDZ_ENHANCER_URL": "http://a/v1"}
