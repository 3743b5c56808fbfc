"""Log-probs, entropy and log-sum-exp of a row of logits in one read; the gradient in one more.

One program per row, an online softmax over blocks of columns. Functions with the signatures of the
torch implementations in fastrlhf/ops/logprob_kernels.py: logprob_statistics (for a sharded
vocabulary), logprob_backward, and logprob_forward, which computes all results in one launch.
Not supported: sharing a row between blocks through a cluster, which Triton cannot express.
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
from fastrlhf.ops.layouts import SoftmaxStatistic
from fastrlhf.ops.logprob_kernels import RowResults, SavedRow, TokenGrads
from fastrlhf.ops.scalars import Number

LN2 = tl.constexpr(math.log(2))
LOG2E = 1 / math.log(2)
ROW_MAX = index(SoftmaxStatistic.ROW_MAX)
ROW_SUM = index(SoftmaxStatistic.ROW_SUM)
WEIGHTED = index(SoftmaxStatistic.WEIGHTED)
TARGET = index(SoftmaxStatistic.TARGET)


@triton.jit
def _tanh(z):
    """Return tanh(z): by its series near 0, where 1 - exp would cancel."""
    small = tl.exp2(tl.abs(z) * (-2.0 / LN2))
    large = (1.0 - small) / (1.0 + small)
    square = z * z
    series = z + z * square * (square * (square * -0.0539682540 + 0.1333333333) - 0.3333333333)
    return tl.where(tl.abs(z) < 0.15, series, tl.where(z < 0.0, -large, large))


@triton.jit
def _load_logits(ptr, live, other, softcap, SOFTCAP: tl.constexpr):
    """Load logits as fp32, capped; `other` where not `live`."""
    x = tl.load(ptr, mask=live, other=other).to(tl.float32)
    if SOFTCAP:
        x = tl.where(live, softcap * _tanh(x / softcap), other)
    return x


@triton.jit
def _exponent(x, top, scale):
    """Return (x - top) * scale, an exponent of two, clamped at -200.

    exp2 of that is 0 already; the clamp avoids 0 * -inf.
    """
    return tl.maximum((x - top) * scale, -200.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _fold(x, top, total, weighted, scale, ENTROPY: tl.constexpr):
    """Add logits [G, VECTOR] to their groups' (max, sum e, sum e u) [G], u = (x - max) * scale.

    A group is what one thread loads at a time: threads exchange nothing before the row's end.
    """
    new_top = tl.maximum(top, tl.max(x, 1))
    # with nothing but -inf so far, inf - inf is avoided
    shift = tl.where(new_top == -float("inf"), 0.0, new_top)
    drop = _exponent(top, shift, scale)
    keep = tl.exp2(drop)
    u = _exponent(x, shift[:, None], scale)
    e = tl.exp2(u)
    if ENTROPY:
        weighted = keep * (weighted + drop * total) + tl.sum(e * u, 1)
    return new_top, keep * total + tl.sum(e, 1), weighted


@triton.jit
def _row_statistics(
    x_ptr,  # start of the row
    columns,
    label,  # in this shard's columns, or outside
    scale,  # log2(e) / temperature
    softcap,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return (max, sum e, sum e (x - max) / T, x[label] or -inf)."""
    GROUPS: tl.constexpr = BLOCK // VECTOR
    lanes = tl.arange(0, GROUPS)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    nothing = tl.zeros([GROUPS], dtype=tl.float32)
    top, total, weighted = nothing - float("inf"), nothing, nothing
    owned = (label >= 0) & (label < columns)
    target = _load_logits(x_ptr + label, owned, -float("inf"), softcap, SOFTCAP)
    head = tl.minimum(head_length(x_ptr, VECTOR), columns)
    blocks = (columns - head) // BLOCK
    for edge in range(2):  # the head, then the tail
        start = tl.where(edge == 0, 0, head + blocks * BLOCK)
        end = tl.where(edge == 0, head, columns)
        if start < end:
            at = start + lanes
            x = _load_logits(x_ptr + at, at < end, -float("inf"), softcap, SOFTCAP)
            top, total, weighted = _fold(x, top, total, weighted, scale, ENTROPY)
    aligned = tl.multiple_of(x_ptr + head, 16)
    for i in range(blocks):
        x = tl.load(aligned + i * BLOCK + lanes).to(tl.float32)
        if SOFTCAP:
            x = softcap * _tanh(x / softcap)
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
    stats_ptr,  # [4, N] fp32 out, rows as SoftmaxStatistic
    rows,
    length,
    stride_b,
    stride_l,
    vocab_start,
    columns,
    scale,
    softcap,
    MASKED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ON_DEVICE: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    scale = scalar(scale, ON_DEVICE)
    if SOFTCAP:
        softcap = scalar(softcap, ON_DEVICE)
    # a masked row's statistics: finite, and never used
    top, total, weighted, target = 0.0, 1.0, 0.0, 0.0
    keep = True
    if MASKED:
        keep = tl.load(mask_ptr + row) != 0
    if keep:
        label = tl.load(labels_ptr + row) - vocab_start
        start = row_start(x_ptr, row, length, stride_b, stride_l)
        top, total, weighted, target = _row_statistics(
            start, columns, label, scale, softcap, SOFTCAP, True, VECTOR, BLOCK
        )
    stats_ptr += row
    tokens = rows.to(tl.int64)
    tl.store(stats_ptr + tokens * ROW_MAX, top)
    tl.store(stats_ptr + tokens * ROW_SUM, total)
    tl.store(stats_ptr + tokens * WEIGHTED, weighted)
    tl.store(stats_ptr + tokens * TARGET, target)


