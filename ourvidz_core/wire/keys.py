"""The keys of a message's ``config`` and ``metadata``, as classes that say what each may hold.

Nothing is structured into them: they are what the schemas, the reference pages and
``ourvidz validate`` know of a message. A job type whose ``parse_job`` reads keys of its own
names classes of its own, which inherit from these, as its ``config_keys`` and
``metadata_keys``. A field's ``metadata`` holds its ``description`` and, under
``json_schema``, what neither its type nor the validators of attrs can say. A key that is
read and never refused has the type ``Any``.
"""

from __future__ import annotations

from typing import Any

from attrs import field, frozen
from attrs.validators import ge, lt, optional

_SEED = "Image i of the job has the seed plus i; without one, a number below 2**31 is drawn from the job's id"


@frozen(kw_only=True)
class ConfigKeys:
    """What core reads of every ``config``."""

    seed: int | None = field(
        default=None, validator=optional([ge(0), lt(2**63)]), metadata={"description": f"{_SEED}. 0 is a seed"}
    )
    expected_time: Any = field(
        default=None,
        metadata={"description": "Seconds that the producer has told its user; above 0, or it is not reported"},
    )
    content_type: Any = field(default=None, metadata={"description": "For the producer; the job type has its own"})
    file_extension: Any = field(default=None, metadata={"description": "For the producer; the job type has its own"})


@frozen(kw_only=True)
class MetadataKeys:
    """What core reads of every ``metadata``."""

    seed: int | None = field(
        default=None,
        validator=optional([ge(0), lt(2**63)]),
        metadata={"description": "The seed, where config has none"},
    )


@frozen(kw_only=True)
class DefaultConfigKeys(ConfigKeys):
    """What the default ``parse_job`` reads of ``config`` beside the fields of the preset."""

    image: str | None = field(default=None, metadata={"description": "URL of the reference image"})


@frozen(kw_only=True)
class DefaultMetadataKeys(MetadataKeys):
    """What the default ``parse_job`` reads of ``metadata``."""

    reference_image_url: str | None = field(
        default=None, metadata={"description": "URL of the reference image, where config.image has none"}
    )
