"""The exact KL between two rows of logits in one read of each; its gradients in one read of each and one write each.

Raw functions with the signatures of the torch bodies in fastrlhf/ops/kl.py. One program a row, two online softmaxes.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrlhf.kernels.rows import fill_zero, head_length, in_step, row_offset, row_options

LN2 = tl.constexpr(math.log(2))
LOG2E = 1 / math.log(2)


@triton.jit
def _add(x, top, total, scale):
    """One online-softmax step: (new max, factor for what was summed before, the block's exponentials)."""
    new_top = tl.maximum(top, tl.max(x, 0))
    shift = tl.where(new_top == -float("inf"), 0.0, new_top)
    keep = tl.where(top == -float("inf"), 0.0, tl.exp2((top - shift) * scale))
    e = tl.exp2((x - shift) * scale)
    return new_top, keep, e, keep * total + tl.sum(e, 0)


@triton.jit
def _fold(x, y, top_x, sum_x, top_y, sum_y, cross, scale):
    """Add a block: cross is sum e (x - y) of raw logits, so that neither maximum's moves but that of x rescale it."""
    top_x, keep, e, sum_x = _add(x, top_x, sum_x, scale)
    top_y, _, _, sum_y = _add(y, top_y, sum_y, scale)
    cross = keep * cross + tl.sum(tl.where(e == 0.0, 0.0, e * (x - y)), 0)
    return top_x, sum_x, top_y, sum_y, cross


@triton.jit(do_not_specialize=["rows", "length", "stride_b", "stride_l", "ref_stride_b", "ref_stride_l", "columns"])
def _statistics_kernel(
    x_ptr,  # [B, L, V] logits
    y_ptr,  # [B, L, V] reference logits
    mask_ptr,  # [N] bool, or unused
    stats_ptr,  # [5, N] fp32 out
    rows, length, stride_b, stride_l, ref_stride_b, ref_stride_l, columns,
    scale, inverse_temperature,
    MASKED: tl.constexpr, IN_STEP: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    top_x, sum_x, top_y, sum_y, cross = -float("inf"), 0.0, -float("inf"), 0.0, 0.0
    keep = True
    if MASKED:
        keep = tl.load(mask_ptr + row) != 0
    if keep:
        offset = row_offset(row, length, stride_b, stride_l)
        ref = row_offset(row, length, ref_stride_b, ref_stride_l)
        lanes = tl.arange(0, BLOCK)
        head = tl.minimum(head_length(offset, VECTOR), columns)
        if head > 0:
            few = tl.arange(0, VECTOR)
            x = tl.load(x_ptr + offset + few, mask=few < head, other=-float("inf")).to(tl.float32)
            y = tl.load(y_ptr + ref + few, mask=few < head, other=-float("inf")).to(tl.float32)
            top_x, sum_x, top_y, sum_y, cross = _fold(x, y, top_x, sum_x, top_y, sum_y, cross, scale)
        blocks = (columns - head) // BLOCK
        start = tl.multiple_of(offset + head, VECTOR)
        ref_start = ref + head
        if IN_STEP:
            ref_start = tl.multiple_of(ref_start, VECTOR)
        for i in range(blocks):
            x = tl.load(x_ptr + start + i * BLOCK + lanes).to(tl.float32)
            y = tl.load(y_ptr + ref_start + i * BLOCK + lanes).to(tl.float32)
            top_x, sum_x, top_y, sum_y, cross = _fold(x, y, top_x, sum_x, top_y, sum_y, cross, scale)
        rest = head + blocks * BLOCK + lanes
        if head + blocks * BLOCK < columns:
            x = tl.load(x_ptr + offset + rest, mask=rest < columns, other=-float("inf")).to(tl.float32)
            y = tl.load(y_ptr + ref + rest, mask=rest < columns, other=-float("inf")).to(tl.float32)
            top_x, sum_x, top_y, sum_y, cross = _fold(x, y, top_x, sum_x, top_y, sum_y, cross, scale)
    tokens = rows.to(tl.int64)
    tl.store(stats_ptr + row, top_x)
    tl.store(stats_ptr + tokens + row, sum_x)
    tl.store(stats_ptr + 2 * tokens + row, top_y)
    tl.store(stats_ptr + 3 * tokens + row, sum_y)
    tl.store(stats_ptr + 4 * tokens + row, cross * inverse_temperature)


@triton.jit
def _write_gradients(
    x, y, out_ptr, ref_out_ptr, where, ref_where, live, top_x, inverse_x, top_y, inverse_y, shift, grad, scale,
    LOGITS: tl.constexpr, REF: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    u = (x - top_x) * scale
    w = (y - top_y) * scale
    p = tl.exp2(u) * inverse_x
    if LOGITS:
        d = (tl.where(p == 0.0, 0.0, p * ((u - w) * LN2 + shift)) * grad).to(out_ptr.dtype.element_ty)
        if FULL:
            tl.store(out_ptr + where, d)
        else:
            tl.store(out_ptr + where, d, mask=live)
    if REF:
        d = ((tl.exp2(w) * inverse_y - p) * grad).to(ref_out_ptr.dtype.element_ty)
        if FULL:
            tl.store(ref_out_ptr + ref_where, d)
        else:
            tl.store(ref_out_ptr + ref_where, d, mask=live)


@triton.jit(
    do_not_specialize=[
        "rows", "length", "stride_b", "stride_l", "ref_stride_b", "ref_stride_l", "out_stride_b", "out_stride_l",
        "ref_out_stride_b", "ref_out_stride_l", "columns", "width",
    ]
)  # fmt: skip
def _backward_kernel(
    x_ptr, y_ptr,  # [B, L, V] logits and reference logits
    out_ptr, ref_out_ptr,  # [B, L, V] gradients, or unused
    mask_ptr,  # [N] bool, or unused
    stats_ptr,  # [5, N] fp32
    kl_ptr, grad_ptr,  # [N] fp32
    rows, length, stride_b, stride_l, ref_stride_b, ref_stride_l, out_stride_b, out_stride_l, ref_out_stride_b,
    ref_out_stride_l, columns, width,
    scale, inverse_temperature,
    MASKED: tl.constexpr, LOGITS: tl.constexpr, REF: tl.constexpr, IN_STEP: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    out = row_offset(row, length, out_stride_b, out_stride_l)
    ref_out = row_offset(row, length, ref_out_stride_b, ref_out_stride_l)
    end = columns
    if MASKED:
        end = tl.where(tl.load(mask_ptr + row) != 0, columns, 0)
    if LOGITS:
        fill_zero(out_ptr, out + end, out + width, VECTOR, BLOCK)
    if REF:
        fill_zero(ref_out_ptr, ref_out + end, ref_out + width, VECTOR, BLOCK)
    if end > 0:
        tokens = rows.to(tl.int64)
        top_x = tl.load(stats_ptr + row)
        sum_x = tl.load(stats_ptr + tokens + row)
        top_y = tl.load(stats_ptr + 2 * tokens + row)
        sum_y = tl.load(stats_ptr + 3 * tokens + row)
        shift = tl.log(sum_y) - tl.log(sum_x) - tl.load(kl_ptr + row)
        grad = tl.load(grad_ptr + row) * inverse_temperature
        inverse_x, inverse_y = 1.0 / sum_x, 1.0 / sum_y
        offset = row_offset(row, length, stride_b, stride_l)
        ref = row_offset(row, length, ref_stride_b, ref_stride_l)
        lanes = tl.arange(0, BLOCK)
        few = tl.arange(0, VECTOR)
        head = tl.minimum(head_length(offset, VECTOR), columns)
        live = few < head
        x_head = tl.load(x_ptr + offset + few, mask=live, other=-float("inf")).to(tl.float32)
        y_head = tl.load(y_ptr + ref + few, mask=live, other=-float("inf")).to(tl.float32)
        _write_gradients(
            x_head, y_head, out_ptr, ref_out_ptr, out + few, ref_out + few, live, top_x, inverse_x, top_y, inverse_y,
            shift, grad, scale, LOGITS, REF, False,
        )  # fmt: skip
        blocks = (columns - head) // BLOCK
        start = tl.multiple_of(offset + head, VECTOR)
        ref_start, out_start, ref_out_start = ref + head, out + head, ref_out + head
        if IN_STEP:
            ref_start = tl.multiple_of(ref_start, VECTOR)
            out_start = tl.multiple_of(out_start, VECTOR)
            ref_out_start = tl.multiple_of(ref_out_start, VECTOR)
        for i in range(blocks):
            step = i * BLOCK + lanes
            x = tl.load(x_ptr + start + step).to(tl.float32)
            y = tl.load(y_ptr + ref_start + step).to(tl.float32)
            _write_gradients(
                x, y, out_ptr, ref_out_ptr, out_start + step, ref_out_start + step, live, top_x, inverse_x, top_y,
                inverse_y, shift, grad, scale, LOGITS, REF, True,
            )  # fmt: skip
        rest = head + blocks * BLOCK + lanes
        live_rest = rest < columns
        x = tl.load(x_ptr + offset + rest, mask=live_rest, other=-float("inf")).to(tl.float32)
        y = tl.load(y_ptr + ref + rest, mask=live_rest, other=-float("inf")).to(tl.float32)
        _write_gradients(
            x, y, out_ptr, ref_out_ptr, out + rest, ref_out + rest, live_rest, top_x, inverse_x, top_y, inverse_y,
            shift, grad, scale, LOGITS, REF, False,
        )  # fmt: skip


def logits_kl_statistics(
    rows: Tensor, ref_rows: Tensor, mask: Tensor | None, temperature: float, columns: int
) -> Tensor:
    """rows, ref_rows [B, L, V] -> [5, N] fp32: max x, sum e, max y, sum f, sum e (x - y) / T."""
    tokens = rows.shape[0] * rows.shape[1]
    stats = torch.empty(5, tokens, dtype=torch.float32, device=rows.device)
    if tokens:
        _statistics_kernel[(tokens,)](
            rows, ref_rows, rows if mask is None else mask, stats, tokens, rows.shape[1], *rows.stride()[:2],
            *ref_rows.stride()[:2], columns, LOG2E / temperature, 1 / temperature, MASKED=mask is not None,
            IN_STEP=in_step(rows, ref_rows), **row_options(rows, columns),
        )  # fmt: skip
    return stats


def logits_kl_backward(
    rows: Tensor, ref_rows: Tensor, mask: Tensor | None, stats: Tensor, kl: Tensor, grad: Tensor, temperature: float,
    columns: int, out: Tensor | None, ref_out: Tensor | None,
) -> None:  # fmt: skip
    """Write d kl / d rows times grad into `out` and d kl / d ref_rows into `ref_out`, either of which may be None."""
    tokens = rows.shape[0] * rows.shape[1]
    outs = [rows if t is None else t for t in (out, ref_out)]
    if tokens:
        _backward_kernel[(tokens,)](
            rows, ref_rows, *outs, rows if mask is None else mask, stats, kl, grad, tokens, rows.shape[1],
            *rows.stride()[:2], *ref_rows.stride()[:2], *outs[0].stride()[:2], *outs[1].stride()[:2], columns,
            rows.shape[2], LOG2E / temperature, 1 / temperature, MASKED=mask is not None, LOGITS=out is not None,
            REF=ref_out is not None, IN_STEP=all(in_step(rows, t) for t in (ref_rows, *outs)),
            **row_options(rows, columns),
        )  # fmt: skip
