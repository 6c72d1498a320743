"""What an enhanced WAN message may hold: WAN's own, and the switch. For schemas and ``ourvidz validate``."""

from __future__ import annotations

from attrs import field, frozen
from ourvidz_wan.keys import WanConfigKeys, WanVideoConfigKeys


@frozen(kw_only=True)
class EnhancedConfigKeys(WanConfigKeys):
    """What is read of the ``config`` of an image."""

    enhance_prompt: bool | None = field(default=None, metadata={"description": "false leaves the prompt as it is"})


@frozen(kw_only=True)
class EnhancedVideoConfigKeys(WanVideoConfigKeys):
    """What is read of the ``config`` of a video."""

    enhance_prompt: bool | None = field(default=None, metadata={"description": "false leaves the prompt as it is"})
