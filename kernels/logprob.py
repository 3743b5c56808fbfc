"""Log-probs, entropy and log-sum-exp of a row of logits in one read; the gradient in one read and one write.

One program a row, an online softmax over blocks of columns. Raw functions, with the signatures of the torch bodies in
fastrlhf/ops/logprob.py: logprob_statistics (for a sharded vocabulary), logprob_forward (the whole op in one launch),
logprob_backward. Left out on purpose: sharing a row between blocks through a cluster, which Triton cannot express.
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
def _fold(x, top, total, weighted, scale, ENTROPY: tl.constexpr):
    """Add a block of logits to (max, sum e, sum e u), u = (x - max) * scale in powers of two; one exponential each."""
    new_top = tl.maximum(top, tl.max(x, 0))
    shift = tl.where(new_top == -float("inf"), 0.0, new_top)  # nothing but -inf so far: inf - inf is avoided
    drop = tl.where(top == -float("inf"), 0.0, (top - shift) * scale)
    u = (x - shift) * scale
    e = tl.exp2(u)
    keep = tl.where(top == -float("inf"), 0.0, tl.exp2(drop))
    if ENTROPY:
        weighted = keep * (weighted + drop * total) + tl.sum(tl.where(e == 0.0, 0.0, e * u), 0)
    return new_top, keep * total + tl.sum(e, 0), weighted


@triton.jit
def _row_statistics(
    x_ptr,  # [B, L, V] at the row's `offset`
    offset,
    columns,
    label,  # in this shard's columns, or outside
    scale,  # log2(e) / temperature
    ENTROPY: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(max, sum e, sum e (x - max) / T, x[label] or -inf)."""
    top = -float("inf")
    total = 0.0
    weighted = 0.0
    lanes = tl.arange(0, BLOCK)
    head = tl.minimum(head_length(offset, VECTOR), columns)
    if head > 0:
        few = tl.arange(0, VECTOR)
        x = tl.load(x_ptr + offset + few, mask=few < head, other=-float("inf")).to(tl.float32)
        top, total, weighted = _fold(x, top, total, weighted, scale, ENTROPY)
    blocks = (columns - head) // BLOCK
    body = x_ptr + tl.multiple_of(offset + head, VECTOR)
    for i in range(blocks):
        x = tl.load(body + i * BLOCK + lanes).to(tl.float32)
        top, total, weighted = _fold(x, top, total, weighted, scale, ENTROPY)
    start = head + blocks * BLOCK
    if start < columns:
        x = tl.load(x_ptr + offset + start + lanes, mask=start + lanes < columns, other=-float("inf")).to(tl.float32)
        top, total, weighted = _fold(x, top, total, weighted, scale, ENTROPY)
    owned = (label >= 0) & (label < columns)
    target = tl.load(x_ptr + offset + label, mask=owned, other=-float("inf")).to(tl.float32)
    return top, total, weighted * LN2, target


