"""Core attention over packed sequences, with and without a KV cache; applies RoPE.

Kernels, in order of preference: flash-attn (if installed) or torch's varlen attention, on a GPU in
half precision with supported head widths; otherwise SDPA on the sequences padded on the right.
Right padding is exact without a mask, because a causal query never attends to later positions.

The keys of a branch (see layout.py) are gathered per layer. Compared with the projections and the
MLP, which process the prompt once, the copies cost little, and attention remains one exact,
differentiable call. With a sliding window, token i attends to the tokens j with i - j < window;
SDPA then needs a mask, the flash kernels do not. Not supported: context parallelism.
"""

from __future__ import annotations

import importlib.util

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.module import MegatronModule

from fastrlhf.models.layout import Padding, SequenceLayout
from fastrlhf.models.stage import StageConfig

Tensor = torch.Tensor
HAVE_FLASH_ATTN = importlib.util.find_spec("flash_attn") is not None
_FLASH_WIDTHS = range(8, 257, 8)
"""Head widths that both flash kernels support."""


def _rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Apply rotary embeddings to x [T, heads, head_dim] in fp32; the result has x's dtype."""
    cos, sin = rope
    x32 = x.float()
    low, high = x32.chunk(2, dim=-1)
    return (x32 * cos + torch.cat([-high, low], dim=-1) * sin).to(x.dtype)


