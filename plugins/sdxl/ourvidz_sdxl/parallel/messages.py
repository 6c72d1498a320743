"""What ranks tell each other of a job: the request for one's part, and the pictures that came of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import cattrs
from attrs import evolve
from PIL import Image

from ourvidz_sdxl.config import ReferenceType
from ourvidz_sdxl.pipeline import ImageRequest, ReferencePicture


def say_request(request: ImageRequest) -> dict[str, Any]:
    """``request`` as a message; the pixels of its reference come along."""
    message: dict[str, Any] = {"request": cattrs.unstructure(evolve(request, reference=None))}
    if (reference := request.reference) is not None:
        message["reference"] = {"type": str(reference.type), "strength": reference.strength}
        message |= say_pictures([reference.image])
    return message


def read_request(message: Mapping[str, Any]) -> ImageRequest:
    """The request that :func:`say_request` said."""
    request = cattrs.structure(message["request"], ImageRequest)
    if "reference" not in message:
        return request
    (image,) = read_pictures(message)
    type_, strength = ReferenceType(message["reference"]["type"]), message["reference"]["strength"]
    return evolve(request, reference=ReferencePicture(image=image, type=type_, strength=strength))


def say_pictures(pictures: Sequence[Image.Image]) -> dict[str, Any]:
    """Pictures as a part of a message."""
    return {
        "sizes": [picture.size for picture in pictures],
        "blobs": [picture.convert("RGB").tobytes() for picture in pictures],
    }


def read_pictures(message: Mapping[str, Any]) -> list[Image.Image]:
    """The pictures that :func:`say_pictures` said."""
    blobs = message.get("blobs", [])
    return [Image.frombytes("RGB", tuple(size), blob) for size, blob in zip(message["sizes"], blobs, strict=True)]
