"""What a model's own ``variant.toml`` says about it; its defaults describe SDXL as it was published."""

from __future__ import annotations

from typing import Any

from attrs import field, frozen

from ourvidz_core.errors import Fault, PayloadError


def _positive(_: object, attribute: Any, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{attribute.name} above 0")


def _ours(_: object, attribute: Any, value: str) -> None:
    if value != "sdxl":
        raise ValueError(f'{attribute.name} "sdxl"')


@frozen(kw_only=True)
class SdxlVariant:
    """The sizes that a model makes."""

    name: str = ""
    family: str = field(default="sdxl", validator=_ours)
    #: A message's sizes are those of a production model; a small model makes this part of each side.
    size_scale: float = field(default=1.0, validator=_positive)
    size_multiple_of: int = field(default=8, validator=_positive)
    max_pixels: int = field(default=2048 * 2048, validator=_positive)

    def size_for(self, width: int, height: int) -> tuple[int, int]:
        """The pixels that this model makes where ``width`` x ``height`` were asked for.

        :raises PayloadError: they are more than the model can make.
        """
        made = (self._side(width), self._side(height))
        if made[0] * made[1] > self.max_pixels:
            limit = int(self.max_pixels / self.size_scale**2)
            raise PayloadError.from_faults(
                [Fault("$.config", f"at most {limit} pixels with this model", f"{width}*{height} = {width * height}")]
            )
        return made

    def _side(self, pixels: int) -> int:
        steps = round(pixels * self.size_scale / self.size_multiple_of)
        return max(1, steps) * self.size_multiple_of
