"""SDXL's transformers and residual blocks as few launches, with the model's own weights.

Between the two layouts of a picture nothing is copied. What is added to a picture is added where it is read
the next time. A sum that goes through the transformers' blocks is added to by the products themselves, without the
biases of their layers: those are one vector, known beforehand, which whoever reads the sum adds. Keys and values
of a text are the same in every step, so they are made once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.attention_processor import FusedAttnProcessor2_0
from torch.nn import functional

from ourvidz_sdxl.operations import Operations
from ourvidz_sdxl.upsampling import FastUpsample

#: Numbers of rows and of tokens whose keys and values are kept; as many as there are graphs that read them.
_TEXTS = 8
#: What the UNet may be given beside pictures, times and texts.
_CONDITIONS = {"text_embeds", "time_ids"}


class OtherWays:
    """Modules that run in another way, while :meth:`running` is open."""

    def __init__(self) -> None:
        self._is_running = False

    @contextmanager
    def running(self) -> Iterator[None]:
        """While it is open, the other ways take the place of the modules' own."""
        self._is_running = True
        try:
            yield
        finally:
            self._is_running = False

    def replace(self, module: Any, fast: Callable[..., Any]) -> None:
        """Let ``fast`` take the place of ``module.forward``."""
        own: Callable[..., Any] = module.forward

        def forward(*arguments: Any, **options: Any) -> Any:
            return (fast if self._is_running else own)(*arguments, **options)

        module.forward = forward

    def replace_norm(self, norm: Any, activation: Any, operations: Operations) -> None:
        """Let one operation do a group norm and the activation behind it, where that is SiLU."""
        if isinstance(norm, torch.nn.GroupNorm) and isinstance(activation, torch.nn.SiLU):
            self.replace(norm, lambda picture: operations.group_norm((picture,), None, norm, True))
            self.replace(activation, lambda picture: picture)


class FastParts(OtherWays):
    """Parts of a UNet with fused projections that run in another way."""

    def __init__(self, unet: Any, operations: Operations) -> None:
        super().__init__()
        self._texts = TextKeys()
        self._parts: list[_FastTransformer | FastResnet | FastUpsample] = []
        resnets: dict[Any, FastResnet] = {}
        for module in unet.modules():
            if _is_usual_transformer(module):
                fast = _FastTransformer(module, operations, self._texts)
                self._parts.append(fast)
                self.replace(module, fast)
            elif FastResnet.fits(module):
                resnets[module] = FastResnet(module, operations)
                self._parts.append(resnets[module])
                self.replace(module, resnets[module])
            elif FastUpsample.fits(module):
                upsample = FastUpsample(module=module, weave=operations.weave)
                self._parts.append(upsample)
                self.replace(module, upsample)
        for block in unet.up_blocks:
            if _FastUpBlock.fits(block):
                self.replace(block, _FastUpBlock(block, [resnets[resnet] for resnet in block.resnets]))
        self.replace_norm(unet.conv_norm_out, unet.conv_act, operations)

    @staticmethod
    def take(options: dict[str, Any]) -> bool:
        """Whether a call of the UNet with these options is one that they know."""
        others = {key: value for key, value in options.items() if key not in {"added_cond_kwargs", "return_dict"}}
        conditions = options.get("added_cond_kwargs") or {}
        return all(value is None for value in others.values()) and conditions.keys() <= _CONDITIONS

    def has_room_for(self, text: torch.Tensor) -> bool:
        """Whether ``text`` can be prepared beside those that are kept."""
        return text.shape[:2] in self._texts or len(self._texts) < _TEXTS

    def prepare(self, text: torch.Tensor) -> None:
        """Make what does not change from step to step. Not while a graph is recorded.

        What was made for a text of the same size is overwritten, where graphs look for it.
        """
        with torch.no_grad():
            for part in self._parts:
                part.prepare()
            self._texts.prepare(text)

    def forget(self) -> None:
        """Free what :meth:`prepare` made; no graph that was recorded before may run again."""
        for part in self._parts:
            part.forget()
        self._texts.forget()


class TextKeys:
    """The keys and values of a text for all layers that look at it, by the number of texts and of their tokens."""

    def __init__(self) -> None:
        self._layers: list[torch.nn.Linear] = []
        self._made: dict[Sequence[int], list[torch.Tensor]] = {}
        #: The text that they were made of, and its version; held, so that no other has its identity.
        self._texts: dict[Sequence[int], tuple[torch.Tensor, int]] = {}

    def __len__(self) -> int:
        """How many sizes are kept."""
        return len(self._made)

    def __contains__(self, size: object) -> bool:
        """Whether a number of texts and of tokens is kept."""
        return size in self._made

    def add(self, layer: torch.nn.Linear) -> int:
        """A layer without a bias that makes keys and values; its number."""
        self._layers.append(layer)
        return len(self._layers) - 1

    def of(self, text: torch.Tensor, layer: int) -> torch.Tensor:
        """Keys and values beside each other: (texts, tokens, 2 * channels)."""
        return self._made[text.shape[:2]][layer]

    def prepare(self, text: torch.Tensor) -> None:
        """Make those of ``text`` (texts, tokens, channels), where that is not done."""
        size = text.shape[:2]
        # Tensors that were made in inference mode count no versions.
        version = 0 if text.is_inference() else text._version
        known = self._texts.get(size)
        if known is not None and known[0] is text and known[1] == version:
            return
        if size not in self._made:
            # Tensors made in inference mode could not be written to outside of it.
            with torch.inference_mode(False):
                self._made[size] = [text.new_empty((*size, layer.out_features)) for layer in self._layers]
        self._texts.pop(size, None)
        flat = text.reshape(-1, text.shape[-1])
        for layer, made in zip(self._layers, self._made[size], strict=True):
            torch.mm(flat, layer.weight.t(), out=made.view(-1, made.shape[-1]))
        self._texts[size] = (text, version)

    def forget(self) -> None:
        """Free them."""
        self._made.clear()
        self._texts.clear()


