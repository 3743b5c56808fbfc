"""The exact KL between two rows of logits in one read of each; its gradients in one read of each and one write each.

Raw functions with the signatures of the torch bodies in fastrlhf/ops/kl.py. One program a row, two online softmaxes.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrlhf.kernels.rows import fill_zero, head_length, in_step, jit, row_options, row_start

LN2 = tl.constexpr(math.log(2))
LOG2E = 1 / math.log(2)


@triton.jit
def _add(x, top, total, scale):
    """One online-softmax step over groups of logits [G, VECTOR]: (new max, factor for what was summed before, both [G],
    the groups' exponentials)."""
    new_top = tl.maximum(top, tl.max(x, 1))
    shift = tl.where(new_top == -float("inf"), 0.0, new_top)
    keep = tl.where(top == -float("inf"), 0.0, tl.exp2((top - shift) * scale))
    e = tl.exp2((x - shift[:, None]) * scale)
    return new_top, keep, e, keep * total + tl.sum(e, 1)


@triton.jit
def _fold(x, y, top_x, sum_x, top_y, sum_y, cross, scale):
    """Add groups: cross is sum e (x - y) of raw logits, so that neither maximum's moves but that of x rescale it."""
    top_x, keep, e, sum_x = _add(x, top_x, sum_x, scale)
    top_y, _, _, sum_y = _add(y, top_y, sum_y, scale)
    cross = keep * cross + tl.sum(tl.where(e == 0.0, 0.0, e * (x - y)), 1)
    return top_x, sum_x, top_y, sum_y, cross


@triton.jit
def _whole(top, scale):
    """(the row's max, the factor for each group's sums)."""
    row_top = tl.max(top, 0)
    shift = tl.where(row_top == -float("inf"), 0.0, row_top)
    return row_top, tl.where(top == -float("inf"), 0.0, tl.exp2((top - shift) * scale))


@jit("rows", "length", "stride_b", "stride_l", "ref_stride_b", "ref_stride_l", "columns")
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
        top_x, sum_x, top_y, sum_y, cross = (
            nothing - float("inf"),
            nothing,
            nothing - float("inf"),
            nothing,
            nothing,
        )
        head = tl.minimum(head_length(x_start, VECTOR), columns)
        blocks = (columns - head) // BLOCK
        for edge in range(2):  # the head, then the tail
            start = tl.where(edge == 0, 0, head + blocks * BLOCK)
            end = tl.where(edge == 0, head, columns)
            if start < end:
                x = tl.load(
                    x_start + start + lanes, mask=start + lanes < end, other=-float("inf")
                ).to(tl.float32)
                y = tl.load(
                    y_start + start + lanes, mask=start + lanes < end, other=-float("inf")
                ).to(tl.float32)
                top_x, sum_x, top_y, sum_y, cross = _fold(
                    x, y, top_x, sum_x, top_y, sum_y, cross, scale
                )
        x_body = tl.multiple_of(x_start + head, 16)
        y_body = y_start + head
        if IN_STEP:
            y_body = tl.multiple_of(y_body, 16)
        for i in range(blocks):
            x = tl.load(x_body + i * BLOCK + lanes).to(tl.float32)
            y = tl.load(y_body + i * BLOCK + lanes).to(tl.float32)
            top_x, sum_x, top_y, sum_y, cross = _fold(
                x, y, top_x, sum_x, top_y, sum_y, cross, scale
            )
        row_x, keep_x = _whole(top_x, scale)
        row_y, keep_y = _whole(top_y, scale)
        total_x, total_y = tl.sum(keep_x * sum_x, 0), tl.sum(keep_y * sum_y, 0)
        total_cross = tl.sum(tl.where(keep_x == 0.0, 0.0, keep_x * cross), 0)
    tokens = rows.to(tl.int64)
    tl.store(stats_ptr + row, row_x)
    tl.store(stats_ptr + tokens + row, total_x)
    tl.store(stats_ptr + 2 * tokens + row, row_y)
    tl.store(stats_ptr + 3 * tokens + row, total_y)
    tl.store(stats_ptr + 4 * tokens + row, total_cross * inverse_temperature)


@triton.jit
def _write_gradients(
    x, y, out_ptr, ref_out_ptr, at, live, top_x, inverse_x, top_y, inverse_y, shift, grad, scale,
    LOGITS: tl.constexpr, REF: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    u = (x - top_x) * scale
    w = (y - top_y) * scale
    p = tl.exp2(u) * inverse_x
    if LOGITS:
        d = (tl.where(p == 0.0, 0.0, p * ((u - w) * LN2 + shift)) * grad).to(
            out_ptr.dtype.element_ty
        )
        if FULL:
            tl.store(out_ptr + at, d)
        else:
            tl.store(out_ptr + at, d, mask=live)
    if REF:
        d = ((tl.exp2(w) * inverse_y - p) * grad).to(ref_out_ptr.dtype.element_ty)
        if FULL:
            tl.store(ref_out_ptr + at, d)
        else:
            tl.store(ref_out_ptr + at, d, mask=live)


@jit(
    "rows", "length", "stride_b", "stride_l", "ref_stride_b", "ref_stride_l", "out_stride_b", "out_stride_l",
    "ref_out_stride_b", "ref_out_stride_l", "columns", "width",
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
        top_x = tl.load(stats_ptr + row)
        sum_x = tl.load(stats_ptr + tokens + row)
        top_y = tl.load(stats_ptr + 2 * tokens + row)
        sum_y = tl.load(stats_ptr + 3 * tokens + row)
        shift = tl.log(sum_y) - tl.log(sum_x) - tl.load(kl_ptr + row)
        grad = tl.load(grad_ptr + row) * inverse_temperature
        inverse_x, inverse_y = 1.0 / sum_x, 1.0 / sum_y
        x_ptr = row_start(x_ptr, row, length, stride_b, stride_l)
        y_ptr = row_start(y_ptr, row, length, ref_stride_b, ref_stride_l)
        lanes = tl.arange(0, BLOCK)
        few = tl.arange(0, VECTOR)
        head = tl.minimum(head_length(x_ptr, VECTOR), columns)
        live = few < head
        x_head = tl.load(x_ptr + few, mask=live, other=-float("inf")).to(tl.float32)
        y_head = tl.load(y_ptr + few, mask=live, other=-float("inf")).to(tl.float32)
        _write_gradients(
            x_head, y_head, out_ptr, ref_out_ptr, few, live, top_x, inverse_x, top_y, inverse_y, shift, grad, scale,
            LOGITS, REF, False,
        )  # fmt: skip
        blocks = (columns - head) // BLOCK
        x_body = tl.multiple_of(x_ptr + head, 16)
        y_body, out_body, ref_out_body = y_ptr + head, out_ptr + head, ref_out_ptr + head
        if IN_STEP:
            y_body = tl.multiple_of(y_body, 16)
            out_body = tl.multiple_of(out_body, 16)
            ref_out_body = tl.multiple_of(ref_out_body, 16)
        for i in range(blocks):
            step = i * BLOCK + lanes
            x = tl.load(x_body + step).to(tl.float32)
            y = tl.load(y_body + step).to(tl.float32)
            _write_gradients(
                x, y, out_body, ref_out_body, step, live, top_x, inverse_x, top_y, inverse_y, shift, grad, scale,
                LOGITS, REF, True,
            )  # fmt: skip
        rest = head + blocks * BLOCK + lanes
        live_rest = rest < columns
        x = tl.load(x_ptr + rest, mask=live_rest, other=-float("inf")).to(tl.float32)
        y = tl.load(y_ptr + rest, mask=live_rest, other=-float("inf")).to(tl.float32)
        _write_gradients(
            x, y, out_ptr, ref_out_ptr, rest, live_rest, top_x, inverse_x, top_y, inverse_y, shift, grad, scale,
            LOGITS, REF, False,
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
