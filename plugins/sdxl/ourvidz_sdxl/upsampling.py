"""diffusers' ``Upsample2D`` with 4/9 of its work.

Behind a doubling of all pixels a kernel of 3x3 sees 2x2 pixels of the small picture, and which of its
weights fall on the same one is one of four kinds. So a convolution of 2x2 with four times the channels
makes all four, and they are woven into the large picture.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from attrs import define

from ourvidz_sdxl.operations import Operations


@define(kw_only=True, eq=False)
class FastUpsample:
    """Takes the place of ``module.forward``."""

    module: Any
    weave: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = Operations().weave
    #: (4 * channels, channels, 2, 2); made by :meth:`prepare`.
    _weight: torch.Tensor | None = None

    @staticmethod
    def fits(module: Any) -> bool:
        """Whether ``module`` doubles pixels and then sees 3x3 of them."""
        convolution = getattr(module, "conv", None)
        return (
            type(module).__name__ == "Upsample2D"
            and isinstance(convolution, torch.nn.Conv2d)
            and convolution.kernel_size == (3, 3)
            and convolution.padding == (1, 1)
            and convolution.bias is not None
            and module.norm is None
            and module.interpolate
        )

    def prepare(self) -> None:
        """Make the weights from the module's, where that is not done."""
        if self._weight is not None:
            return
        convolution = self.module.conv
        given = convolution.weight.detach().float()
        above, middle, below = given.unbind(2)
        # The upper pixel of two sees one line above itself, and itself twice; the lower one the other way round.
        kinds = [
            torch.stack([left, right], dim=-1)
            for lines in ((above, middle + below), (above + middle, below))
            for left, right in _columns(torch.stack(lines, dim=2))
        ]
        layout = torch.channels_last if given.is_cuda else torch.contiguous_format
        self._weight = torch.cat(kinds).to(convolution.weight.dtype, memory_format=layout)

    def forget(self) -> None:
        """Free the weights."""
        self._weight = None

    def __call__(self, hidden_states: torch.Tensor, output_size: Any = None) -> torch.Tensor:
        """The picture of twice the size. Another size is the module's own affair."""
        if output_size is not None or self._weight is None:
            made: torch.Tensor = type(self.module).forward(self.module, hidden_states, output_size)
            return made
        four = torch.nn.functional.conv2d(hidden_states, self._weight, padding=1)
        return self.weave(four, self.module.conv.bias)


def _columns(lines: torch.Tensor) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
    left, middle, right = lines.unbind(3)
    return (left, middle + right), (left + middle, right)
