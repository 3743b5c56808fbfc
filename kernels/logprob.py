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

from fastrlhf.kernels.rows import fill_zero, head_length, in_step, jit, row_options, row_start

LN2 = tl.constexpr(math.log(2))
LOG2E = 1 / math.log(2)


@triton.jit
def _exponent(x, top, scale):
    """(x - top) * scale in powers of two, at least -200: exp2 of that is 0 already, and 0 * -inf is avoided."""
    return tl.maximum((x - top) * scale, -200.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _fold(x, top, total, weighted, scale, ENTROPY: tl.constexpr):
    """Add groups of logits [G, VECTOR] to their (max, sum e, sum e u) [G], u = (x - max) * scale in powers of two.

    A group is what one thread loads at a time, so nothing passes between threads before the row's end.
    """
    new_top = tl.maximum(top, tl.max(x, 1))
    shift = tl.where(
        new_top == -float("inf"), 0.0, new_top
    )  # nothing but -inf so far: inf - inf is avoided
    drop = _exponent(top, shift, scale)
    keep = tl.exp2(drop)
    u = _exponent(x, shift[:, None], scale)
    e = tl.exp2(u)
    if ENTROPY:
        weighted = keep * (weighted + drop * total) + tl.sum(e * u, 1)
    return new_top, keep * total + tl.sum(e, 1), weighted


@triton.jit
def _row_statistics(
    x_ptr,  # the row
    columns,
    label,  # in this shard's columns, or outside
    scale,  # log2(e) / temperature
    ENTROPY: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(max, sum e, sum e (x - max) / T, x[label] or -inf)."""
    GROUPS: tl.constexpr = BLOCK // VECTOR
    lanes = tl.arange(0, GROUPS)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    nothing = tl.zeros([GROUPS], dtype=tl.float32)
    top, total, weighted = nothing - float("inf"), nothing, nothing
    owned = (label >= 0) & (label < columns)
    target = tl.load(x_ptr + label, mask=owned, other=-float("inf")).to(tl.float32)
    head = tl.minimum(head_length(x_ptr, VECTOR), columns)
    blocks = (columns - head) // BLOCK
    for edge in range(2):  # the head, then the tail
        start = tl.where(edge == 0, 0, head + blocks * BLOCK)
        end = tl.where(edge == 0, head, columns)
        if start < end:
            x = tl.load(x_ptr + start + lanes, mask=start + lanes < end, other=-float("inf")).to(
                tl.float32
            )
            top, total, weighted = _fold(x, top, total, weighted, scale, ENTROPY)
    body = tl.multiple_of(x_ptr + head, 16)
    for i in range(blocks):
        x = tl.load(body + i * BLOCK + lanes).to(tl.float32)
        top, total, weighted = _fold(x, top, total, weighted, scale, ENTROPY)
    row_top = tl.max(top, 0)
    drop = _exponent(top, tl.where(row_top == -float("inf"), 0.0, row_top), scale)
    keep = tl.exp2(drop)
    weighted = tl.sum(keep * (weighted + drop * total), 0)
    return row_top, tl.sum(keep * total, 0), weighted * LN2, target


@jit("rows", "length", "stride_b", "stride_l", "vocab_start", "columns")
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
    top, total, weighted, target = (
        0.0,
        1.0,
        0.0,
        0.0,
    )  # what a masked row holds: finite, and never looked at
    keep = True
    if MASKED:
        keep = tl.load(mask_ptr + row) != 0
    if keep:
        label = tl.load(labels_ptr + row) - vocab_start
        start = row_start(x_ptr, row, length, stride_b, stride_l)
        top, total, weighted, target = _row_statistics(
            start, columns, label, scale, True, VECTOR, BLOCK
        )
    tl.store(stats_ptr + row, top)
    tl.store(stats_ptr + rows.to(tl.int64) + row, total)
    tl.store(stats_ptr + 2 * rows.to(tl.int64) + row, weighted)
    tl.store(stats_ptr + 3 * rows.to(tl.int64) + row, target)


@jit("length", "stride_b", "stride_l", "vocab_start", "columns")
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
        start = row_start(x_ptr, row, length, stride_b, stride_l)
        top, total, weighted, target = _row_statistics(
            start, columns, label, scale, ENTROPY, VECTOR, BLOCK
        )
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
def _through_p(x, top, scale, inverse, to_p, to_h, shift, ENTROPY: tl.constexpr):
    """p (g_lse - g_lp) - g_H p (log p + H), with p = exp2((x - max) scale) / sum; fp32."""
    u = _exponent(x.to(tl.float32), top, scale)
    p = tl.exp2(u) * inverse
    if ENTROPY:
        return p * (to_p - to_h * (u * LN2 + shift))
    return p * to_p


@jit(
    "length",
    "stride_b",
    "stride_l",
    "out_stride_b",
    "out_stride_l",
    "vocab_start",
    "columns",
    "width",
)
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
    out_ptr = row_start(out_ptr, row, length, out_stride_b, out_stride_l)
    if MASKED:  # noqa: SIM102  (a constexpr, then a device value)
        if tl.load(mask_ptr + row) == 0:
            fill_zero(out_ptr, width, VECTOR, BLOCK)
            return
    x_ptr = row_start(x_ptr, row, length, stride_b, stride_l)
    label = tl.load(labels_ptr + row) - vocab_start
    owned = (label >= 0) & (label < columns)
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
    if LOGPROB:
        at_label = tl.load(x_ptr + label, mask=owned, other=-float("inf"))
        tl.debug_barrier()  # read by every thread before any of them writes to the row
    lanes = tl.arange(0, BLOCK)
    head = tl.minimum(head_length(x_ptr, VECTOR), columns)
    few = tl.arange(0, VECTOR)
    x_head = tl.load(x_ptr + few, mask=few < head, other=-float("inf"))
    d_head = _through_p(x_head, top, scale, inverse, to_p, to_h, shift, ENTROPY)
    tl.store(out_ptr + few, d_head.to(out_ptr.dtype.element_ty), mask=few < head)
    blocks = (columns - head) // BLOCK
    body = tl.multiple_of(x_ptr + head, 16)
    out_body = out_ptr + head
    if IN_STEP:
        out_body = tl.multiple_of(out_body, 16)
    for i in range(blocks):
        x = tl.load(body + i * BLOCK + lanes)
        d = _through_p(x, top, scale, inverse, to_p, to_h, shift, ENTROPY)
        tl.store(out_body + i * BLOCK + lanes, d.to(out_ptr.dtype.element_ty))
    column = head + blocks * BLOCK + lanes
    x = tl.load(x_ptr + column, mask=column < columns, other=-float("inf"))
    d = _through_p(x, top, scale, inverse, to_p, to_h, shift, ENTROPY)
    tl.store(out_ptr + column, d.to(out_ptr.dtype.element_ty), mask=column < columns)
    if columns < width:
        fill_zero(out_ptr + columns, width - columns, VECTOR, BLOCK)
    if LOGPROB:
        tl.debug_barrier()  # the label's element was written above without what is its alone
        d = to_label + _through_p(at_label, top, scale, inverse, to_p, to_h, shift, ENTROPY)
        tl.store(out_ptr + label, d.to(out_ptr.dtype.element_ty), mask=owned)


def logprob_statistics(
    rows: Tensor,
    labels: Tensor,
    mask: Tensor | None,
    temperature: float,
    vocab_start: int,
    columns: int,
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