@triton.jit(do_not_specialize=["rows", "length", "stride_b", "stride_l", "vocab_start", "columns"])
def _statistics_kernel(
    x_ptr,  # [B, L, V] logits
    labels_ptr,  # [N] int64
    mask_ptr,  # [N] bool, or unused
    stats_ptr,  # [4, N] fp32 out
    rows, length, stride_b, stride_l, vocab_start, columns,
    scale,
    MASKED: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    top, total, weighted, target = 0.0, 1.0, 0.0, 0.0  # what a masked row holds: finite, and never looked at
    keep = True
    if MASKED:
        keep = tl.load(mask_ptr + row) != 0
    if keep:
        label = tl.load(labels_ptr + row) - vocab_start
        offset = row_offset(row, length, stride_b, stride_l)
        top, total, weighted, target = _row_statistics(x_ptr, offset, columns, label, scale, True, VECTOR, BLOCK)
    tl.store(stats_ptr + row, top)
    tl.store(stats_ptr + rows.to(tl.int64) + row, total)
    tl.store(stats_ptr + 2 * rows.to(tl.int64) + row, weighted)
    tl.store(stats_ptr + 3 * rows.to(tl.int64) + row, target)


@triton.jit(do_not_specialize=["length", "stride_b", "stride_l", "vocab_start", "columns"])
def _forward_kernel(
    x_ptr,  # [B, L, V] logits
    labels_ptr,  # [N] int64
    mask_ptr,  # [N] bool, or unused
    ref_ptr,  # [N] fp32 reference log-probs, or unused
    logprobs_ptr, entropy_ptr, logsumexp_ptr, kl_ptr, top_ptr, total_ptr,  # [N] fp32 out
    length, stride_b, stride_l, vocab_start, columns,
    temperature, scale,
    MASKED: tl.constexpr, ENTROPY: tl.constexpr, KL: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    logprob, entropy, logsumexp, kl, top, total = 0.0, 0.0, 0.0, 0.0, 0.0, 1.0
    keep = True
    if MASKED:
        keep = tl.load(mask_ptr + row) != 0
    if keep:
        label = tl.load(labels_ptr + row) - vocab_start
        offset = row_offset(row, length, stride_b, stride_l)
        top, total, weighted, target = _row_statistics(x_ptr, offset, columns, label, scale, ENTROPY, VECTOR, BLOCK)
        log_total = tl.log(total)
        logprob = (target - top) / temperature - log_total
        entropy = log_total - weighted / total
        logsumexp = top / temperature + log_total
        if KL:
            kl = logprob - tl.load(ref_ptr + row)
    tl.store(logprobs_ptr + row, logprob)
    tl.store(logsumexp_ptr + row, logsumexp)
    tl.store(top_ptr + row, top)
    tl.store(total_ptr + row, total)
    if ENTROPY:
        tl.store(entropy_ptr + row, entropy)
    if KL:
        tl.store(kl_ptr + row, kl)


@triton.jit
def _gradient(x, column, label, top, scale, inverse, to_label, to_p, to_h, shift, ENTROPY: tl.constexpr):
    """g_lp 1[j = label] + p (g_lse - g_lp) - g_H p (log p + H), with p = exp2((x - max) scale) / sum."""
    u = (x - top) * scale
    p = tl.exp2(u) * inverse
    d = p * to_p
    if ENTROPY:
        d -= tl.where(p == 0.0, 0.0, p * (u * LN2 + shift)) * to_h
    return d + tl.where(column == label, to_label, 0.0)


@triton.jit(
    do_not_specialize=[
        "length", "stride_b", "stride_l", "out_stride_b", "out_stride_l", "vocab_start", "columns", "width",
    ]
)  # fmt: skip
def _backward_kernel(
    x_ptr,  # [B, L, V] logits
    out_ptr,  # [B, L, V] gradient, may be x_ptr
    labels_ptr,  # [N] int64
    mask_ptr,  # [N] bool, or unused
    top_ptr, total_ptr,  # [N] fp32: whole-vocabulary max and sum
    entropy_ptr,  # [N] fp32, or unused
    grad_logprob_ptr, grad_entropy_ptr, grad_logsumexp_ptr,  # [N] fp32, or unused
    length, stride_b, stride_l, out_stride_b, out_stride_l, vocab_start, columns, width,
    scale, inverse_temperature,
    MASKED: tl.constexpr, LOGPROB: tl.constexpr, ENTROPY: tl.constexpr, LOGSUMEXP: tl.constexpr,
    IN_STEP: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    out = row_offset(row, length, out_stride_b, out_stride_l)
    if MASKED:  # noqa: SIM102  (a constexpr, then a device value)
        if tl.load(mask_ptr + row) == 0:
            fill_zero(out_ptr, out, out + width, VECTOR, BLOCK)
            return
    offset = row_offset(row, length, stride_b, stride_l)
    label = tl.load(labels_ptr + row) - vocab_start
    label = tl.where((label >= 0) & (label < columns), label, -1).to(tl.int32)
    top = tl.load(top_ptr + row)
    total = tl.load(total_ptr + row)
    to_label = 0.0
    to_p = 0.0
    to_h = 0.0
    shift = 0.0
    if LOGPROB:
        to_label = tl.load(grad_logprob_ptr + row) * inverse_temperature
        to_p -= to_label
    if LOGSUMEXP:
        to_p += tl.load(grad_logsumexp_ptr + row) * inverse_temperature
    if ENTROPY:
        to_h = tl.load(grad_entropy_ptr + row) * inverse_temperature
        shift = tl.load(entropy_ptr + row) - tl.log(total)
    inverse = 1.0 / total
    lanes = tl.arange(0, BLOCK)
    head = tl.minimum(head_length(offset, VECTOR), columns)
    few = tl.arange(0, VECTOR)
    x_head = tl.load(x_ptr + offset + few, mask=few < head, other=-float("inf")).to(tl.float32)
    d_head = _gradient(x_head, few, label, top, scale, inverse, to_label, to_p, to_h, shift, ENTROPY)
    tl.store(out_ptr + out + few, d_head.to(out_ptr.dtype.element_ty), mask=few < head)
    blocks = (columns - head) // BLOCK
    out_start = out + head
    if IN_STEP:
        out_start = tl.multiple_of(out_start, VECTOR)
    body = x_ptr + tl.multiple_of(offset + head, VECTOR)
    for i in range(blocks):
        x = tl.load(body + i * BLOCK + lanes).to(tl.float32)
        column = head + i * BLOCK + lanes
        d = _gradient(x, column, label, top, scale, inverse, to_label, to_p, to_h, shift, ENTROPY)
        tl.store(out_ptr + out_start + i * BLOCK + lanes, d.to(out_ptr.dtype.element_ty))
    column = head + blocks * BLOCK + lanes
    x = tl.load(x_ptr + offset + column, mask=column < columns, other=-float("inf")).to(tl.float32)
    d = _gradient(x, column, label, top, scale, inverse, to_label, to_p, to_h, shift, ENTROPY)
    tl.store(out_ptr + out + column, d.to(out_ptr.dtype.element_ty), mask=column < columns)
    if columns < width:
        fill_zero(out_ptr, out + columns, out + width, VECTOR, BLOCK)


def logprob_statistics(
    rows: Tensor, labels: Tensor, mask: Tensor | None, temperature: float, vocab_start: int, columns: int
) -> Tensor:
    """rows [B, L, V], labels and mask [N] -> [4, N] fp32: max x, sum e, sum e (x - max) / T, x[label] or -inf."""
    stats = torch.empty(4, labels.numel(), dtype=torch.float32, device=rows.device)
    if labels.numel():
        _statistics_kernel[(labels.numel(),)](
            rows, labels, rows if mask is None else mask, stats, labels.numel(), rows.shape[1], *rows.stride()[:2],
            vocab_start, columns, LOG2E / temperature, MASKED=mask is not None, **row_options(rows, columns),
        )  # fmt: skip
    return stats


def logprob_forward(
    rows: Tensor, labels: Tensor, mask: Tensor | None, ref_logprobs: Tensor | None, temperature: float,
    with_entropy: bool, vocab_start: int, columns: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(logprobs, entropy, logsumexp, kl, row_max, row_sum), each [N] fp32, or [0] where not asked for; one launch."""
    tokens = labels.numel()

    def out(asked: bool = True) -> Tensor:
        return torch.empty(tokens if asked else 0, dtype=torch.float32, device=rows.device)

    results = (out(), out(with_entropy), out(), out(ref_logprobs is not None), out(), out())
    if tokens:
        _forward_kernel[(tokens,)](
            rows, labels, rows if mask is None else mask, rows if ref_logprobs is None else ref_logprobs, *results,
            rows.shape[1], *rows.stride()[:2], vocab_start, columns, temperature, LOG2E / temperature,
            MASKED=mask is not None, ENTROPY=with_entropy, KL=ref_logprobs is not None, **row_options(rows, columns),
        )  # fmt: skip
    return results


def logprob_backward(
    rows: Tensor, labels: Tensor, mask: Tensor | None, row_max: Tensor, row_sum: Tensor, entropy: Tensor | None,
    grad_logprobs: Tensor | None, grad_entropy: Tensor | None, grad_logsumexp: Tensor | None, temperature: float,
    vocab_start: int, columns: int, out: Tensor,
) -> None:  # fmt: skip
    """Write the gradient of rows [B, L, V] into `out`, which may be `rows`; see `_backward_torch` for the equation."""
    optional = [entropy, grad_logprobs, grad_entropy, grad_logsumexp]
    if labels.numel():
        _backward_kernel[(labels.numel(),)](
            rows, out, labels, rows if mask is None else mask, row_max, row_sum,
            *(rows if t is None else t for t in optional), rows.shape[1], *rows.stride()[:2], *out.stride()[:2],
            vocab_start, columns, rows.shape[2], LOG2E / temperature, 1 / temperature, MASKED=mask is not None,
            LOGPROB=grad_logprobs is not None, ENTROPY=grad_entropy is not None,
            LOGSUMEXP=grad_logsumexp is not None, IN_STEP=in_step(rows, out), **row_options(rows, columns),
        )  # fmt: skip
