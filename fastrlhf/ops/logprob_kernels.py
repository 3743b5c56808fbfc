"""Kernels over rows of logits: the softmax statistics of each row, and the gradient of its results.

Rows are [B, L, V] views, per-token tensors are flat [N] with N = B * L.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastrlhf.ops import checks, layouts
from fastrlhf.ops.dispatch import Kernel
from fastrlhf.ops.layouts import SoftmaxStatistic
from fastrlhf.ops.rows import row_blocks
from fastrlhf.ops.scalars import Number, pack, unpack


class Softmax(NamedTuple):
    """Scalars of the softmax: softmax(cap(x) / temperature), cap(x) = softcap tanh(x / softcap)."""

    scalars: Tensor
    """[temperature, softcap], see scalars.py"""
    capped: bool

    @staticmethod
    def of(like: Tensor, temperature: Number, softcap: Number | None) -> Softmax:
        checks.positive("temperature", temperature)
        if softcap is None:
            return Softmax(pack(like, temperature, 1.0), False)
        checks.positive("softcap", softcap)
        return Softmax(pack(like, temperature, softcap), True)

    def values(self) -> tuple[Number, Number | None]:
        """Return the temperature, and the softcap or None."""
        temperature, softcap = unpack(self.scalars)
        return temperature, softcap if self.capped else None


class SavedRow(NamedTuple):
    """Results of the forward that the gradient of a row needs, fp32 [...] per token."""

    row_max: Tensor
    row_sum: Tensor
    entropy: Tensor | None
    """Only where the entropy has a gradient."""


class TokenGrads(NamedTuple):
    """Upstream gradients [...] of a row's results, None for 0."""

    grad_logprobs: Tensor | None
    grad_entropy: Tensor | None
    grad_logsumexp: Tensor | None


class RowResults(NamedTuple):
    """Outputs of the forward, fp32, per token; entropy and kl are empty [0] unless requested."""

    logprobs: Tensor
    entropy: Tensor
    logsumexp: Tensor
    kl: Tensor
    row_max: Tensor
    row_sum: Tensor


def _statistics_torch(
    rows: Tensor,
    labels: Tensor,
    mask: Tensor | None,
    temperature: Number,
    vocab_start: int,
    columns: int,
    softcap: Number | None = None,
) -> Tensor:
    """Return the statistics [4, N] of this shard, laid out as SoftmaxStatistic.

    Rows that the mask excludes are read as zeros, whatever they hold. The maximum is that of the
    (capped) logits before the temperature, so that x - max is exact near the maximum at any temperature.
    """
    dtype, lead = checks.compute_dtype(rows), rows.shape[:2]
    stats = torch.zeros(len(SoftmaxStatistic), *lead, dtype=dtype, device=rows.device)
    local = (labels - vocab_start).view(lead)
    keep = None if mask is None else mask.view(lead)
    for at in row_blocks(rows, columns):
        x = rows[at][..., :columns].to(dtype)
        if keep is not None:
            x = x.masked_fill(~keep[at][..., None], 0.0)
        if softcap is not None:
            x = softcap * torch.tanh(x / softcap)
        stats[:, at[0], at[1]] = _block_statistics(x, local[at], temperature)
    return stats.view(len(SoftmaxStatistic), -1)


def _block_statistics(x: Tensor, local: Tensor, temperature: Number) -> Tensor:
    columns = x.shape[-1]
    if columns == 0:  # a shard that holds only padding
        none, zero = x.new_full(x.shape[:-1], -torch.inf), x.new_zeros(x.shape[:-1])
        return layouts.stack(
            SoftmaxStatistic, row_max=none, row_sum=zero, weighted=zero, target=none
        )
    top = x.amax(-1)
    shift = torch.where(top == -torch.inf, 0.0, top)
    u = (x - shift[..., None]) / temperature
    e = u.exp()
    weighted = torch.where(e == 0, 0.0, e * u).sum(-1)  # 0 * -inf is 0 here: lim x log x
    owned = (local >= 0) & (local < columns)
    target = x.gather(-1, local.clamp(0, columns - 1)[..., None]).squeeze(-1)
    return layouts.stack(
        SoftmaxStatistic,
        row_max=top,
        row_sum=e.sum(-1),
        weighted=weighted,
        target=torch.where(owned, target, -torch.inf),
    )


