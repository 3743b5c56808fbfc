"""Inputs of a pipeline stage: a packed micro-batch, or tokens with a KV cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastrlhf.data.batches import PackedBatch
from fastrlhf.models.layout import KVCache, SequenceLayout

Tensor = torch.Tensor


@dataclass
class CachedInput:
    """Tokens with a KV cache: prompts to prefill, or one new token per cache row.

    `layout.decode` says which of the two.
    """

    tokens: Tensor
    layout: SequenceLayout

    @classmethod
    def prefill(cls, batch: PackedBatch, cache: KVCache, cache_rows: Tensor) -> CachedInput:
        """Return complete prompts; `cache_rows` int64 [T] is the cache row of each token."""
        layout = SequenceLayout.packed(
            batch.positions, batch.cu_seqlens, batch.max_seqlen, cache, cache_rows
        )
        return cls(batch.tokens, layout)

    @classmethod
    def decode(cls, tokens: Tensor, positions: Tensor, cache: KVCache, length: int) -> CachedInput:
        """Return one token per row: token t continues cache row t at positions[t].

        Every position must be less than `length`.
        """
        return cls(tokens, SequenceLayout.decoding(positions, cache, length))


StageInput = PackedBatch | CachedInput
