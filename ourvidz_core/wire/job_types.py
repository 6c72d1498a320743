"""What a plugin declares about the jobs it owns. Differences between job types are data."""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import StrEnum
from typing import Any

import attrs
from attrs import field, frozen, validators

from ourvidz_core.wire.keys import DefaultMetadataKeys

NAME_PATTERN = re.compile(r"[a-z0-9][a-z0-9_\-]{0,63}")


class ContentType(StrEnum):
    """What a job type makes, in the words of the wire. A MIME type is a *media type*."""

    IMAGE = "image"
    VIDEO = "video"


class Quality(StrEnum):
    """The tier a job type is sold as."""

    FAST = "fast"
    HIGH = "high"


@frozen(kw_only=True)
class NoConfig:
    """The configuration of a job type that has nothing to configure."""


def _attrs_class(_: object, attribute: Any, value: Any) -> None:
    if not isinstance(value, type) or not attrs.has(value):
        raise TypeError(f"{attribute.name} must be an attrs class, not {value!r}")


def _name(_: object, attribute: Any, value: str) -> None:
    if not isinstance(value, str) or not NAME_PATTERN.fullmatch(value):
        raise ValueError(
            f"{attribute.name} must be 1 to 64 of the characters a-z 0-9 _ - and begin with a letter"
            f" or digit, not {value!r}"
        )


def _instance_of_attrs_class(_: object, attribute: Any, value: object) -> None:
    if not attrs.has(type(value)):
        raise TypeError(f"{attribute.name} must be an instance of an attrs class, not {value!r}")


@frozen(kw_only=True)
class JobType:
    """One kind of job: what it is called, where it comes from and what it needs.

    ``preset`` is an instance of the plugin's own frozen attrs class; a message's
    ``config`` is structured over it, field by field.

    >>> JobType(name="acme_upscale", queue="acme_queue", content_type=ContentType.IMAGE).bucket
    'acme_upscale'
    """

    name: str = field(validator=_name)
    queue: str = field(validator=_name)
    content_type: ContentType = field(converter=ContentType)
    #: Storage bucket of the results; the job type's own name unless said.
    bucket: str = field(validator=_name)
    quality: Quality | None = None
    #: The configuration that a message without ``config`` gets.
    preset: Any = field(factory=NoConfig, validator=_instance_of_attrs_class)
    #: What ``parse_job`` reads of ``config``, where it is not the preset's fields: see :mod:`ourvidz_core.wire.keys`.
    config_keys: type[Any] | None = field(default=None, validator=validators.optional(_attrs_class))
    #: What ``parse_job`` reads of ``metadata``.
    metadata_keys: type[Any] = field(default=DefaultMetadataKeys, validator=_attrs_class)
    #: Extension of the result files, without the dot; png or mp4 unless said.
    file_extension: str = field(validator=validators.matches_re(r"[a-z0-9]{1,8}"))
    media_type: str = field(validator=validators.matches_re(r"[a-z]+/[a-z0-9.+-]+"))
    #: A result file above this is refused before it is uploaded (MB of 10**6 bytes).
    max_asset_mb: float = field(default=50.0, validator=validators.gt(0))
    #: Device memory that a job of this type needs, weights and work together (GiB).
    vram_gb: float = field(default=0.0, validator=validators.ge(0))
    #: What a producer tells its users to expect.
    expected_seconds: float | None = None
    #: The engine is stopped when a job of this type takes longer.
    timeout_seconds: float = field(default=600.0, validator=validators.gt(0))
    description: str = ""
    #: Fields of a message that shows the type off, such as ``prompt`` and ``config``; for demos and checks.
    sample: Mapping[str, Any] = field(factory=dict)

    @bucket.default
    def _bucket_is_named_after_the_type(self) -> str:
        return self.name

    @file_extension.default
    def _extension_of_content_type(self) -> str:
        return {ContentType.IMAGE: "png", ContentType.VIDEO: "mp4"}[self.content_type]

    @media_type.default
    def _media_type_of_content_type(self) -> str:
        return {ContentType.IMAGE: "image/png", ContentType.VIDEO: "video/mp4"}[self.content_type]
