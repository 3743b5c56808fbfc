"""Core attention over packed sequences, with and without a KV cache; RoPE included.

A micro-batch is one row of T tokens holding S sequences back to back. `SequenceLayout` describes it and travels through
megatron's layers as their `packed_seq_params`, so megatron needs no change and no mask of size T x T ever exists.
Kernels, best first: flash-attn (when installed) or torch's varlen attention on a GPU in half precision with heads of a
width they take, else SDPA on the sequences padded on the right (exact without a mask: a causal query never sees the
padding behind it).

Sequences may branch from a prompt that the row holds once (`data.batches.pack_branches`). The keys of a branch are its
prompt's and its own, gathered from the row for each layer: beside the projections and the MLP, which see the prompt
once, the copies cost little, and attention stays one exact, differentiable call. Left out on purpose: context
parallelism, sliding windows, branches of branches, branches with a KV cache.
"""

from __future__ import annotations

import functools
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
_FLASH_WIDTHS = range(8, 257, 8)
"""Widths of a head that both flash kernels take."""


class KVCache:
    """Keys and values of `rows` sequences of up to `length` tokens, for the layers of this pipeline stage.

    Buffers [rows, length, kv heads, head_dim] are allocated per layer at first use, in the dtype of the keys. One more
    row is kept as a scratch pad for tokens that belong to no sequence.
    """

    def __init__(self, rows: int, length: int) -> None:
        self.rows = rows
        self.length = length
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def write(
        self, layer: int, rows: Tensor, positions: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
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


@dataclass(frozen=True)
class Padding:
    """B of a row's sequences, padded on the right to one shape, which is what SDPA can work on.

    Padding repeats a token of its own sequence: no real query attends to it, and what it yields is dropped.
    """

    rows: int
    """B."""
    queries: Tensor
    """int64 [B * max_q]: the row's token at each place."""
    keys: Tensor
    """int64 [B * max_kv]: the row's token whose key stands at each place."""
    place: Tensor
    """int64 [n]: the places that are not padding, in order."""
    ordered: bool = False
    """True: without padding, every token would stand in its place already."""
    visible: Tensor | None = None
    """bool [B, 1, max_q, max_kv]: keys a query may attend to. None: causal, sequence and keys begin together."""


@dataclass(kw_only=True)
class SequenceLayout(PackedSeqParams):
    """Where the T tokens of a packed micro-batch stand. `cu_seqlens_q` int32 [S + 1] comes from megatron's class, and
    `cu_seqlens_kv`: of the sequences' keys, which are more than their queries where they branch from a prompt.
    """

    qkv_format: str = "thd"
    positions: Tensor
    """int64 [T]: index of each token in its sequence."""
    key_index: Tensor | None = None
    """int64 [cu_seqlens_kv[S]]: the tokens whose keys each sequence attends to, in order. None: its own."""
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
        return cls(
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=max_seqlen,
            max_seqlen_kv=max_seqlen,
            positions=positions,
            cache=cache,
            cache_rows=cache_rows,
        )

    @classmethod
    def of(cls, batch: Any) -> SequenceLayout:
        """Layout of a `data.batches.PackedBatch`, with the branches it may have, or of plain sequences like it."""
        layout = cls.packed(batch.positions, batch.cu_seqlens, batch.max_seqlen)
        if getattr(batch, "key_index", None) is not None:
            layout.key_index = batch.key_index
            layout.cu_seqlens_kv, layout.max_seqlen_kv = batch.cu_seqlens_kv, batch.max_seqlen_kv
        return layout

    @functools.cached_property
    def paddings(self) -> tuple[Padding, ...]:
        """The sequences in the shapes that SDPA works on: all in one, or those that branch apart from the others,
        because the one prompt is long and its many branches are short.
        """
        starts, lengths = self.cu_seqlens_q[:-1], self.cu_seqlens_q.diff()
        if self.key_index is None:
            index = _padded_index(starts, lengths, self.max_seqlen_q)
            places = _places(lengths, self.max_seqlen_q, self.num_tokens)
            return (Padding(lengths.numel(), index, index, places, ordered=True),)
        before = self.cu_seqlens_kv.diff() - lengths
        groups = [which for which in (before == 0, before > 0) if which.any()]
        return tuple(self._padding(which, before, self.key_index) for which in groups)

    def _padding(self, which: Tensor, before: Tensor, key_index: Tensor) -> Padding:
        """Of the sequences marked in `which`, bool [S], that have `before` [S] keys of a prompt before their own."""
        lengths, before = self.cu_seqlens_q.diff()[which], before[which]
        max_q, max_kv = int(lengths.max()), int((lengths + before).max())
        visible = None
        if before.any():
            last = before[:, None] + torch.arange(max_q, device=before.device)
            visible = (torch.arange(max_kv, device=before.device) <= last[:, :, None])[:, None]
        return Padding(
            lengths.numel(),
            _padded_index(self.cu_seqlens_q[:-1][which], lengths, max_q),
            key_index[_padded_index(self.cu_seqlens_kv[:-1][which], lengths + before, max_kv)],
            _places(lengths, max_q, int(lengths.sum())),
            visible=visible,
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
    exponents = (
        torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    )
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

    def __init__(
        self, config: Any, layer_number: int, attention_dropout: float | None = None, **_: Any
    ) -> None:
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
            keys, values = layout.cache.write(
                self.layer_number, layout.cache_rows, layout.positions, k, v
            )
        out = (
            _decode_attention(q, keys, values, layout)
            if layout.decode
            else self._packed_attention(q, k, v, layout)
        )
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
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: SequenceLayout,
    dropout: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Causal attention of q [T, heads, d] over k, v [T, kv heads, d] within each sequence of `layout` -> [T, heads,
    d].
    """
    fits_flash = (
        q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and q.shape[2] in _FLASH_WIDTHS
    )
    if backend == "flash" or (backend == "auto" and fits_flash and HAVE_FLASH_ATTN):
        from flash_attn import flash_attn_varlen_func

        k, v = _gather_keys(k, layout), _gather_keys(v, layout)
        # Causal from the last key (flash-attn >= 2.1): the last query of a branch sees all its keys, and so on back.
        return flash_attn_varlen_func(q, k, v, *_lengths(layout), dropout_p=dropout, causal=True)
    if backend == "auto" and fits_flash and dropout == 0.0:
        from torch.nn.attention.varlen import varlen_attn

        k, v = (
            _repeat_heads(_gather_keys(k, layout), q.shape[1]),
            _repeat_heads(_gather_keys(v, layout), q.shape[1]),
        )
        out = varlen_attn(
            q, k, v, *_lengths(layout), window_size=(-1, 0)
        )  # the same kernel and the same alignment
        assert isinstance(out, Tensor)  # a tuple only where auxiliary outputs are asked for
        return out
    if len(layout.paddings) == 1:
        return _padded_attention(q, k, v, layout.paddings[0], dropout)
    parts = [_padded_attention(q, k, v, padding, dropout) for padding in layout.paddings]
    tokens = torch.cat([padding.queries[padding.place] for padding in layout.paddings])
    return torch.empty_like(q).index_copy(0, tokens, torch.cat(parts))


def _gather_keys(x: Tensor, layout: SequenceLayout) -> Tensor:
    return x if layout.key_index is None else x.index_select(0, layout.key_index)


def _lengths(layout: SequenceLayout) -> tuple[Tensor, Tensor, int, int]:
    return layout.cu_seqlens_q, layout.cu_seqlens_kv, layout.max_seqlen_q, layout.max_seqlen_kv


def _places(lengths: Tensor, longest: int, total: int) -> Tensor:
    """int64 [total]: the place of each token of sequences of `lengths` [B] in rows of `longest`, flattened."""
    device, starts = lengths.device, lengths.cumsum(0) - lengths
    shift = torch.arange(lengths.numel(), device=device) * longest - starts
    return torch.arange(total, device=device) + shift.repeat_interleave(lengths, output_size=total)


def _padded_index(starts: Tensor, lengths: Tensor, longest: int) -> Tensor:
    """int64 [B * longest]: start + 0, 1, ... of each sequence, and its start again where it has ended."""
    offsets = torch.arange(longest, device=starts.device)
    return (starts[:, None] + torch.where(offsets < lengths[:, None], offsets, 0)).flatten()


def _padded_attention(q: Tensor, k: Tensor, v: Tensor, padding: Padding, dropout: float) -> Tensor:
    """Of the padding's queries, [n, heads, d]."""
    B, heads = padding.rows, q.shape[1]

    def pad(x: Tensor, index: Tensor) -> Tensor:
        in_place = (B == 1 or padding.ordered) and index.numel() == x.shape[0]
        x = x if in_place else x.index_select(0, index)
        x = _repeat_heads(x, heads)
        return x.view(B, -1, *x.shape[1:]).transpose(1, 2)

    q, k, v = pad(q, padding.queries), pad(k, padding.keys), pad(v, padding.keys)
    causal = padding.visible is None
    out = F.scaled_dot_product_attention(
        q, k, v, padding.visible, dropout_p=dropout, is_causal=causal
    )
    out = out.transpose(1, 2).flatten(0, 1)
    return out if out.shape[0] == padding.place.numel() else out.index_select(0, padding.place)


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
    return F.scaled_dot_product_attention(grouped, k, v, attn_mask=layout.visible).reshape(
        B, heads, d
    )
