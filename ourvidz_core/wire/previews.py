"""What a preview of a running job is: one small JPEG in its work directory, and nothing that is larger."""

from __future__ import annotations

#: Its name in the job's work directory.
PREVIEW_FILE = "preview.jpg"
PREVIEW_PIXELS = 256
PREVIEW_BYTES = 16 * 1024
_JPEG_START = b"\xff\xd8\xff"


def is_preview(content: bytes) -> bool:
    """Whether ``content`` begins like a JPEG and is small enough. Nobody but a browser decodes it."""
    return content.startswith(_JPEG_START) and len(content) <= PREVIEW_BYTES
