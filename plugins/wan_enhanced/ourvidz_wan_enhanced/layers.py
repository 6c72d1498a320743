"""One token through the layers of a language model: fewer and larger products, and one function for all layers.

Where one token is decoded, a layer is as fast as its weights are read and its kernels are few.
What reads the same input is one product here, and since a layer's weights are arguments of the
function, all layers together are compiled once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.nn.functional import linear, scaled_dot_product_attention, silu

#: Architectures made of such layers, by transformers' names.
LAYERED_TYPES = frozenset({"llama", "qwen2", "qwen3"})
_FUSED = {
    "self_attn": ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
    "mlp": ("gate_up_proj", ("gate_proj", "up_proj")),
}


class LayerWeights(NamedTuple):
    """What a layer multiplies with; what its architecture does not have is None."""

    norm_before: torch.Tensor
    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    query_norm: torch.Tensor | None
    key_norm: torch.Tensor | None
    out: torch.Tensor
    out_bias: torch.Tensor | None
    norm_after: torch.Tensor
    gate_up: torch.Tensor
    gate_up_bias: torch.Tensor | None
    down: torch.Tensor
    down_bias: torch.Tensor | None


class FixedCacheModel:
    """A causal language model that reads a text by its own code, and one token after another by ours.

    Its projections are fused; the model itself gives the scores that it gave before. The keys and
    values of a text lie in a place of their own with room for ``room`` tokens. ``compiled`` is
    :func:`decode_layer`, compiled.
    """

    def __init__(self, model: Any, *, room: int, compiled: Callable[..., torch.Tensor] | None = None) -> None:
        fuse_projections(model)
        config = model.config.get_text_config(decoder=True)
        attention = model.model.layers[0].self_attn
        self._model = model
        self._decode_layer = compiled or decode_layer
        self._eps = float(config.rms_norm_eps)
        self._scaling = float(attention.scaling)
        self._weights = [_weights_of(one) for one in model.model.layers]
        self._shape = (1, config.num_key_value_heads, room, attention.head_dim)
        self._keys: list[torch.Tensor] = []
        self._values: list[torch.Tensor] = []

    def reserve(self) -> None:
        """Take memory for the cache, where it has none."""
        if not self._keys:
            # Each on its own: a compiler looks closely at what changes and shares its memory.
            both = [
                torch.zeros(self._shape, dtype=self._model.dtype, device=self._model.device)
                for _ in range(2 * len(self._weights))
            ]
            self._keys, self._values = both[::2], both[1::2]

    def forget(self) -> None:
        """Free the cache's memory."""
        self._keys, self._values = [], []

    def keep(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Begin a text in ``layer`` with these ``keys`` and ``values`` (1, heads, tokens, width)."""
        self._keys[layer][:, :, : keys.shape[2]].copy_(keys)
        self._values[layer][:, :, : values.shape[2]].copy_(values)

    def next_scores(self, token: torch.Tensor, position: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The scores (1, vocabulary) after ``token`` (1, 1), which is at ``position`` (1) of the text.

        ``mask`` (tokens) is added to the scores of attention; the rest of the cache is not looked at.
        """
        body = self._model.model
        hidden = body.embed_tokens(token)[0]
        cos, sin = body.rotary_emb(hidden, position[None])
        for weights, keys, values in zip(self._weights, self._keys, self._values, strict=True):
            hidden = self._decode_layer(
                hidden,
                weights,
                keys[:, :, : len(mask)],
                values[:, :, : len(mask)],
                position=position,
                cos=cos,
                sin=sin,
                mask=mask,
                eps=self._eps,
                scaling=self._scaling,
            )
        scores: torch.Tensor = self._model.lm_head(body.norm(hidden))
        return scores


def decode_layer(
    hidden: torch.Tensor,
    weights: LayerWeights,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    position: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    mask: torch.Tensor,
    eps: float,
    scaling: float,
) -> torch.Tensor:
    """What comes out of a layer for one token's ``hidden`` (1, size), whose place in the cache is filled.

    Rounded where transformers rounds. Query heads that share their keys are the rows of one product.
    """
    heads, width = keys.shape[1], keys.shape[3]
    qkv = linear(_normed(hidden, weights.norm_before, eps), weights.qkv, weights.qkv_bias).view(1, -1, width)
    query, key, value = qkv.split([qkv.shape[1] - 2 * heads, heads, heads], dim=1)
    if weights.query_norm is not None and weights.key_norm is not None:
        query, key = _normed(query, weights.query_norm, eps), _normed(key, weights.key_norm, eps)
    query, key = query * cos + _turned(query) * sin, key * cos + _turned(key) * sin
    keys.index_copy_(2, position, key[:, :, None])
    values.index_copy_(2, position, value[:, :, None])
    seen = attend(query.reshape(1, heads, -1, width), keys, values, mask, scaling)
    hidden = hidden + linear(seen.reshape(1, -1), weights.out, weights.out_bias)
    gate, up = linear(_normed(hidden, weights.norm_after, eps), weights.gate_up, weights.gate_up_bias).chunk(2, dim=-1)
    return hidden + linear(silu(gate) * up, weights.down, weights.down_bias)


def attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Attention of the rows of ``query`` (1, heads, rows, width) to ``keys`` and ``values`` (1, heads, tokens, width).

    A kernel for many rows would leave most of a GPU idle: it gives each head to one multiprocessor. Where a compiler
    makes the kernels, the tokens are spread over all of them, and nothing is rounded on the way.
    """
    if not torch.compiler.is_compiling():
        return scaled_dot_product_attention(query, keys, values, attn_mask=mask[None, None, None], scale=scaling)
    scores = (query[:, :, :, None].float() * keys[:, :, None]).sum(dim=-1) * scaling + mask
    shares = scores.softmax(dim=-1)
    return (shares[..., None] * values[:, :, None]).sum(dim=-2).to(query.dtype)


def fuse_projections(model: Any) -> None:
    """Let one product make queries, keys and values, and one both halves of the feed-forward layer.

    The single layers stay for the model's own code, as parts of the one that holds the weights.
    """
    for one in model.model.layers:
        for owner, (whole, parts) in _FUSED.items():
            _fuse(getattr(one, owner), whole, parts)
        if model.device.type == "cuda":
            # What the parts took does not fit the next whole.
            torch.cuda.empty_cache()


class _Part(torch.nn.Module):  # type: ignore[misc]
    """Some of the outputs of a layer that it does not own."""

    def __init__(self, whole: torch.nn.Linear, start: int, end: int) -> None:
        super().__init__()
        self._whole = (whole,)  # in a tuple, or its weights would count twice
        self._rows = slice(start, end)

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        (whole,) = self._whole
        return linear(given, whole.weight[self._rows], None if whole.bias is None else whole.bias[self._rows])


def _fuse(owner: Any, name: str, parts: tuple[str, ...]) -> None:
    if hasattr(owner, name):
        return
    layers = [getattr(owner, part) for part in parts]
    ends = torch.tensor([layer.out_features for layer in layers]).cumsum(0).tolist()
    # Tensors of inference mode are of a kind of their own, which cannot be moved.
    with torch.inference_mode(False), torch.no_grad():
        whole = torch.nn.Linear(layers[0].in_features, ends[-1], bias=layers[0].bias is not None, device="meta")
        whole.weight = torch.nn.Parameter(torch.cat([layer.weight for layer in layers]), requires_grad=False)
        if whole.bias is not None:
            whole.bias = torch.nn.Parameter(torch.cat([layer.bias for layer in layers]), requires_grad=False)
    setattr(owner, name, whole)
    for part, start, end in zip(parts, [0, *ends], ends, strict=False):
        setattr(owner, part, _Part(whole, start, end))


def _weights_of(one: Any) -> LayerWeights:
    attention, mlp = one.self_attn, one.mlp
    return LayerWeights(
        norm_before=one.input_layernorm.weight,
        qkv=attention.qkv_proj.weight,
        qkv_bias=attention.qkv_proj.bias,
        query_norm=attention.q_norm.weight if hasattr(attention, "q_norm") else None,
        key_norm=attention.k_norm.weight if hasattr(attention, "k_norm") else None,
        out=attention.o_proj.weight,
        out_bias=attention.o_proj.bias,
        norm_after=one.post_attention_layernorm.weight,
        gate_up=mlp.gate_up_proj.weight,
        gate_up_bias=mlp.gate_up_proj.bias,
        down=mlp.down_proj.weight,
        down_bias=mlp.down_proj.bias,
    )


def _normed(hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    exact = hidden.float()
    return weight * (exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + eps)).to(hidden.dtype)


def _turned(vectors: torch.Tensor) -> torch.Tensor:
    first, second = vectors.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)