@jit("length", "stride_b", "stride_l", "vocab_start", "columns")
def _forward_kernel(
    x_ptr,  # [B, L, V] logits
    labels_ptr,  # [N] int64
    mask_ptr,  # [N] bool, or unused
    ref_ptr,  # [N] fp32 reference log-probs, or unused
    logprobs_ptr,  # [N] fp32 out
    entropy_ptr,  # [N] fp32 out
    logsumexp_ptr,  # [N] fp32 out
    kl_ptr,  # [N] fp32 out
    top_ptr,  # [N] fp32 out
    total_ptr,  # [N] fp32 out
    length,
    stride_b,
    stride_l,
    vocab_start,
    columns,
    temperature,
    scale,
    softcap,
    MASKED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ON_DEVICE: tl.constexpr,
    ENTROPY: tl.constexpr,
    KL: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    scale = scalar(scale, ON_DEVICE)
    temperature = scalar(temperature, ON_DEVICE)
    if SOFTCAP:
        softcap = scalar(softcap, ON_DEVICE)
    logprob, entropy, logsumexp, kl, top, total = 0.0, 0.0, 0.0, 0.0, 0.0, 1.0
    keep = True
    if MASKED:
        keep = tl.load(mask_ptr + row) != 0
    if keep:
        label = tl.load(labels_ptr + row) - vocab_start
        start = row_start(x_ptr, row, length, stride_b, stride_l)
        top, total, weighted, target = _row_statistics(
            start, columns, label, scale, softcap, SOFTCAP, ENTROPY, VECTOR, BLOCK
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
def _gradient(x, terms, LABEL: tl.constexpr, ENTROPY: tl.constexpr, SOFTCAP: tl.constexpr):
    """Return p (g_lse - g_lp) - g_H p (log p + H), fp32, with p = exp2((x - max) scale) / sum.

    LABEL adds g_lp. With a softcap, the derivative of the capping is multiplied in.
    """
    top, scale, inverse, to_label, to_p, to_h, shift, softcap = terms
    x = x.to(tl.float32)
    bent = x
    if SOFTCAP:
        bent = _tanh(x / softcap)
        x = softcap * bent
    u = _exponent(x, top, scale)
    p = tl.exp2(u) * inverse
    d = p * (to_p - to_h * (u * LN2 + shift)) if ENTROPY else p * to_p
    if LABEL:
        d = to_label + d
    if SOFTCAP:
        d *= (1.0 - bent) * (1.0 + bent)
    return d


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
    top_ptr,  # [N] fp32, of the complete vocabulary
    total_ptr,  # [N] fp32, of the complete vocabulary
    entropy_ptr,  # [N] fp32, or unused
    grad_logprob_ptr,  # [N] fp32, or unused
    grad_entropy_ptr,  # [N] fp32, or unused
    grad_logsumexp_ptr,  # [N] fp32, or unused
    length,
    stride_b,
    stride_l,
    out_stride_b,
    out_stride_l,
    vocab_start,
    columns,
    width,
    scale,
    inverse_temperature,
    softcap,
    MASKED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ON_DEVICE: tl.constexpr,
    LOGPROB: tl.constexpr,
    ENTROPY: tl.constexpr,
    LOGSUMEXP: tl.constexpr,
    SAME_ALIGNMENT: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    out_ptr = row_start(out_ptr, row, length, out_stride_b, out_stride_l)
    if MASKED:  # noqa: SIM102  (a constexpr, then a device value)
        if tl.load(mask_ptr + row) == 0:
            fill_zero(out_ptr, width, VECTOR, BLOCK)
            return
    scale = scalar(scale, ON_DEVICE)
    inverse_temperature = scalar(inverse_temperature, ON_DEVICE)
    if SOFTCAP:
        softcap = scalar(softcap, ON_DEVICE)
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
    terms = (top, scale, 1.0 / total, to_label, to_p, to_h, shift, softcap)
    if LOGPROB:
        at_label = tl.load(x_ptr + label, mask=owned, other=-float("inf"))
        tl.debug_barrier()  # every thread has read it before any writes to the row
    lanes = tl.arange(0, BLOCK)
    head = tl.minimum(head_length(x_ptr, VECTOR), columns)
    few = tl.arange(0, VECTOR)
    x_head = tl.load(x_ptr + few, mask=few < head, other=-float("inf"))
    d_head = _gradient(x_head, terms, False, ENTROPY, SOFTCAP)
    tl.store(out_ptr + few, d_head.to(out_ptr.dtype.element_ty), mask=few < head)
    blocks = (columns - head) // BLOCK
    aligned = tl.multiple_of(x_ptr + head, 16)
    out_aligned = out_ptr + head
    if SAME_ALIGNMENT:
        out_aligned = tl.multiple_of(out_aligned, 16)
    for i in range(blocks):
        x = tl.load(aligned + i * BLOCK + lanes)
        d = _gradient(x, terms, False, ENTROPY, SOFTCAP)
        tl.store(out_aligned + i * BLOCK + lanes, d.to(out_ptr.dtype.element_ty))
    column = head + blocks * BLOCK + lanes
    x = tl.load(x_ptr + column, mask=column < columns, other=-float("inf"))
    d = _gradient(x, terms, False, ENTROPY, SOFTCAP)
    tl.store(out_ptr + column, d.to(out_ptr.dtype.element_ty), mask=column < columns)
    if columns < width:
        fill_zero(out_ptr + columns, width - columns, VECTOR, BLOCK)
    if LOGPROB:
        tl.debug_barrier()  # the label's element was written above without its own term
        d = _gradient(at_label, terms, True, ENTROPY, SOFTCAP)
        tl.store(out_ptr + label, d.to(out_ptr.dtype.element_ty), mask=owned)


def logprob_statistics(
    rows: Tensor,
    labels: Tensor,
    mask: Tensor | None,
    temperature: Number,
    vocab_start: int,
    columns: int,
    softcap: Number | None = None,
) -> Tensor:
    """Return the statistics [4, N] fp32 of rows [B, L, V], for labels and mask [N]."""
    tokens = labels.numel()
    stats = torch.empty(len(SoftmaxStatistic), tokens, dtype=torch.float32, device=rows.device)
    if tokens:
        _statistics_kernel[(tokens,)](
            rows,
            labels,
            rows if mask is None else mask,
            stats,
            tokens,
            rows.shape[1],
            *rows.stride()[:2],
            vocab_start,
            columns,
            LOG2E / temperature,
            0.0 if softcap is None else softcap,
            MASKED=mask is not None,
            SOFTCAP=softcap is not None,
            ON_DEVICE=on_device(temperature),
            **row_options(rows, columns, softcap is not None),
        )
    return stats


def logprob_forward(
    rows: Tensor,
    labels: Tensor,
    mask: Tensor | None,
    ref_logprobs: Tensor | None,
    temperature: Number,
    with_entropy: bool,
    vocab_start: int,
    columns: int,
    softcap: Number | None = None,
) -> RowResults:
    """Return the results [N] in one launch; entropy and kl are [0] unless requested."""
    tokens = labels.numel()

    def out(requested: bool = True) -> Tensor:
        return torch.empty(tokens if requested else 0, dtype=torch.float32, device=rows.device)

    kl = out(ref_logprobs is not None)
    results = RowResults(out(), out(with_entropy), out(), kl, out(), out())
    if tokens:
        _forward_kernel[(tokens,)](
            rows,
            labels,
            rows if mask is None else mask,
            rows if ref_logprobs is None else ref_logprobs,
            *results,
            rows.shape[1],
            *rows.stride()[:2],
            vocab_start,
            columns,
            temperature,
            LOG2E / temperature,
            0.0 if softcap is None else softcap,
            MASKED=mask is not None,
            SOFTCAP=softcap is not None,
            ON_DEVICE=on_device(temperature),
            ENTROPY=with_entropy,
            KL=ref_logprobs is not None,
            **row_options(rows, columns, softcap is not None),
        )
    return results


def logprob_backward(
    rows: Tensor,
    labels: Tensor,
    mask: Tensor | None,
    saved: SavedRow,
    upstream: TokenGrads,
    temperature: Number,
    vocab_start: int,
    columns: int,
    out: Tensor,
    softcap: Number | None = None,
) -> None:
    """Write the gradient of rows [B, L, V] into `out`, which may be `rows`.

    The torch implementation has the equation.
    """
    unused = rows
    if labels.numel():
        _backward_kernel[(labels.numel(),)](
            rows,
            out,
            labels,
            unused if mask is None else mask,
            *(unused if t is None else t for t in (*saved, *upstream)),
            rows.shape[1],
            *rows.stride()[:2],
            *out.stride()[:2],
            vocab_start,
            columns,
            rows.shape[2],
            LOG2E / temperature,
            1 / temperature,
            0.0 if softcap is None else softcap,
            MASKED=mask is not None,
            SOFTCAP=softcap is not None,
            ON_DEVICE=on_device(temperature),
            LOGPROB=upstream.grad_logprobs is not None,
            ENTROPY=upstream.grad_entropy is not None,
            LOGSUMEXP=upstream.grad_logsumexp is not None,
            SAME_ALIGNMENT=same_alignment(rows, out),
            **row_options(rows, columns, softcap is not None),
        )
