"""The exact KL between two rows of logits in one read of each; its gradients in one more.

Functions with the signatures of the torch implementations in fastrlhf/ops/kl.py. One program per
row, two online softmaxes.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrlhf.kernels.rows import (
    fill_zero,
    head_length,
    index,
    jit,
    on_device,
    row_options,
    row_start,
    same_alignment,
    scalar,
)
from fastrlhf.ops.kl import SavedKL
from fastrlhf.ops.layouts import KLStatistic
from fastrlhf.ops.scalars import Number

LN2 = tl.constexpr(math.log(2))
LOG2E = 1 / math.log(2)
ROW_MAX = index(KLStatistic.ROW_MAX)
ROW_SUM = index(KLStatistic.ROW_SUM)
REF_MAX = index(KLStatistic.REF_MAX)
REF_SUM = index(KLStatistic.REF_SUM)
CROSS = index(KLStatistic.CROSS)


@triton.jit
def _add(x, top, total, scale):
    """Take one online-softmax step over groups of logits [G, VECTOR].

    Returns (new max [G], factor of the earlier sums [G], exponentials [G, VECTOR], new sums [G]).
    """
    new_top = tl.maximum(top, tl.max(x, 1))
    shift = tl.where(new_top == -float("inf"), 0.0, new_top)
    keep = tl.where(top == -float("inf"), 0.0, tl.exp2((top - shift) * scale))
    e = tl.exp2((x - shift[:, None]) * scale)
    return new_top, keep, e, keep * total + tl.sum(e, 1)


@triton.jit
def _fold(x, y, top_x, sum_x, top_y, sum_y, cross, scale):
    """Add groups; cross is sum e (x - y) of raw logits, so only the max of x rescales it."""
    top_x, keep, e, sum_x = _add(x, top_x, sum_x, scale)
    top_y, _, _, sum_y = _add(y, top_y, sum_y, scale)
    cross = keep * cross + tl.sum(tl.where(e == 0.0, 0.0, e * (x - y)), 1)
    return top_x, sum_x, top_y, sum_y, cross


@triton.jit
def _row_max(top, scale):
    """Return (the row's max, the factor of each group's sums)."""
    row_top = tl.max(top, 0)
    shift = tl.where(row_top == -float("inf"), 0.0, row_top)
    return row_top, tl.where(top == -float("inf"), 0.0, tl.exp2((top - shift) * scale))


@jit("rows", "length", "stride_b", "stride_l", "ref_stride_b", "ref_stride_l", "columns")
def _statistics_kernel(
    x_ptr,  # [B, L, V] logits
    y_ptr,  # [B, L, V] reference logits
    mask_ptr,  # [N] bool, or unused
    stats_ptr,  # [5, N] fp32 out, rows as KLStatistic
    rows,
    length,
    stride_b,
    stride_l,
    ref_stride_b,
    ref_stride_l,
    columns,
    scale,
    inverse_temperature,
    MASKED: tl.constexpr,
    ON_DEVICE: tl.constexpr,
    SAME_ALIGNMENT: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    scale = scalar(scale, ON_DEVICE)
    inverse_temperature = scalar(inverse_temperature, ON_DEVICE)
    row_x, total_x, row_y, total_y, total_cross = -float("inf"), 0.0, -float("inf"), 0.0, 0.0
    keep = True
    if MASKED:
        keep = tl.load(mask_ptr + row) != 0
    if keep:
        x_start = row_start(x_ptr, row, length, stride_b, stride_l)
        y_start = row_start(y_ptr, row, length, ref_stride_b, ref_stride_l)
        GROUPS: tl.constexpr = BLOCK // VECTOR  # what one thread loads at a time, as in logprob.py
        lanes = tl.arange(0, GROUPS)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
        nothing = tl.zeros([GROUPS], dtype=tl.float32)
        lowest = nothing - float("inf")
        top_x, sum_x, top_y, sum_y, cross = lowest, nothing, lowest, nothing, nothing
        head = tl.minimum(head_length(x_start, VECTOR), columns)
        blocks = (columns - head) // BLOCK
        for edge in range(2):  # the head, then the tail
            start = tl.where(edge == 0, 0, head + blocks * BLOCK)
            end = tl.where(edge == 0, head, columns)
            if start < end:
                at = start + lanes
                x = tl.load(x_start + at, mask=at < end, other=-float("inf")).to(tl.float32)
                y = tl.load(y_start + at, mask=at < end, other=-float("inf")).to(tl.float32)
                top_x, sum_x, top_y, sum_y, cross = _fold(
                    x, y, top_x, sum_x, top_y, sum_y, cross, scale
                )
        x_aligned = tl.multiple_of(x_start + head, 16)
        y_aligned = y_start + head
        if SAME_ALIGNMENT:
            y_aligned = tl.multiple_of(y_aligned, 16)
        for i in range(blocks):
            x = tl.load(x_aligned + i * BLOCK + lanes).to(tl.float32)
            y = tl.load(y_aligned + i * BLOCK + lanes).to(tl.float32)
            top_x, sum_x, top_y, sum_y, cross = _fold(
                x, y, top_x, sum_x, top_y, sum_y, cross, scale
            )
        row_x, keep_x = _row_max(top_x, scale)
        row_y, keep_y = _row_max(top_y, scale)
        total_x, total_y = tl.sum(keep_x * sum_x, 0), tl.sum(keep_y * sum_y, 0)
        total_cross = tl.sum(tl.where(keep_x == 0.0, 0.0, keep_x * cross), 0)
    tokens = rows.to(tl.int64)
    stats_ptr += row
    tl.store(stats_ptr + tokens * ROW_MAX, row_x)
    tl.store(stats_ptr + tokens * ROW_SUM, total_x)
    tl.store(stats_ptr + tokens * REF_MAX, row_y)
    tl.store(stats_ptr + tokens * REF_SUM, total_y)
    tl.store(stats_ptr + tokens * CROSS, total_cross * inverse_temperature)


@triton.jit
def _gradients(x, y, terms, scale):
    """Return the gradients of logits x and reference logits y, fp32.

    `terms` of the row: max x, 1 / sum e, max y, 1 / sum f, log p - log q - kl at both maxima, and
    the upstream gradient / T.
    """
    top_x, inverse_x, top_y, inverse_y, shift, grad = terms
    u = (x - top_x) * scale
    w = (y - top_y) * scale
    p = tl.exp2(u) * inverse_x
    d_x = tl.where(p == 0.0, 0.0, p * ((u - w) * LN2 + shift)) * grad
    return d_x, (tl.exp2(w) * inverse_y - p) * grad


@triton.jit
def _write_part(
    x_ptr,
    y_ptr,
    out_ptr,
    ref_out_ptr,
    at,
    live,
    terms,
    scale,
    LOGITS: tl.constexpr,
    REF: tl.constexpr,
):
    """Write the gradients of the columns `at` that are `live`."""
    x = tl.load(x_ptr + at, mask=live, other=-float("inf")).to(tl.float32)
    y = tl.load(y_ptr + at, mask=live, other=-float("inf")).to(tl.float32)
    d_x, d_y = _gradients(x, y, terms, scale)
    if LOGITS:
        tl.store(out_ptr + at, d_x.to(out_ptr.dtype.element_ty), mask=live)
    if REF:
        tl.store(ref_out_ptr + at, d_y.to(ref_out_ptr.dtype.element_ty), mask=live)


@triton.jit
def _write_row(
    x_ptr,  # starts of the rows
    y_ptr,
    out_ptr,
    ref_out_ptr,
    columns,
    terms,
    scale,
    LOGITS: tl.constexpr,
    REF: tl.constexpr,
    SAME_ALIGNMENT: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    few = tl.arange(0, VECTOR)
    head = tl.minimum(head_length(x_ptr, VECTOR), columns)
    _write_part(x_ptr, y_ptr, out_ptr, ref_out_ptr, few, few < head, terms, scale, LOGITS, REF)
    lanes = tl.arange(0, BLOCK)
    blocks = (columns - head) // BLOCK
    x_aligned = tl.multiple_of(x_ptr + head, 16)
    y_aligned, out_aligned, ref_out_aligned = y_ptr + head, out_ptr + head, ref_out_ptr + head
    if SAME_ALIGNMENT:
        y_aligned = tl.multiple_of(y_aligned, 16)
        out_aligned = tl.multiple_of(out_aligned, 16)
        ref_out_aligned = tl.multiple_of(ref_out_aligned, 16)
    for i in range(blocks):
        at = i * BLOCK + lanes
        x = tl.load(x_aligned + at).to(tl.float32)
        y = tl.load(y_aligned + at).to(tl.float32)
        d_x, d_y = _gradients(x, y, terms, scale)
        if LOGITS:
            tl.store(out_aligned + at, d_x.to(out_ptr.dtype.element_ty))
        if REF:
            tl.store(ref_out_aligned + at, d_y.to(ref_out_ptr.dtype.element_ty))
    rest = head + blocks * BLOCK + lanes
    _write_part(x_ptr, y_ptr, out_ptr, ref_out_ptr, rest, rest < columns, terms, scale, LOGITS, REF)


@jit(
    "rows",
    "length",
    "stride_b",
    "stride_l",
    "ref_stride_b",
    "ref_stride_l",
    "out_stride_b",
    "out_stride_l",
    "ref_out_stride_b",
    "ref_out_stride_l",
    "columns",
    "width",
)
def _backward_kernel(
    x_ptr,  # [B, L, V] logits
    y_ptr,  # [B, L, V] reference logits
    out_ptr,  # [B, L, V] gradient of the logits, or unused
    ref_out_ptr,  # [B, L, V] gradient of the reference logits, or unused
    mask_ptr,  # [N] bool, or unused
    stats_ptr,  # [5, N] fp32, rows as KLStatistic
    kl_ptr,  # [N] fp32
    grad_ptr,  # [N] fp32
    rows,
    length,
    stride_b,
    stride_l,
    ref_stride_b,
    ref_stride_l,
    out_stride_b,
    out_stride_l,
    ref_out_stride_b,
    ref_out_stride_l,
    columns,
    width,
    scale,
    inverse_temperature,
    MASKED: tl.constexpr,
    ON_DEVICE: tl.constexpr,
    LOGITS: tl.constexpr,
    REF: tl.constexpr,
    SAME_ALIGNMENT: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    scale = scalar(scale, ON_DEVICE)
    inverse_temperature = scalar(inverse_temperature, ON_DEVICE)
    out_ptr = row_start(out_ptr, row, length, out_stride_b, out_stride_l)
    ref_out_ptr = row_start(ref_out_ptr, row, length, ref_out_stride_b, ref_out_stride_l)
    end = columns
    if MASKED:
        end = tl.where(tl.load(mask_ptr + row) != 0, columns, 0)
    if LOGITS:
        fill_zero(out_ptr + end, width - end, VECTOR, BLOCK)
    if REF:
        fill_zero(ref_out_ptr + end, width - end, VECTOR, BLOCK)
    if end > 0:
        tokens = rows.to(tl.int64)
        stats_ptr += row
        top_x = tl.load(stats_ptr + tokens * ROW_MAX)
        sum_x = tl.load(stats_ptr + tokens * ROW_SUM)
        top_y = tl.load(stats_ptr + tokens * REF_MAX)
        sum_y = tl.load(stats_ptr + tokens * REF_SUM)
        shift = tl.log(sum_y) - tl.log(sum_x) - tl.load(kl_ptr + row)
        grad = tl.load(grad_ptr + row) * inverse_temperature
        terms = (top_x, 1.0 / sum_x, top_y, 1.0 / sum_y, shift, grad)
        _write_row(
            row_start(x_ptr, row, length, stride_b, stride_l),
            row_start(y_ptr, row, length, ref_stride_b, ref_stride_l),
            out_ptr,
            ref_out_ptr,
            columns,
            terms,
            scale,
            LOGITS,
            REF,
            SAME_ALIGNMENT,
            VECTOR,
            BLOCK,
        )


def logits_kl_statistics(
    rows: Tensor, ref_rows: Tensor, mask: Tensor | None, temperature: Number, columns: int
) -> Tensor:
    """Return the statistics [5, N] fp32 of rows and ref_rows [B, L, V]."""
    tokens = rows.shape[0] * rows.shape[1]
    stats = torch.empty(len(KLStatistic), tokens, dtype=torch.float32, device=rows.device)
    if tokens:
        _statistics_kernel[(tokens,)](
            rows,
            ref_rows,
            rows if mask is None else mask,
            stats,
            tokens,
            rows.shape[1],
            *rows.stride()[:2],
            *ref_rows.stride()[:2],
            columns,
            LOG2E / temperature,
            1 / temperature,
            MASKED=mask is not None,
            ON_DEVICE=on_device(temperature),
            SAME_ALIGNMENT=same_alignment(rows, ref_rows),
            **row_options(rows, columns),
        )
    return stats


def logits_kl_backward(
    rows: Tensor,
    ref_rows: Tensor,
    mask: Tensor | None,
    saved: SavedKL,
    grad: Tensor,
    temperature: Number,
    columns: int,
    out: Tensor | None,
    ref_out: Tensor | None,
) -> None:
    """Write the gradients of rows into `out` and of ref_rows into `ref_out`, unless None."""
    tokens = rows.shape[0] * rows.shape[1]
    outs = [rows if t is None else t for t in (out, ref_out)]
    if tokens:
        _backward_kernel[(tokens,)](
            rows,
            ref_rows,
            *outs,
            rows if mask is None else mask,
            *saved,
            grad,
            tokens,
            rows.shape[1],
            *(stride for view in (rows, ref_rows, *outs) for stride in view.stride()[:2]),
            columns,
            rows.shape[2],
            LOG2E / temperature,
            1 / temperature,
            MASKED=mask is not None,
            ON_DEVICE=on_device(temperature),
            LOGITS=out is not None,
            REF=ref_out is not None,
            SAME_ALIGNMENT=all(same_alignment(rows, view) for view in (ref_rows, *outs)),
            **row_options(rows, columns),
        )
