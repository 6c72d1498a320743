"""Enhance the prompt of a job, and say in its facts what became of that.

Whatever goes wrong ends in one place, the policy: the job goes on with the user's own
prompt and says so, or it fails and says so. Imports nothing heavy.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
from attrs import frozen

from ourvidz_core.engine.device_memory import is_out_of_memory
from ourvidz_core.engine.perform import STICKY_DEVICE_ERRORS
from ourvidz_core.engine.variants import find_model
from ourvidz_core.errors import EngineUnusable, GenerationError, ModelUnavailable
from ourvidz_core.plugins.context import JobContext
from ourvidz_core.plugins.residency import Work
from ourvidz_core.wire.job_types import ContentType
from ourvidz_core.wire.jobs import Job
from ourvidz_wan_enhanced.checks import fault_of, finished_part, tidied
from ourvidz_wan_enhanced.effort import DeadlinePassed, Effort, WorkFailed, finish_in_time
from ourvidz_wan_enhanced.instructions import read_instructions
from ourvidz_wan_enhanced.settings import EnhancerSettings, Policy
from ourvidz_wan_enhanced.writers import Draft, Task, Writer

logger = logging.getLogger(__name__)

TRIES = 2
#: What is left of a job's time belongs to its pictures; this share of it may go into its prompt.
SHARE_OF_TIME = 0.5
#: What a language model takes of a device beside its weights: the cache and the work of one prompt (GiB).
WORK_GB = 0.8
_TOO_LITTLE_MEMORY = "the device has too little memory for the language model"
_STAGE = "enhance"


class EnhancementFailed(GenerationError):
    """The prompt could not be enhanced, and the policy is to fail then."""


@frozen(kw_only=True)
class Enhancement:
    """What became of a prompt: the better one, or None, and the facts for the callback."""

    prompt: str | None
    facts: Mapping[str, Any]

    @property
    def outcome(self) -> str:
        """``applied``, or ``failed`` with the reason."""
        return str(self.facts["enhancement"])


class _Unenhanced(Exception):
    """There is no better prompt; says why."""


class FinishedDrafts:
    """The enhancements of late, by all that decides about them. The least recently used leaves first."""

    def __init__(self) -> None:
        self._drafts: OrderedDict[tuple[object, ...], Draft] = OrderedDict()

    def __len__(self) -> int:
        return len(self._drafts)

    def find(self, key: tuple[object, ...]) -> Draft | None:
        """The draft that was kept under ``key``."""
        if key in self._drafts:
            self._drafts.move_to_end(key)
        return self._drafts.get(key)

    def keep(self, key: tuple[object, ...], draft: Draft, *, size: int) -> None:
        """Keep ``draft``, and ``size`` drafts altogether."""
        self._drafts[key] = draft
        while len(self._drafts) > size:
            self._drafts.popitem(last=False)


_finished = FinishedDrafts()


def enhance_job(job: Job, context: JobContext) -> Job:
    """``job`` with its enhanced prompt, as far as it is wanted and can be had, and the facts.

    :raises EnhancementFailed: it cannot be had, and the policy is to fail then.
    """
    if not job.config.enhance_prompt:
        return attrs.evolve(job, facts={**job.facts, "enhancement": "off"})
    is_video = job.config.frame_num > 1
    enhancement = enhance(
        job.prompt,
        content_type=ContentType.VIDEO if is_video else ContentType.IMAGE,
        seed=job.seed,
        context=context,
    )
    if enhancement.prompt is None:
        logger.warning("job %s (%s): the enhancement %s", job.id, job.job_type, enhancement.outcome)
        if context.settings(EnhancerSettings).policy is Policy.FAIL:
            raise EnhancementFailed(f"the prompt's enhancement {enhancement.outcome}", details=enhancement.facts)
    return attrs.evolve(job, enhanced_prompt=enhancement.prompt, facts={**job.facts, **enhancement.facts})


def warm_up_writer(context: JobContext) -> None:
    """Load what writes the prompts.

    :raises ModelUnavailable: it cannot be had, and why.
    """
    try:
        _writer(_with_found_model(context.settings(EnhancerSettings)), context, {})
    except _Unenhanced as failure:
        raise ModelUnavailable(str(failure)) from failure


def enhance(prompt: str, *, content_type: ContentType, seed: int, context: JobContext) -> Enhancement:
    """Rewrite ``prompt`` with the model or the server of the settings. Fails in its facts, never silently."""
    settings = _with_found_model(context.settings(EnhancerSettings))
    facts: dict[str, Any] = {}
    text: str | None = None
    try:
        text = _enhanced(prompt, content_type=content_type, seed=seed, settings=settings, context=context, facts=facts)
        outcome = "applied"
    except _Unenhanced as failure:
        outcome = f"failed ({failure})"
    return Enhancement(prompt=text, facts={"enhancement": outcome, **facts})


def _with_found_model(settings: EnhancerSettings) -> EnhancerSettings:
    """The settings with the path of an installed model where they have its name."""
    return settings if settings.model is None else attrs.evolve(settings, model=find_model(settings.model, "qwen"))


def writer_key(settings: EnhancerSettings) -> str:
    """The name under which the language model is kept warm."""
    if settings.url is not None:
        return f"enhancer:{settings.url}:{settings.served_model or ''}"
    return f"enhancer:{settings.model}"


def _enhanced(
    prompt: str,
    *,
    content_type: ContentType,
    seed: int,
    settings: EnhancerSettings,
    context: JobContext,
    facts: dict[str, Any],
) -> str:
    facts |= {"enhancement_seconds": 0.0, "enhancement_tokens": 0, "enhancement_model": _name_of(settings)}
    # A NUL cannot be an argument of the command line, and half a character cannot be encoded.
    read = _cut(" ".join(prompt.replace("\0", " ").split()), settings.max_prompt_characters)
    if not read:
        raise _Unenhanced("the prompt is empty")
    if len(read) < len(" ".join(prompt.split())):
        facts["enhancement_prompt_cut"] = {"characters": len(prompt), "read": len(read)}
    instruction = read_instructions(settings.instructions).of(content_type)
    task = Task(
        prompt=read,
        instruction=instruction,
        seed=seed,
        max_tokens=settings.max_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
    )
    key = (writer_key(settings), instruction.digest, attrs.astuple(task, recurse=False))
    draft = _finished.find(key)
    if draft is not None:
        facts |= {"enhancement_tokens": draft.tokens, "enhancement_model": draft.model, "enhancement_cached": True}
        facts |= _decoding_of(draft)
        return draft.text
    writer = _writer(settings, context, facts)
    started = time.monotonic()
    try:
        place = context.models.residence(writer_key(settings))
        draft = place.run(lambda: _written(task, writer, settings, context, facts), work=Work(name="write"))
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        # Its memory is what the generation needs now.
        context.models.drop(writer_key(settings))
        raise _Unenhanced(_TOO_LITTLE_MEMORY) from None
    finally:
        facts["enhancement_seconds"] = round(time.monotonic() - started, 3)
        facts["enhancement_model"] = writer.name
    facts |= _decoding_of(draft)
    _finished.keep(key, draft, size=settings.cache_size)
    return draft.text


def _decoding_of(draft: Draft) -> dict[str, Any]:
    return {} if draft.decoding is None else {"enhancement_decoding": draft.decoding}


def _written(
    task: Task, writer: Writer, settings: EnhancerSettings, context: JobContext, facts: dict[str, Any]
) -> Draft:
    """The first draft that is a prompt."""
    seconds = min(settings.deadline_seconds, max(context.seconds_left, 0.0) * SHARE_OF_TIME)
    effort = Effort(seconds)
    # A base model may repeat its example as a chat model its orders.
    instruction = f"{task.instruction.system}\n{task.instruction.completion}"
    reason = ""
    for number in range(TRIES):
        attempt = attrs.evolve(task, seed=_seed_of(task.seed, number))
        facts["enhancement_tries"] = number + 1
        # The time is that of all tries together; only the wish to stop belongs to one.
        effort = effort.again()
        try:
            draft = finish_in_time(
                effort,
                lambda attempt=attempt, effort=effort: writer.write(attempt, effort),  # type: ignore[misc]
                lambda effort=effort: context.progress(effort.tokens, task.max_tokens, stage=_STAGE),  # type: ignore[misc]
            )
        except DeadlinePassed:
            facts["enhancement_tokens"] += effort.tokens
            late = f"it was not done within {round(seconds, 1):g} s"
            raise _Unenhanced(f"{late}; the try before: {reason}" if reason else late) from None
        except WorkFailed as failure:
            facts["enhancement_tokens"] += effort.tokens
            reason = _reason_of(failure)
            continue
        facts["enhancement_tokens"] += draft.tokens
        text = tidied(draft.text)
        whole = text if draft.is_finished else finished_part(text)
        if text and not whole:
            reason = f"the text did not end within {task.max_tokens} tokens"
            continue
        fault = fault_of(whole, prompt=task.prompt, instruction=instruction, max_tokens=settings.max_tokens)
        if fault is None:
            return attrs.evolve(draft, text=whole, tokens=facts["enhancement_tokens"])
        reason = fault
    raise _Unenhanced(reason)


def _reason_of(failure: WorkFailed) -> str:
    cause = failure.__cause__
    text = str(cause)
    if cause is not None and is_out_of_memory(cause):
        raise cause  # the same may do with the device to itself
    if any(sign in text for sign in STICKY_DEVICE_ERRORS):
        raise EngineUnusable(f"the device is broken until the engine restarts: {text}") from cause
    logger.warning("the language model failed", exc_info=cause)
    # What a server says may quote the prompt or the address; its own words stay in the log.
    return text if type(cause).__name__ == "ServerFailed" else f"the model raised {type(cause).__name__}"


def _writer(settings: EnhancerSettings, context: JobContext, facts: dict[str, Any]) -> Writer:
    started = time.monotonic()
    loaded: list[float] = []

    def load() -> Writer:
        writer = _load(settings, context.device)
        loaded.append(time.monotonic() - started)
        return writer

    vram_gb = 0.0 if settings.url is not None or settings.model is None else vram_of(settings.model)
    try:
        writer = context.models.get(
            writer_key(settings), load, vram_gb=vram_gb, on_leave=lambda writer, _part: writer.leave()
        )
    except ModelUnavailable as error:
        raise _Unenhanced(error.message) from None
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error) and not isinstance(error, MemoryError):
            raise
        raise _Unenhanced(_TOO_LITTLE_MEMORY) from None
    if loaded:
        facts["enhancement_load_seconds"] = round(loaded[0], 3)
    return writer


def _load(settings: EnhancerSettings, device: str) -> Writer:
    if settings.url is not None:
        try:
            from ourvidz_wan_enhanced.server import ServerWriter
        except ImportError:
            raise ModelUnavailable(
                "OURVIDZ_ENHANCER_URL needs the openai client; pip install 'ourvidz-wan-enhanced[server]'"
            ) from None
        return ServerWriter(settings.url, key=str(settings.key), served_model=settings.served_model)
    if settings.model is None:
        raise ModelUnavailable("no language model is configured; set OURVIDZ_ENHANCER_MODEL or OURVIDZ_ENHANCER_URL")
    from ourvidz_wan_enhanced.local import load_writer

    return load_writer(settings.model, device=device)


def vram_of(directory: Path) -> float:
    """What the model in ``directory`` takes of a device (GiB): its weights as bfloat16, and its work."""
    size_bytes = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    config = directory / "config.json"
    stated = json.loads(config.read_text("utf-8")) if config.is_file() else {}
    if (stated.get("dtype") or stated.get("torch_dtype")) == "float32":
        size_bytes //= 2
    return size_bytes / 2**30 + WORK_GB


def _name_of(settings: EnhancerSettings) -> str | None:
    if settings.url is not None:
        return settings.served_model or "server"
    return settings.model.name if settings.model is not None else None


def _cut(text: str, characters: int) -> str:
    """At most so many characters of ``text``, ending with a whole word where there are words."""
    if len(text) <= characters:
        return text
    begin, space, _ = text[: characters + 1].rpartition(" ")
    return begin if space and len(begin) > characters // 2 else text[:characters]


def _seed_of(seed: int, number: int) -> int:
    """The seed of a try: the job's own, then others that follow from it."""
    if number == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed}:{number}".encode()).digest()[:4], "big") >> 1
