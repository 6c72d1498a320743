"""Ask an OpenAI-compatible server, such as vLLM, in place of a model of our own."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from openai import APIConnectionError, APIStatusError, APITimeoutError, OpenAI

from ourvidz_wan_enhanced.effort import DeadlinePassed, Effort
from ourvidz_wan_enhanced.writers import Draft, Task

#: Where a server's template might see a token of its own: <|im_end|>, </s>, <start_of_turn>, [INST].
_LOOKS_LIKE_A_TOKEN = re.compile(r"<(?=[|｜/A-Za-z_])|\[(?=/?[A-Z_]+\])")  # noqa: RUF001 - some templates use that bar


class ServerFailed(Exception):
    """The server did not answer with a text."""


class ServerWriter:
    """A model behind ``/chat/completions``."""

    def __init__(self, url: str, *, key: str = "", served_model: str | None = None) -> None:
        base_url = url if urlsplit(url).path.strip("/") else f"{url.rstrip('/')}/v1"
        # One request is one try: what is tried again, and for how long, is not the client's business.
        self._client = OpenAI(base_url=base_url, api_key=key or "none", max_retries=0)
        self._served_model = served_model
        self.name = served_model or "server"

    def leave(self) -> None:
        """Nothing of it is on the device."""

    def write(self, task: Task, effort: Effort) -> Draft:
        """See :meth:`~ourvidz_wan_enhanced.writers.Writer.write`."""
        try:
            return self._write(task, effort)
        except APITimeoutError as error:
            raise DeadlinePassed from error
        except APIStatusError as error:
            raise ServerFailed(f"the server answered {error.status_code}") from error
        except APIConnectionError as error:
            raise ServerFailed("the server cannot be reached") from error

    def _write(self, task: Task, effort: Effort) -> Draft:
        client = self._client.with_options(timeout=max(effort.seconds_left, 0.001))
        if self._served_model is None:
            self._served_model = self._first_model(client)
        answer = client.chat.completions.create(
            model=self._served_model,
            messages=[
                {"role": "system", "content": task.instruction.system},
                {"role": "user", "content": without_tokens(task.prompt)},
            ],
            max_tokens=task.max_tokens,
            temperature=task.temperature,
            top_p=task.top_p,
            seed=task.seed,
        )
        self.name = self._served_model
        # The client takes a body as it comes; only a right one has these.
        choices = getattr(answer, "choices", None)
        message = getattr(choices[0], "message", None) if choices else None
        text = getattr(message, "content", None)
        if not choices or not isinstance(text, str | None) or message is None:
            raise ServerFailed("the server's answer is no chat completion")
        tokens = getattr(answer.usage, "completion_tokens", None)
        effort.tokens = tokens if isinstance(tokens, int) else 0
        return Draft(
            text=text or "",
            tokens=effort.tokens,
            is_finished=choices[0].finish_reason == "stop",
            model=self.name,
        )

    def _first_model(self, client: OpenAI) -> str:
        names = [model.id for model in client.models.list().data or ()]
        if not names:
            raise ServerFailed("the server lists no model; set OURVIDZ_ENHANCER_SERVED_MODEL")
        return names[0]


def without_tokens(text: str) -> str:
    """``text`` with a space in whatever could be a special token of the server's template.

    A server renders the template itself, so that no client can keep text and tokens apart.

    >>> without_tokens("a fox <|im_end|>")
    'a fox < |im_end|>'
    """
    return _LOOKS_LIKE_A_TOKEN.sub(lambda match: f"{match[0]} ", text)
