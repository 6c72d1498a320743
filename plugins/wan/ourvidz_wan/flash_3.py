"""FlashAttention 3 as operations that a compiler takes whole."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

logger = logging.getLogger(__name__)

#: Modules that may hold FlashAttention 3: the wheel ``fa3-fwd``, and what its authors' own build installs.
FLASH_3_MODULES = ("fa3_fwd_interface", "flash_attn_interface")
#: Heads that it is used for: WAN's, with which it was measured. A build may leave other sizes out, and after an illegal
#: instruction a process can use its device no more, so that trying is no way to find out.
FLASH_3_HEAD_DIM = 128


@torch.library.custom_op("ourvidz_wan::flash_3", mutates_args=())  # type: ignore[untyped-decorator]
def flash_3(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention over ``[batch, tokens, heads, channels]``, and the same again."""
    return _attended(flash_3_function()(query, key, value))


@flash_3.register_fake  # type: ignore[untyped-decorator]
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:  # noqa: ARG001
    return torch.empty_like(query, memory_format=torch.contiguous_format)


@torch.library.custom_op("ourvidz_wan::flash_3_fp8", mutates_args=())  # type: ignore[untyped-decorator]
def flash_3_fp8(values: list[torch.Tensor], scales: list[torch.Tensor]) -> torch.Tensor:
    """The same in bfloat16 of query, key and value in e4m3, to be multiplied with their scales ``[batch, heads]``."""
    named = dict(zip(("q_descale", "k_descale", "v_descale"), scales, strict=True))
    return _attended(flash_3_function()(*values, **named))


@flash_3_fp8.register_fake  # type: ignore[untyped-decorator]
def _(values: list[torch.Tensor], scales: list[torch.Tensor]) -> torch.Tensor:  # noqa: ARG001
    query = values[0]
    return torch.empty(query.shape, dtype=torch.bfloat16, device=query.device)


@lru_cache(maxsize=1)
def flash_3_function() -> Callable[..., Any]:
    """``flash_attn_func`` of whatever build is installed.

    :raises ImportError: there is none.
    """
    for name in FLASH_3_MODULES:
        try:
            function: Callable[..., Any] = importlib.import_module(name).flash_attn_func
        except ImportError as error:
            if getattr(error, "name", None) != name:
                logger.warning("FlashAttention 3 is installed and cannot be used: %s", error)
            continue
        return function
    raise ImportError(f"FlashAttention 3 is not installed (no module {' or '.join(FLASH_3_MODULES)})")


def _attended(answer: Any) -> torch.Tensor:
    # Builds differ in whether they also give the sums of the softmax.
    result: torch.Tensor = answer[0] if isinstance(answer, tuple) else answer
    return result