class _FastTransformer:
    """diffusers' ``Transformer2DModel``."""

    def __init__(self, module: Any, operations: Operations, texts: TextKeys) -> None:
        self._module, self._operations, self._texts = module, operations, texts
        self._blocks = [_FastBlock(block, operations, texts) for block in module.transformer_blocks]
        #: The last layer's bias, with what the sum before it lacks.
        self._bias: torch.Tensor | None = None

    def prepare(self) -> None:
        if self._bias is not None:
            return
        last = self._module.proj_out
        missing = torch.zeros(last.in_features, device=last.weight.device)
        for block in self._blocks:
            missing = block.prepare(missing)
        self._bias = (last.bias.float() + last.weight.float() @ missing).to(last.bias.dtype)

    def forget(self) -> None:
        self._bias = None
        for block in self._blocks:
            block.missing = ()

    def __call__(self, hidden_states: torch.Tensor, *, encoder_hidden_states: torch.Tensor, **_: Any) -> Any:
        module = self._module
        normed = self._operations.group_norm((hidden_states,), None, module.norm, False)
        hidden = module.proj_in(normed.permute(0, 2, 3, 1).flatten(1, 2))
        for block in self._blocks:
            block(hidden, encoder_hidden_states)
        made = functional.linear(hidden, module.proj_out.weight, self._bias)
        return (made.unflatten(1, hidden_states.shape[2:]).permute(0, 3, 1, 2) + hidden_states,)


class _FastBlock:
    """diffusers' ``BasicTransformerBlock``; the sum that it is given is changed."""

    def __init__(self, block: Any, operations: Operations, texts: TextKeys) -> None:
        self._block, self._operations, self._texts = block, operations, texts
        self._layer = texts.add(block.attn2.to_kv)
        #: What the sum lacks before each norm.
        self.missing: tuple[torch.Tensor, ...] = ()

    def prepare(self, missing: torch.Tensor) -> torch.Tensor:
        """Given what the sum lacks before it: what it lacks after it."""
        block, vectors = self._block, []
        for layer in (block.attn1.to_out[0], block.attn2.to_out[0], block.ff.net[2]):
            vectors.append(missing.to(layer.bias.dtype))
            missing = missing + layer.bias.float()
        self.missing = tuple(vectors)
        return missing

    def __call__(self, total: torch.Tensor, text: torch.Tensor) -> None:
        block = self._block
        own, seen, gated = block.attn1, block.attn2, block.ff.net[0].proj
        normed = self._normed(block.norm1, total, 0)
        _add(total, _attended(own, *own.to_qkv(normed).chunk(3, dim=-1)), own.to_out[0])
        normed = self._normed(block.norm2, total, 1)
        look_at = self._operations.look_at
        _add(total, look_at(seen.to_q(normed), self._texts.of(text, self._layer), seen.heads), seen.to_out[0])
        normed = self._normed(block.norm3, total, 2)
        _add(total, self._operations.geglu(normed, gated.weight, gated.bias), block.ff.net[2])

    def _normed(self, norm: Any, total: torch.Tensor, index: int) -> torch.Tensor:
        return self._operations.layer_norm(total, self.missing[index], norm.weight, norm.bias, norm.eps)


