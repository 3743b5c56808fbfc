"""Core attention over packed sequences, with and without a KV cache; RoPE included.

A micro-batch is one row of T tokens holding S sequences back to back. `SequenceLayout` describes it and travels through
megatron's layers as their `packed_seq_params`, so megatron needs no change and no mask of size T x T ever exists.
Kernels, best first: flash-attn (when installed) or torch's varlen attention on a GPU in half precision, else SDPA on
the sequences padded on the right (exact without a mask: a causal query never sees the padding behind it). Left out on
purpose: context parallelism, sliding windows.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.module import MegatronModule

Tensor = torch.Tensor
HAVE_FLASH_ATTN = importlib.util.find_spec("flash_attn") is not None


class KVCache:
    """Keys and values of `rows` sequences of up to `length` tokens, for the layers of this pipeline stage.

    Buffers [rows, length, kv heads, head_dim] are allocated per layer at first use, in the dtype of the keys. One more
    row is kept as a scratch pad for tokens that belong to no sequence.
    """

    def __init__(self, rows: int, length: int) -> None:
        self.rows = rows
        self.length = length
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def write(self, layer: int, rows: Tensor, positions: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Stores key and value [T, kv heads, head_dim] at (rows[t], positions[t]); returns the layer's buffers."""
        if layer not in self._layers:
            shape = (self.rows + 1, self.length, *key.shape[1:])
            # Zeros, not empty: masked positions are multiplied by zero weights, and 0 * NaN is NaN.
            self._layers[layer] = (key.new_zeros(shape), value.new_zeros(shape))
        keys, values = self._layers[layer]
        keys[rows, positions] = key
        values[rows, positions] = value
        return keys, values

    def move(self, source: int, target: int, length: int) -> None:
        """Copies the first `length` tokens of row `source` over those of row `target`."""
        for buffers in self._layers.values():
            for buffer in buffers:
                buffer[target, :length] = buffer[source, :length]


@dataclass(kw_only=True)
class SequenceLayout(PackedSeqParams):
    """Where the T tokens of a packed micro-batch stand. `cu_seqlens_q` int32 [S + 1] comes from megatron's class."""

    qkv_format: str = "thd"
    positions: Tensor
    """int64 [T]: index of each token in its sequence."""
    padded_index: Tensor | None = None
    """int64 [T]: index of each token in the sequences padded to max_seqlen and flattened."""
    rope: tuple[Tensor, Tensor] | None = None
    """cos and sin, fp32 [T, 1, head_dim]."""
    cache: KVCache | None = None
    cache_rows: Tensor | None = None
    """int64 [T]: cache row of each token."""
    decode: bool = False
    """True: one new token per cache row 0..T-1, attending to the row's cached keys; False: prefill or training."""
    visible: Tensor | None = None
    """bool [T, 1, 1, length]: cached positions each decoding token may attend to."""

    @property
    def num_tokens(self) -> int:
        return self.positions.numel()

    @classmethod
    def packed(
        cls,
        positions: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        cache: KVCache | None = None,
        cache_rows: Tensor | None = None,
    ) -> SequenceLayout:
        """Layout of whole sequences: training, scoring, or the prefill of a cache (`cache_rows` int64 [T])."""
        lengths = cu_seqlens.diff()
        sequence = torch.repeat_interleave(
            torch.arange(lengths.numel(), device=positions.device), lengths, output_size=positions.numel()
        )
        offsets = torch.arange(positions.numel(), device=positions.device) - cu_seqlens[:-1].long()[sequence]
        return cls(
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=max_seqlen,
            max_seqlen_kv=max_seqlen,
            positions=positions,
            padded_index=sequence * max_seqlen + offsets,
            cache=cache,
            cache_rows=cache_rows,
        )

    @classmethod
    def decoding(cls, positions: Tensor, cache: KVCache, length: int) -> SequenceLayout:
        """Layout of a decode step: token t continues cache row t at positions[t]; `length` bounds all positions + 1."""
        rows = torch.arange(positions.numel(), device=positions.device)
        visible = torch.arange(length, device=positions.device) <= positions[:, None]
        return cls(
            positions=positions,
            cache=cache,
            cache_rows=rows,
            decode=True,
            visible=visible[:, None, None, :],
            max_seqlen_kv=length,
        )


