"""The callback: the one report a producer gets of a job's outcome."""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from attrs import field, frozen


class JobStatus(StrEnum):
    """The statuses that the endpoint knows. There is no other."""

    PROCESSING = "processing"
    COMPLETED = "completed"
    FAILED = "failed"

    @property
    def is_terminal(self) -> bool:
        """Whether nothing may follow it."""
        return self is not JobStatus.PROCESSING


@frozen(kw_only=True)
class Callback:
    """One report of one job, as the endpoint of the deployed system reads it."""

    job_id: str = field(metadata={"description": "The message's `id`"})
    status: JobStatus = field(metadata={"description": "Where the job stands"})
    assets: tuple[Any, ...] = field(
        default=(), metadata={"description": "In the order of the images; empty unless `completed`"}
    )
    error_message: str | None = field(
        default=None, metadata={"description": "What went wrong and what to do; only with `failed`"}
    )
    enhanced_prompt: str | None = field(
        default=None, metadata={"key": "enhancedPrompt", "description": "Only where the prompt was enhanced"}
    )
    metadata: Mapping[str, Any] = field(factory=dict, metadata={"description": "Below"})

    def to_json(self) -> dict[str, Any]:
        """The callback as a JSON object, in the wire's words and without absent keys."""
        body: dict[str, Any] = {"job_id": self.job_id, "status": self.status.value, "assets": list(self.assets)}
        if self.error_message is not None:
            body["error_message"] = self.error_message
        if self.enhanced_prompt is not None:
            body["enhancedPrompt"] = self.enhanced_prompt  # the one camel-case key of the wire
        body["metadata"] = dict(self.metadata)
        return body

    def to_bytes(self) -> bytes:
        """The body to send and to sign: compact UTF-8 JSON.

        Half a character, as an undecodable file name in an error message holds, becomes a question mark.
        """
        text = json.dumps(self.to_json(), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        return text.encode("utf-8", "replace")