class FastResnet:
    """diffusers' ``ResnetBlock2D``."""

    def __init__(self, module: Any, operations: Operations) -> None:
        self._module, self._operations = module, operations
        #: Of what the time adds, with the first convolution's; and of the sum in the end.
        self._biases: tuple[torch.Tensor, ...] = ()

    @staticmethod
    def fits(module: Any) -> bool:
        """Whether it is as in SDXL; what is otherwise, stays as it is."""
        return (
            type(module).__name__ == "ResnetBlock2D"
            and isinstance(module.nonlinearity, torch.nn.SiLU)
            and isinstance(module.norm1, torch.nn.GroupNorm)
            and module.upsample is None
            and module.downsample is None
            and not module.skip_time_act
            and (module.time_emb_proj is None or module.time_embedding_norm == "default")
            and module.output_scale_factor == 1.0
            and (module.conv_shortcut is None or module.conv_shortcut.bias is not None)
        )

    def prepare(self) -> None:
        """Put biases together, where that is not done."""
        if self._biases:
            return
        module = self._module
        first, last = module.conv1.bias, module.conv2.bias
        if module.time_emb_proj is not None:
            first = first + module.time_emb_proj.bias
        if module.conv_shortcut is not None:
            last = last + module.conv_shortcut.bias
        self._biases = first.detach(), last.detach()

    def forget(self) -> None:
        """Free what :meth:`prepare` made."""
        self._biases = ()

    def __call__(self, picture: torch.Tensor, temb: torch.Tensor | None = None) -> torch.Tensor:
        """The picture behind it; without ``temb`` where the block knows no time."""
        return self.of((picture,), temb)

    def of(self, pictures: Sequence[torch.Tensor], temb: torch.Tensor | None) -> torch.Tensor:
        """The same for pictures whose channels lie beside each other."""
        module, group_norm = self._module, self._operations.group_norm
        added, last = self._biases
        if temb is None:
            added = added.expand(len(pictures[0]), -1)
        else:
            added = functional.linear(functional.silu(temb), module.time_emb_proj.weight, added)
        hidden = _convolved(module.conv1, group_norm(pictures, None, module.norm1, True))
        hidden = _convolved(module.conv2, group_norm((hidden,), added, module.norm2, True))
        return self._operations.add_up(hidden, self._shortcut(pictures), last)

    def _shortcut(self, pictures: Sequence[torch.Tensor]) -> torch.Tensor:
        convolution = self._module.conv_shortcut
        if convolution is None:
            (picture,) = pictures
            return picture
        if len(pictures) == 1:
            return _convolved(convolution, pictures[0])
        parts = convolution.weight.flatten(1).split([picture.shape[1] for picture in pictures], dim=1)
        flat = [picture.permute(0, 2, 3, 1).flatten(0, 2) for picture in pictures]
        total = flat[0] @ parts[0].t()
        for picture, part in zip(flat[1:], parts[1:], strict=True):
            total.addmm_(picture, part.t())
        rows, _, height, width = pictures[0].shape
        return total.view(rows, height, width, -1).permute(0, 3, 1, 2)


class _FastUpBlock:
    """diffusers' ``CrossAttnUpBlock2D`` and ``UpBlock2D``: what was kept on the way down is read where it lies."""

    def __init__(self, module: Any, resnets: Sequence[FastResnet]) -> None:
        self._module, self._resnets = module, resnets
        self._attentions = getattr(module, "attentions", None) or [None] * len(resnets)

    @staticmethod
    def fits(module: Any) -> bool:
        """Whether it is as in SDXL; what is otherwise, stays as it is."""
        return type(module).__name__ in {"CrossAttnUpBlock2D", "UpBlock2D"} and all(
            FastResnet.fits(resnet) and resnet.conv_shortcut is not None and resnet.conv_shortcut.kernel_size == (1, 1)
            for resnet in module.resnets
        )

    def __call__(
        self,
        hidden_states: torch.Tensor,
        res_hidden_states_tuple: tuple[torch.Tensor, ...],
        temb: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        upsample_size: Any = None,
        **_: Any,
    ) -> torch.Tensor:
        kept = reversed(res_hidden_states_tuple)
        for resnet, attention, picture in zip(self._resnets, self._attentions, kept, strict=False):
            hidden_states = resnet.of((hidden_states, picture), temb)
            if attention is not None:
                hidden_states = attention(hidden_states, encoder_hidden_states=encoder_hidden_states)[0]
        for upsampler in self._module.upsamplers or ():
            hidden_states = upsampler(hidden_states, upsample_size)
        return hidden_states


def _convolved(convolution: Any, picture: torch.Tensor) -> torch.Tensor:
    """Without its bias."""
    return functional.conv2d(picture, convolution.weight, None, convolution.stride, convolution.padding)


def _add(total: torch.Tensor, given: torch.Tensor, layer: torch.nn.Linear) -> None:
    """Add what ``layer`` makes without its bias; the product does it itself."""
    total.view(-1, total.shape[-1]).addmm_(given.reshape(-1, given.shape[-1]), layer.weight.t())


def _attended(attention: Any, *parts: torch.Tensor) -> torch.Tensor:
    query, key, value = (part.unflatten(-1, (attention.heads, -1)).transpose(1, 2) for part in parts)
    return functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


def _is_usual_transformer(module: Any) -> bool:
    """Whether it is as in SDXL; what is otherwise, stays as it is."""
    if type(module).__name__ != "Transformer2DModel" or not module.use_linear_projection:
        return False
    return all(
        block.norm_type == "layer_norm"
        and block.pos_embed is None
        and block.attn2 is not None
        and type(block.ff.net[0]).__name__ == "GEGLU"
        and isinstance(block.norm1, torch.nn.LayerNorm)
        and all(
            isinstance(attention.processor, FusedAttnProcessor2_0)
            and attention.fused_projections
            and not attention.use_bias
            and attention.norm_q is None
            and attention.group_norm is None
            and not attention.residual_connection
            and attention.rescale_output_factor == 1.0
            for attention in (block.attn1, block.attn2)
        )
        and not block.attn1.is_cross_attention
        and block.attn2.is_cross_attention
        for block in module.transformer_blocks
    )