def rope_tables(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of rotary embeddings (Su et al. 2021, eq. 34), fp32 [T, 1, head_dim], for the half-split
    convention.
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions.float()[:, None] * theta**-exponents
    angles = torch.cat([angles, angles], dim=-1)[:, None, :]
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Applies rotary embeddings to x [T, heads, head_dim] in fp32; returns x's dtype."""
    cos, sin = rope
    x32 = x.float()
    low, high = x32.chunk(2, dim=-1)
    return (x32 * cos + torch.cat([-high, low], dim=-1) * sin).to(x.dtype)


class CoreAttention(MegatronModule):
    """softmax(Q K^T / sqrt(d)) V, causal within each packed sequence, heads sharded over tensor-parallel ranks."""

    def __init__(self, config: Any, layer_number: int, attention_dropout: float | None = None, **_: Any) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        packed_seq_params: SequenceLayout | None = None,
        **_: Any,
    ) -> Tensor:
        """query [T', heads, head_dim], key and value [T', kv heads, head_dim] -> [T', heads * head_dim].

        T' may exceed the layout's T by padding (sequence parallelism wants a multiple of its size): such rows give
        zeros.
        """
        layout = packed_seq_params
        assert layout is not None
        T = layout.num_tokens
        q, k, v = query[:T], key[:T], value[:T]
        if layout.rope is not None:
            q, k = _rotate(q, layout.rope), _rotate(k, layout.rope)
        if layout.cache is not None:
            assert layout.cache_rows is not None
            keys, values = layout.cache.write(self.layer_number, layout.cache_rows, layout.positions, k, v)
        out = _decode_attention(q, keys, values, layout) if layout.decode else self._packed_attention(q, k, v, layout)
        out = out.reshape(T, -1)
        return F.pad(out, (0, 0, 0, query.shape[0] - T)) if query.shape[0] > T else out

    def _packed_attention(self, q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        if dropout == 0.0:
            return packed_attention(q, k, v, layout, backend=self.config.attention_kernel)
        if self.config.sequence_parallel:
            return packed_attention(q, k, v, layout, dropout, backend=self.config.attention_kernel)
        # Heads differ by tensor-parallel rank, and so must their dropout.
        with get_cuda_rng_tracker().fork():
            return packed_attention(q, k, v, layout, dropout, backend=self.config.attention_kernel)


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout, dropout: float = 0.0, backend: str = "auto"
) -> Tensor:
    """Causal attention of q [T, heads, d] over k, v [T, kv heads, d] within each sequence of `layout` -> [T, heads,
    d].
    """
    half_on_gpu = q.is_cuda and q.dtype in (torch.float16, torch.bfloat16)
    if backend == "flash" or (backend == "auto" and half_on_gpu and HAVE_FLASH_ATTN):
        from flash_attn import flash_attn_varlen_func

        cu, longest = layout.cu_seqlens_q, layout.max_seqlen_q
        return flash_attn_varlen_func(q, k, v, cu, cu, longest, longest, dropout_p=dropout, causal=True)
    if backend == "auto" and half_on_gpu and dropout == 0.0:
        from torch.nn.attention.varlen import varlen_attn

        k, v = _repeat_heads(k, q.shape[1]), _repeat_heads(v, q.shape[1])
        cu, longest = layout.cu_seqlens_q, layout.max_seqlen_q
        out = varlen_attn(q, k, v, cu, cu, longest, longest, window_size=(-1, 0))
        assert isinstance(out, Tensor)  # a tuple only where auxiliary outputs are asked for
        return out
    return _padded_attention(q, k, v, layout, dropout)


def _padded_attention(q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout, dropout: float) -> Tensor:
    S, longest, index = layout.cu_seqlens_q.numel() - 1, layout.max_seqlen_q, layout.padded_index
    assert index is not None

    def pad(x: Tensor) -> Tensor:
        if S == 1:
            return x.transpose(0, 1).unsqueeze(0)
        padded = x.new_zeros(S * longest, *x.shape[1:]).index_copy(0, index, x)
        return padded.view(S, longest, *x.shape[1:]).transpose(1, 2)

    k, v = _repeat_heads(k, q.shape[1]), _repeat_heads(v, q.shape[1])
    out = F.scaled_dot_product_attention(pad(q), pad(k), pad(v), dropout_p=dropout, is_causal=True)
    out = out.transpose(1, 2).flatten(0, 1)
    return out if S == 1 else out.index_select(0, index)


def _repeat_heads(x: Tensor, heads: int) -> Tensor:
    """[T, kv heads, d] -> [T, heads, d], each kv head serving heads / kv heads queries (grouped-query attention)."""
    groups = heads // x.shape[1]
    return x if groups == 1 else x.repeat_interleave(groups, dim=1)


def _decode_attention(q: Tensor, keys: Tensor, values: Tensor, layout: SequenceLayout) -> Tensor:
    """One query a row, q [B, heads, d], against the row's cached keys and values [rows, length, kv heads, d]."""
    B, heads, d = q.shape
    length = layout.max_seqlen_kv
    k = keys[:B, :length].transpose(1, 2)
    v = values[:B, :length].transpose(1, 2)
    # The queries of a kv head stand in the place of the query positions, so grouped heads need no copies of the cache.
    grouped = q.view(B, k.shape[1], heads // k.shape[1], d)
    return F.scaled_dot_product_attention(grouped, k, v, attn_mask=layout.visible).reshape(B, heads, d)