def _backward_torch(
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
    """Write the gradient of the logits into `out`, which may be `rows`.

    d/dx_j = (g_lp (1[j = label] - p_j) + g_lse p_j - g_H p_j (log p_j + H)) / T, times 1 - tanh^2(
    x_j / softcap) if capped.
    """
    dtype, lead = checks.compute_dtype(rows), rows.shape[:2]
    zero = torch.zeros_like(saved.row_max)
    g_lp, g_h, g_lse = (zero if g is None else g.to(dtype) for g in upstream)
    if mask is not None:
        g_lp, g_h, g_lse = (torch.where(mask, g, 0.0) for g in (g_lp, g_h, g_lse))
    # log p_j + H = (x_j - max) / T + shift
    shift = zero if saved.entropy is None else saved.entropy - saved.row_sum.log()
    local = (labels - vocab_start).view(lead)
    owned = ((local >= 0) & (local < columns)).view(lead)
    per_row = (saved.row_max, saved.row_sum, g_lp, g_h, g_lse - g_lp, shift)
    views = [t.view(lead)[..., None] for t in per_row]
    for at in row_blocks(rows, columns):
        top, total, to_label, to_h, to_p, offset = (t[at] for t in views)
        x = rows[at][..., :columns].to(dtype)
        bent = None if softcap is None else torch.tanh(x / softcap)
        x = x if bent is None or softcap is None else softcap * bent
        u = (x - top) / temperature
        p = u.exp() / total
        d = p * to_p
        if upstream.grad_entropy is not None:
            d = d - torch.where(p == 0, 0.0, p * (u + offset)) * to_h
        if columns:
            label = local[at].clamp(0, columns - 1)[..., None]
            d.scatter_add_(-1, label, torch.where(owned[at][..., None], to_label, 0.0))
        d = d / temperature
        if bent is not None:
            d = d * (1 - bent.square())
        if mask is not None:
            d = torch.where(mask.view(lead)[at][..., None], d, 0.0)
        out[at][..., :columns] = d
        out[at][..., columns:] = 0


def _refuse_softcap(softcap: Number | None) -> None:
    if softcap is not None:
        raise RuntimeError(
            "backend 'cuda' cannot run logprob_statistics: its kernels have no softcap:"
            " pass backend='auto'"
        )


def _statistics_cuda(
    rows: Tensor,
    labels: Tensor,
    mask: Tensor | None,
    temperature: Number,
    vocab_start: int,
    columns: int,
    softcap: Number | None = None,
) -> Tensor:
    _refuse_softcap(softcap)
    return torch.ops.fastrlhf_cuda.logprob_statistics(
        rows, labels, mask, float(temperature), vocab_start, columns
    )


def forward_backward_cuda(
    rows: Tensor,
    labels: Tensor,
    mask: Tensor | None,
    upstream: TokenGrads,
    temperature: Number,
    vocab_start: int,
    columns: int,
    out: Tensor,
) -> Tensor:
    """Write the gradient of `rows` into `out` and return the statistics, in one read."""
    return torch.ops.fastrlhf_cuda.logprob_forward_backward(
        rows, labels, mask, *upstream, float(temperature), vocab_start, columns, out
    )


def _backward_cuda(
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
    """Recompute the statistics in the one read of the row that the gradient needs anyway."""
    _refuse_softcap(softcap)
    forward_backward_cuda(rows, labels, mask, upstream, temperature, vocab_start, columns, out)


STATISTICS = Kernel(
    "logprob_statistics", _statistics_torch, "fastrlhf.kernels.logprob", _statistics_cuda
)
BACKWARD = Kernel("logprob_backward", _backward_torch, "fastrlhf.kernels.logprob", _backward_cuda)


def combine_statistics(stats: Tensor, temperature: Number) -> Tensor:
    """Merge the shards' statistics [R, 4, N], in rank order, into the vocabulary's [4, N]."""
    maxima = stats[:, SoftmaxStatistic.ROW_MAX]
    sums = stats[:, SoftmaxStatistic.ROW_SUM]
    row_max = maxima.amax(0)
    shift = (maxima - row_max) / temperature
    scale = torch.where(sums == 0, 0.0, shift.exp())
    moved = scale * (stats[:, SoftmaxStatistic.WEIGHTED] + shift * sums)
    return layouts.stack(
        SoftmaxStatistic,
        row_max=row_max,
        row_sum=(scale * sums).sum(0),
        weighted=torch.where(scale == 0, 0.0, moved).sum(0),
        target=stats[:, SoftmaxStatistic.TARGET].amax(0),
    )


def finish_statistics(
    stats: Tensor, mask: Tensor | None, temperature: Number
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (logprobs, entropy, logsumexp), each [N], from the vocabulary's statistics [4, N]."""
    row_max, row_sum = stats[SoftmaxStatistic.ROW_MAX], stats[SoftmaxStatistic.ROW_SUM]
    log_sum = row_sum.log()
    logp = (stats[SoftmaxStatistic.TARGET] - row_max) / temperature - log_sum
    entropy = log_sum - stats[SoftmaxStatistic.WEIGHTED] / row_sum
    lse = row_max / temperature + log_sum
    if mask is None:
        return logp, entropy, lse
    logp, entropy, lse = (torch.where(mask, t, 0.0) for t in (logp, entropy, lse))
    return logp, entropy, lse


def results_from(
    stats: Tensor,
    mask: Tensor | None,
    ref_logprobs: Tensor | None,
    temperature: Number,
    with_entropy: bool,
) -> RowResults:
    """Return the per-token results [N] of the vocabulary's statistics [4, N]."""
    logp, entropy, lse = finish_statistics(stats, mask, temperature)
    kl = stats.new_empty(0)
    if ref_logprobs is not None:
        kl = logp - ref_logprobs
        kl = kl if mask is None else torch.where(mask, kl, 0.0)
    return RowResults(
        logprobs=logp,
        entropy=entropy if with_entropy else stats.new_empty(0),
        logsumexp=lse,
        kl=kl,
        # clones: the outputs of a custom op may not share memory
        row_max=stats[SoftmaxStatistic.ROW_MAX].clone(),
        row_sum=stats[SoftmaxStatistic.ROW_SUM].clone(),
    )
