"""Layouts of packed micro-batches: sequence boundaries, positions, rotary tables and the KV cache.

A micro-batch is one row of T tokens that holds S sequences back to back. Its `SequenceLayout` is
passed through megatron's layers as their `packed_seq_params`, so megatron needs no change, and no
mask of size T x T ever exists.

Sequences may branch from a prompt that the row holds once (`data.batches.pack_branches`). The keys
of a branch are those of its prompt and its own. Not supported: branches of branches, branches with
a KV cache.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams

from fastrlhf.data.batches import PackedBatch

Tensor = torch.Tensor


class KVCache:
    """Keys and values of `rows` sequences of up to `length` tokens, for this stage's layers.

    Buffers [rows + 1, length, kv heads, head_dim] are allocated per layer at first use, in the
    dtype of the keys. The last row is a scratch row for tokens that belong to no sequence.
    """

    def __init__(self, rows: int, length: int) -> None:
        self.rows = rows
        self.length = length
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def write(
        self, layer: int, rows: Tensor, positions: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Store key and value [T, kv heads, head_dim] at (rows[t], positions[t]).

        Returns the layer's buffers of keys and values.
        """
        if layer not in self._layers:
            shape = (self.rows + 1, self.length, *key.shape[1:])
            # Zeros, not empty: masked positions are multiplied by zero weights, and 0 * NaN is NaN.
            self._layers[layer] = (key.new_zeros(shape), value.new_zeros(shape))
        keys, values = self._layers[layer]
        keys[rows, positions] = key
        values[rows, positions] = value
        return keys, values

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of row `source` to row `target`."""
        for buffers in self._layers.values():
            for buffer in buffers:
                buffer[target, :length] = buffer[source, :length]


@dataclass(frozen=True)
class Padding:
    """Index tensors that pad B of a row's sequences on the right to one shape, for SDPA.

    A padding slot repeats a token of its own sequence: no real query attends to it, and its output
    is dropped.
    """

    rows: int
    """B."""
    queries: Tensor
    """int64 [B * max_q]: index in the row of the token in each slot."""
    keys: Tensor
    """int64 [B * max_kv]: index in the row of the token whose key is in each slot."""
    slots: Tensor
    """int64 [n]: the slots that are not padding, in order."""
    ordered: bool = False
    """True if the unpadded tokens are already in order, so that a reshape replaces the gather."""
    visible: Tensor | None = None
    """bool [B, 1, max_q, max_kv]: keys that a query may attend to.

    None: causal, and queries and keys of a sequence start at the same token.
    """
    last: Tensor | None = None
    """int64 [B, max_q]: last key that each query may attend to; given with `visible`."""

    def within(self, window: int) -> Tensor:
        """Return `visible` (or causal) restricted to the last `window` keys of each query."""
        max_kv = self.keys.numel() // self.rows
        keys = torch.arange(max_kv, device=self.keys.device)
        # Queries of padding may lie past the last key. A query without any key would be NaN.
        last = keys[None] if self.last is None else self.last.clamp(max=max_kv - 1)
        return ((keys <= last[:, :, None]) & (keys > last[:, :, None] - window))[:, None]


@dataclass(kw_only=True)
class SequenceLayout(PackedSeqParams):
    """Positions and boundaries of the sequences in a packed micro-batch of T tokens.

    megatron's class provides `cu_seqlens_q` int32 [S + 1] and `cu_seqlens_kv` int32 [S + 1], the
    boundaries of the sequences' keys. A sequence that branches from a prompt has more keys than
    queries.
    """

    qkv_format: str = "thd"
    positions: Tensor
    """int64 [T]: index of each token in its sequence."""
    key_index: Tensor | None = None
    """int64 [cu_seqlens_kv[S]]: tokens whose keys each sequence attends to. None: its own."""
    rope: tuple[Tensor, Tensor] | None = None
    """cos and sin, fp32 [T, 1, head_dim]."""
    cache: KVCache | None = None
    cache_rows: Tensor | None = None
    """int64 [T]: cache row of each token."""
    decode: bool = False
    """True for a decode step, False for prefill or training.

    In a decode step, cache rows 0 .. T - 1 have one new token each, which attends to the row's
    cached keys.
    """
    visible: Tensor | None = None
    """bool [T, 1, 1, length]: cached positions that each decoding token may attend to."""
    window: int | None = None
    """Tokens that a token attends to in layers with a sliding window, itself included.

    None: no such layers, or no sequence of the row is longer than the window.
    """

    @property
    def num_tokens(self) -> int:
        """T, the number of tokens in the row."""
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
        """Return the layout of complete sequences: training, scoring, or a prefill.

        A prefill has a `cache` and `cache_rows` int64 [T].
        """
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
    def of(cls, batch: PackedBatch) -> SequenceLayout:
        """Return the layout of a batch, including its branches if it has any."""
        layout = cls.packed(batch.positions, batch.cu_seqlens, batch.max_seqlen)
        if batch.key_index is not None:
            layout.key_index = batch.key_index
            layout.cu_seqlens_kv, layout.max_seqlen_kv = batch.cu_seqlens_kv, batch.max_seqlen_kv
        return layout

    @classmethod
    def decoding(cls, positions: Tensor, cache: KVCache, length: int) -> SequenceLayout:
        """Return the layout of a decode step: token t continues cache row t at positions[t].

        Every position must be less than `length`.
        """
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

    def set_window(self, window: int | None) -> None:
        """Set the model's sliding window, unless every sequence of the row fits into it."""
        self.window = None if window is None or window >= self.max_seqlen_kv else window

    @functools.cached_property
    def window_visible(self) -> tuple[Tensor, ...]:
        """Keys that a query may attend to in layers with a sliding window.

        Query i attends to key j if i - window < j <= i. One mask per padding, bool [1 or B, 1,
        max_q, max_kv]; in a decode step one like `visible`.
        """
        assert self.window is not None
        if self.visible is not None:
            keys = torch.arange(self.max_seqlen_kv, device=self.positions.device)
            inside = keys > self.positions[:, None] - self.window
            return (self.visible & inside[:, None, None, :],)
        return tuple(padding.within(self.window) for padding in self.paddings)

    @functools.cached_property
    def paddings(self) -> tuple[Padding, ...]:
        """The paddings that cover all sequences of the row.

        One padding, unless sequences branch. Then the branches are padded separately from the
        other sequences, because a prompt is long and its many branches are short.
        """
        starts, lengths = self.cu_seqlens_q[:-1], self.cu_seqlens_q.diff()
        if self.key_index is None:
            index = _padded_index(starts, lengths, self.max_seqlen_q)
            slots = _token_slots(lengths, self.max_seqlen_q, self.num_tokens)
            return (Padding(lengths.numel(), index, index, slots, ordered=True),)
        before = self.cu_seqlens_kv.diff() - lengths
        groups = [which for which in (before == 0, before > 0) if which.any()]
        return tuple(self._padding(which, before, self.key_index) for which in groups)

    def _padding(self, which: Tensor, before: Tensor, key_index: Tensor) -> Padding:
        """Return the padding of the sequences marked in `which`, bool [S].

        `before` [S] is the number of prompt keys that precede each sequence's own keys.
        """
        lengths, before = self.cu_seqlens_q.diff()[which], before[which]
        max_q, max_kv = int(lengths.max()), int((lengths + before).max())
        visible = last = None
        if before.any():
            last = before[:, None] + torch.arange(max_q, device=before.device)
            visible = (torch.arange(max_kv, device=before.device) <= last[:, :, None])[:, None]
        return Padding(
            lengths.numel(),
            _padded_index(self.cu_seqlens_q[:-1][which], lengths, max_q),
            key_index[_padded_index(self.cu_seqlens_kv[:-1][which], lengths + before, max_kv)],
            _token_slots(lengths, max_q, int(lengths.sum())),
            visible=visible,
            last=last,
        )


def _token_slots(lengths: Tensor, longest: int, total: int) -> Tensor:
    """Return the slot of each token in rows of `longest` slots, flattened, int64 [total].

    `lengths` [B] are those of the sequences, `total` is their sum.
    """
    device, starts = lengths.device, lengths.cumsum(0) - lengths
    shift = torch.arange(lengths.numel(), device=device) * longest - starts
    return torch.arange(total, device=device) + shift.repeat_interleave(lengths, output_size=total)


def _padded_index(starts: Tensor, lengths: Tensor, longest: int) -> Tensor:
    """Return start, start + 1, ... of each sequence, padded with its start, int64 [B * longest]."""
    offsets = torch.arange(longest, device=starts.device)
    return (starts[:, None] + torch.where(offsets < lengths[:, None], offsets, 0)).flatten()
