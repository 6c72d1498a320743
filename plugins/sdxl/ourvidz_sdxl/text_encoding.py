"""Turn prompts of any length, with weights, into what the UNet reads.

compel does the weighting and the splitting; it is given fragments that we read ourselves,
never text, so none of its own prompt syntax can come from a user.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import torch
from attrs import frozen
from compel import ReturnedEmbeddingsType
from compel.embeddings_provider import EmbeddingsProvider

from ourvidz_core.engine.graphs import GraphedCall
from ourvidz_core.errors import Fault, PayloadError
from ourvidz_sdxl.prompts import parse_weights, plain_text

#: A text beyond this many pieces of 75 tokens is no prompt; each makes attention dearer.
MAX_CHUNKS = 16
#: A pair of texts takes about 1 MB per chunk.
_CACHED_TEXTS = 64


@frozen(kw_only=True)
class Conditioning:
    """A prompt and a negative prompt as the UNet reads them, both of the same length."""

    prompt: torch.Tensor
    pooled: torch.Tensor
    negative: torch.Tensor
    negative_pooled: torch.Tensor
    #: Pieces of 77 tokens.
    chunks: int


class PromptEncoder:
    """The two text encoders of one model, and the last texts they encoded."""

    def __init__(self, pipeline: Any, device: str) -> None:
        self._providers = tuple(
            EmbeddingsProvider(
                tokenizer=tokenizer,
                text_encoder=text_encoder,
                truncate=False,
                returned_embeddings_type=ReturnedEmbeddingsType.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED,
                device=device,
                model_max_length=text_encoder.config.max_position_embeddings,
            )
            for tokenizer, text_encoder in (
                (pipeline.tokenizer, pipeline.text_encoder),
                (pipeline.tokenizer_2, pipeline.text_encoder_2),
            )
        )
        self._device = device
        self._chunk_tokens = int(pipeline.text_encoder.config.max_position_embeddings)
        self._readers = tuple(
            GraphedCall(
                partial(_read, provider.text_encoder),
                name="SDXL's text encoder",
                module=provider.text_encoder,
                clones=True,
            )
            for provider in self._providers
        )
        self._encoded = lru_cache(maxsize=_CACHED_TEXTS)(self._encode)

    def count_tokens(self, prompt: str) -> int:
        """How many tokens ``prompt`` has without its weights, by the tokenizer that makes more of it."""
        return max(len(_token_ids(provider, plain_text(prompt))) for provider in self._providers)

    def encode(self, prompt: str, negative_prompt: str) -> Conditioning:
        """Encode both, the shorter filled up with empty chunks.

        :raises PayloadError: the prompt is longer than ``MAX_CHUNKS`` chunks.
        """
        limit = MAX_CHUNKS * (self._chunk_tokens - 2)
        for path, text in (("$.prompt", prompt), ("$.negative_prompt", negative_prompt)):
            tokens = self.count_tokens(text)
            if tokens > limit:
                raise PayloadError.from_faults([Fault(path, f"at most {limit} tokens", f"{tokens}")])
        positive, pooled = self._encoded(prompt)
        negative, negative_pooled = self._encoded(negative_prompt)
        tokens = max(positive.shape[1], negative.shape[1])
        return Conditioning(
            prompt=self._padded(positive, tokens),
            pooled=pooled,
            negative=self._padded(negative, tokens),
            negative_pooled=negative_pooled,
            chunks=tokens // self._chunk_tokens,
        )

    def forget_graphs(self) -> None:
        """Free the memory of what was recorded; it is recorded anew when it is needed."""
        for reader in self._readers:
            reader.forget()

    def _encode(self, prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
        is_weighted = any(fragment.weight != 1 for fragment in parse_weights(prompt))
        with torch.no_grad():
            if is_weighted or self.count_tokens(prompt) > self._chunk_tokens - 2:
                return _encode_weighted(self._providers, self._device, prompt)
            # compel looks at its masks, and each look waits for all that the device still has to do.
            text = plain_text(prompt)
            made = [
                reader(_first_chunk(provider, text, self._device))
                for reader, provider in zip(self._readers, self._providers, strict=True)
            ]
            return torch.cat([embeddings for embeddings, _ in made], dim=-1), made[-1][1]

    def _padded(self, embeddings: torch.Tensor, tokens: int) -> torch.Tensor:
        if embeddings.shape[1] == tokens:
            return embeddings
        with torch.no_grad():
            empty = torch.cat([provider.empty_z for provider in self._providers], dim=-1).to(embeddings)
        missing = (tokens - embeddings.shape[1]) // self._chunk_tokens
        return torch.cat([embeddings, *[empty] * missing], dim=1)


def _encode_weighted(providers: tuple[Any, ...], device: str, prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
    # A fragment without tokens has no place in the sequence, and compel cannot weigh it.
    fragments = [f for f in parse_weights(prompt) if all(_token_ids(provider, f.text) for provider in providers)]
    texts, weights = [f.text for f in fragments] or [""], [f.weight for f in fragments] or [1.0]
    embeddings = [
        provider.get_embeddings_for_weighted_prompt_fragments([texts], [weights], device=device)
        for provider in providers
    ]
    # diffusers takes the summary of the first chunk, and it knows no weights.
    _, summary = _read(providers[-1].text_encoder, _first_chunk(providers[-1], plain_text(prompt), device))
    return torch.cat(embeddings, dim=-1), summary


def _read(text_encoder: Any, token_ids: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """What a text encoder makes of chunks, and its summaries where it makes any."""
    made = text_encoder(token_ids, output_hidden_states=True)
    return made.hidden_states[-2], getattr(made, "text_embeds", None)


def _first_chunk(provider: Any, text: str, device: str) -> torch.Tensor:
    made = provider.tokenizer(
        text, padding="max_length", max_length=provider.max_token_count, truncation=True, return_tensors="pt"
    )
    token_ids: torch.Tensor = made.input_ids
    # From pinned memory the copy waits for nothing that the device still has to do.
    return token_ids.pin_memory().to(device, non_blocking=True) if device.startswith("cuda") else token_ids


def _token_ids(provider: Any, text: str) -> list[int]:
    ids: list[int] = provider.tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids
    return ids
