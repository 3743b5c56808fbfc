"""What a pipeline stage reads: a packed micro-batch, or tokens that go with a KV cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from fastrlhf.models.attention import KVCache, SequenceLayout

Tensor = torch.Tensor


class PackedInput(Protocol):
    """A packed micro-batch of T tokens and S sequences, as `data.batches.PackedBatch`."""

    tokens: Tensor
    """int64 [T]."""
    positions: Tensor
    """int64 [T], from 0 in each sequence."""
    cu_seqlens: Tensor
    """int32 [S + 1]: sequence s is [cu_seqlens[s], cu_seqlens[s + 1])."""
    max_seqlen: int


@dataclass
class CachedInput:
    """Tokens that go with a KV cache: prompts to prefill (`layout.decode` False) or one new token a row."""

    tokens: Tensor
    layout: SequenceLayout

    @classmethod
    def prefill(cls, batch: PackedInput, cache: KVCache, cache_rows: Tensor) -> CachedInput:
        """Return whole prompts; `cache_rows` int64 [T] says which cache row each token belongs to."""
        layout = SequenceLayout.packed(
            batch.positions, batch.cu_seqlens, batch.max_seqlen, cache, cache_rows
        )
        return cls(batch.tokens, layout)

    @classmethod
    def decode(cls, tokens: Tensor, positions: Tensor, cache: KVCache, length: int) -> CachedInput:
        """Return one token a row: token t continues cache row t at positions[t]; `length` bounds all positions + 1."""
        return cls(tokens, SequenceLayout.decoding(positions, cache, length))