class CoreAttention(MegatronModule):
    """softmax(Q K^T / sqrt(d)) V, causal within each packed sequence.

    Heads are sharded over tensor-parallel ranks.
    """

    def __init__(
        self,
        config: StageConfig,
        layer_number: int,
        attention_dropout: float | None = None,
        **_: object,
    ) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        # megatron numbers the layers of all pipeline stages, from 1.
        self.windowed = layer_number > config.full_attention_layers

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        packed_seq_params: SequenceLayout | None = None,
        **_: object,
    ) -> Tensor:
        """Attend with query [T', heads, head_dim] to key and value [T', kv heads, head_dim].

        Returns [T', heads * head_dim]. T' may exceed the layout's T by padding (sequence
        parallelism needs a multiple of its size); the output of padding is zero.
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
            _decode_attention(q, keys, values, layout, windowed=self.windowed)
            if layout.decode
            else self._packed_attention(q, k, v, layout)
        )
        out = out.reshape(T, -1)
        return F.pad(out, (0, 0, 0, query.shape[0] - T)) if query.shape[0] > T else out

    def _packed_attention(self, q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout) -> Tensor:
        dropout, backend = self.dropout if self.training else 0.0, self.config.attention_kernel
        if dropout == 0.0 or self.config.sequence_parallel:
            return packed_attention(q, k, v, layout, dropout, backend, windowed=self.windowed)
        # Tensor-parallel ranks have different heads, so their dropout masks must differ.
        with get_cuda_rng_tracker().fork():
            return packed_attention(q, k, v, layout, dropout, backend, windowed=self.windowed)


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: SequenceLayout,
    dropout: float = 0.0,
    backend: str = "auto",
    *,
    windowed: bool = True,
) -> Tensor:
    """Compute causal attention within each sequence of `layout`.

    q is [T, heads, d]; k and v are [T, kv heads, d]. `windowed` says whether the layout's sliding
    window, if any, applies. Returns [T, heads, d].
    """
    window = layout.window if windowed else None
    # Keys to the left and to the right of a query that the flash kernels include; -1: all.
    window_size = (-1 if window is None else window - 1, 0)
    fits_flash = (
        q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and q.shape[2] in _FLASH_WIDTHS
    )
    if backend == "flash" or (backend == "auto" and fits_flash and HAVE_FLASH_ATTN):
        from flash_attn import flash_attn_varlen_func

        k, v = _gather_keys(k, layout), _gather_keys(v, layout)
        # The causal mask is aligned to the last key (flash-attn >= 2.1): the last query of a branch
        # attends to all its keys, the query before it to all but the last, and so on.
        return flash_attn_varlen_func(
            q, k, v, *_lengths(layout), dropout_p=dropout, causal=True, window_size=window_size
        )
    if backend == "auto" and fits_flash and dropout == 0.0:
        from torch.nn.attention.varlen import varlen_attn

        k, v = (
            _repeat_heads(_gather_keys(k, layout), q.shape[1]),
            _repeat_heads(_gather_keys(v, layout), q.shape[1]),
        )
        # This is the same kernel, with the same alignment of the causal mask.
        out = varlen_attn(q, k, v, *_lengths(layout), window_size=window_size)
        assert isinstance(out, Tensor)  # it is a tuple only if auxiliary outputs are requested
        return out
    masks = [None] * len(layout.paddings) if window is None else layout.window_visible
    if len(layout.paddings) == 1:
        return _padded_attention(q, k, v, layout.paddings[0], masks[0], dropout)
    parts = [
        _padded_attention(q, k, v, padding, mask, dropout)
        for padding, mask in zip(layout.paddings, masks, strict=True)
    ]
    tokens = torch.cat([padding.queries[padding.slots] for padding in layout.paddings])
    return torch.empty_like(q).index_copy(0, tokens, torch.cat(parts))


def _gather_keys(x: Tensor, layout: SequenceLayout) -> Tensor:
    return x if layout.key_index is None else x.index_select(0, layout.key_index)


def _lengths(layout: SequenceLayout) -> tuple[Tensor, Tensor, int, int]:
    return layout.cu_seqlens_q, layout.cu_seqlens_kv, layout.max_seqlen_q, layout.max_seqlen_kv


def _padded_attention(
    q: Tensor, k: Tensor, v: Tensor, padding: Padding, mask: Tensor | None, dropout: float
) -> Tensor:
    """Compute attention for the queries of `padding` with SDPA; returns [n, heads, d].

    `mask` replaces `padding.visible`, bool [1 or B, 1, max_q, max_kv].
    """
    B, heads = padding.rows, q.shape[1]

    def pad(x: Tensor, index: Tensor) -> Tensor:
        in_place = (B == 1 or padding.ordered) and index.numel() == x.shape[0]
        x = x if in_place else x.index_select(0, index)
        x = _repeat_heads(x, heads)
        return x.view(B, -1, *x.shape[1:]).transpose(1, 2)

    q, k, v = pad(q, padding.queries), pad(k, padding.keys), pad(v, padding.keys)
    visible = padding.visible if mask is None else mask
    out = F.scaled_dot_product_attention(
        q, k, v, visible, dropout_p=dropout, is_causal=visible is None
    )
    out = out.transpose(1, 2).flatten(0, 1)
    return out if out.shape[0] == padding.slots.numel() else out.index_select(0, padding.slots)


def _repeat_heads(x: Tensor, heads: int) -> Tensor:
    """Repeat kv heads for grouped-query attention: [T, kv heads, d] -> [T, heads, d]."""
    groups = heads // x.shape[1]
    return x if groups == 1 else x.repeat_interleave(groups, dim=1)


def _decode_attention(
    q: Tensor, keys: Tensor, values: Tensor, layout: SequenceLayout, *, windowed: bool
) -> Tensor:
    """Attend with one query per row, q [B, heads, d], to the row's cached keys and values.

    keys and values are [rows, length, kv heads, d]. Returns [B, heads, d].
    """
    B, heads, d = q.shape
    length = layout.max_seqlen_kv
    k = keys[:B, :length].transpose(1, 2)
    v = values[:B, :length].transpose(1, 2)
    # The queries of a kv head use the dimension of query positions, so that grouped heads need no
    # copies of the cache.
    grouped = q.view(B, k.shape[1], heads // k.shape[1], d)
    visible = layout.window_visible[0] if windowed and layout.window else layout.visible
    return F.scaled_dot_product_attention(grouped, k, v, attn_mask=visible).reshape(B, heads, d)
