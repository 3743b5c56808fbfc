"""Per-token KL: estimates from sampled log-probs, and exact values from two sets of logits.

Out of scope: reductions; average with `masked_mean`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from fastrlhf.ops import checks, collectives, layouts
from fastrlhf.ops.dispatch import BACKENDS, Kernel
from fastrlhf.ops.layouts import KLStatistic
from fastrlhf.ops.registry import Context, Gradients, custom_op
from fastrlhf.ops.rows import as_rows, flat, row_blocks, vocab_shard
from fastrlhf.ops.scalars import Number, pack, unpack

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

ESTIMATORS = ("k1", "abs", "k2", "k3")


def token_kl(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    estimator: str = "k1",
    mask: Tensor | None = None,
) -> Tensor:
    """Estimate KL(pi || ref) per token from the log-probs of sampled tokens.

    With d = logprobs - ref_logprobs, "k1": d; "abs": |d|; "k2": d^2 / 2; "k3": exp(-d) - 1 + d
    (non-negative and, like k1, unbiased; Schulman 2020, "Approximating KL divergence"). Inputs of
    any shape [...], result fp32; differentiable in both inputs. mask [...] bool: False positions
    give exactly 0 and no gradient, whatever they hold.
    """
    checks.floating("logprobs", logprobs)
    checks.like("ref_logprobs", ref_logprobs, logprobs.shape, logprobs.device)
    checks.choice("estimator", estimator, ESTIMATORS)
    dtype = checks.compute_dtype(logprobs)
    logp, ref = logprobs.to(dtype), ref_logprobs.to(dtype)
    if mask is not None:
        checks.like("mask", mask, logprobs.shape, logprobs.device, "bool")
        logp, ref = torch.where(mask, logp, 0.0), torch.where(mask, ref, 0.0)
    d = logp - ref
    if estimator == "k1":
        return d
    if estimator == "abs":
        return d.abs()
    if estimator == "k2":
        return 0.5 * d * d
    return torch.expm1(-d) + d


def kl_slope(d: Tensor, estimator: str) -> Tensor:
    """Return the derivative of an estimate in d = logprobs - ref_logprobs."""
    if estimator == "k1":
        return torch.ones_like(d)
    if estimator == "abs":
        return d.sign()
    return d if estimator == "k2" else -torch.expm1(-d)


def logits_kl_ref(
    logits: Tensor, ref_logits: Tensor, mask: Tensor | None = None, temperature: Number = 1.0
) -> Tensor:
    """Compute `logits_kl` in plain torch and autograd, holding several [..., V] tensors."""
    dtype = checks.compute_dtype(logits)
    x, y = logits.to(dtype), ref_logits.to(dtype)
    if mask is not None:
        x, y = torch.where(mask[..., None], x, 0.0), torch.where(mask[..., None], y, 0.0)
    logp, logq = torch.log_softmax(x / temperature, -1), torch.log_softmax(y / temperature, -1)
    p = logp.exp()
    kl = (p * torch.where(p > 0, logp - logq, 0.0)).sum(-1)
    return kl if mask is None else torch.where(mask, kl, 0.0)


# --- kernels: rows are [B, L, V] views, per-token tensors are flat [N], N = B * L -----------------


class SavedKL(NamedTuple):
    """Results of the forward that the gradient needs."""

    stats: Tensor
    """[5, N], of the complete vocabulary, laid out as KLStatistic."""
    kl: Tensor
    """[...] per token."""


def _statistics_torch(
    rows: Tensor, ref_rows: Tensor, mask: Tensor | None, temperature: Number, columns: int
) -> Tensor:
    """Return the statistics [5, N] of this shard, laid out as KLStatistic."""
    dtype = checks.compute_dtype(rows)
    stats = rows.new_zeros(len(KLStatistic), *rows.shape[:2], dtype=dtype)
    keep = None if mask is None else mask.view(rows.shape[:2])
    for at in row_blocks(rows, columns):
        x, y = rows[at][..., :columns].to(dtype), ref_rows[at][..., :columns].to(dtype)
        if keep is not None:
            x, y = (t.masked_fill(~keep[at][..., None], 0.0) for t in (x, y))
        (row_max, e), (ref_max, f) = _shifted_exp(x, temperature), _shifted_exp(y, temperature)
        stats[:, at[0], at[1]] = layouts.stack(
            KLStatistic,
            row_max=row_max,
            row_sum=e.sum(-1),
            ref_max=ref_max,
            ref_sum=f.sum(-1),
            cross=torch.where(e == 0, 0.0, e * (x - y)).sum(-1) / temperature,
        )
    return stats.view(len(KLStatistic), -1)


def _shifted_exp(x: Tensor, temperature: Number) -> tuple[Tensor, Tensor]:
    if x.shape[-1] == 0:  # a shard that holds only padding
        return x.new_full(x.shape[:-1], -torch.inf), x
    top = x.amax(-1)
    shift = torch.where(top == -torch.inf, 0.0, top)
    return top, torch.exp((x - shift[..., None]) / temperature)


def _backward_torch(
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
    """Write the gradients of the logits into `out` and of the reference logits into `ref_out`.

    d/dx_j = g p_j (log p_j - log q_j - kl) / T,   d/dy_j = g (q_j - p_j) / T
    """
    dtype, lead = checks.compute_dtype(rows), rows.shape[:2]
    stats = saved.stats.view(len(KLStatistic), *lead)
    row_max, row_sum = stats[KLStatistic.ROW_MAX], stats[KLStatistic.ROW_SUM]
    ref_max, ref_sum = stats[KLStatistic.REF_MAX], stats[KLStatistic.REF_SUM]
    g = grad.view(lead) if mask is None else torch.where(mask, grad, 0.0).view(lead)
    kl = saved.kl.view(lead)
    for at in row_blocks(rows, columns):
        u = (rows[at][..., :columns].to(dtype) - row_max[at][..., None]) / temperature
        w = (ref_rows[at][..., :columns].to(dtype) - ref_max[at][..., None]) / temperature
        p, q = u.exp() / row_sum[at][..., None], w.exp() / ref_sum[at][..., None]
        keep = None if mask is None else mask.view(lead)[at][..., None]
        scale = (g[at] / temperature)[..., None]
        if out is not None:
            shift = (ref_sum[at].log() - row_sum[at].log() - kl[at])[..., None]
            d = torch.where(p == 0, 0.0, p * (u - w + shift)) * scale
            _store(out[at], d, keep, columns)
        if ref_out is not None:
            _store(ref_out[at], (q - p) * scale, keep, columns)


def _store(out: Tensor, d: Tensor, keep: Tensor | None, columns: int) -> None:
    out[..., :columns] = d if keep is None else torch.where(keep, d, 0.0)
    out[..., columns:] = 0


STATISTICS = Kernel("logits_kl_statistics", _statistics_torch, "fastrlhf.kernels.logits_kl")
BACKWARD = Kernel("logits_kl_backward", _backward_torch, "fastrlhf.kernels.logits_kl")


def _finish(stats: Tensor, mask: Tensor | None, temperature: Number) -> Tensor:
    """Return KL [N] = E_p[(x - y) / T] - lse(x / T) + lse(y / T) from the statistics [5, N]."""
    row_sum, ref_sum = stats[KLStatistic.ROW_SUM], stats[KLStatistic.REF_SUM]
    gap = stats[KLStatistic.ROW_MAX] - stats[KLStatistic.REF_MAX]
    cross = stats[KLStatistic.CROSS] / row_sum
    kl = cross - gap / temperature - row_sum.log() + ref_sum.log()
    return kl if mask is None else torch.where(mask, kl, 0.0)


def _combine(stats: Tensor, temperature: Number) -> Tensor:
    """Merge the shards' statistics [R, 5, N], in rank order, into the vocabulary's [5, N]."""
    row_max, scale = _common_scale(stats, KLStatistic.ROW_MAX, KLStatistic.ROW_SUM, temperature)
    ref_max, ref_scale = _common_scale(stats, KLStatistic.REF_MAX, KLStatistic.REF_SUM, temperature)
    cross = torch.where(scale == 0, 0.0, scale * stats[:, KLStatistic.CROSS])
    return layouts.stack(
        KLStatistic,
        row_max=row_max,
        row_sum=(scale * stats[:, KLStatistic.ROW_SUM]).sum(0),
        ref_max=ref_max,
        ref_sum=(ref_scale * stats[:, KLStatistic.REF_SUM]).sum(0),
        cross=cross.sum(0),
    )


def _common_scale(
    stats: Tensor, maximum: KLStatistic, total: KLStatistic, temperature: Number
) -> tuple[Tensor, Tensor]:
    """Return the maximum [N] over the shards, and the factors [R, N] of their sums."""
    top = stats[:, maximum].amax(0)
    scale = torch.exp((stats[:, maximum] - top) / temperature)
    return top, torch.where(stats[:, total] == 0, 0.0, scale)


# --- the op ---------------------------------------------------------------------------------------


@custom_op("logits_kl")
def _logits_kl(
    logits: Tensor,
    ref_logits: Tensor,
    mask: Tensor | None,
    scalars: Tensor,
    columns: int,
    group_name: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    rows, ref_rows, keep = as_rows(logits), as_rows(ref_logits), flat(mask)
    (temperature,) = unpack(scalars)
    statistics = STATISTICS.implementation(rows, backend)
    stats = statistics(rows, ref_rows, keep, temperature, columns)
    if group_name:
        stats = _combine(collectives.gather_stack(stats, group_name), temperature)
    return _finish(stats, keep, temperature).view(logits.shape[:-1]), stats


@_logits_kl.register_fake
def _(logits: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    dtype, lead = checks.compute_dtype(logits), logits.shape[:-1]
    tokens = math.prod(lead)  # Size.numel() would specialize on the length
    stats = logits.new_empty((len(KLStatistic), tokens), dtype=dtype)
    return logits.new_empty(lead, dtype=dtype), stats


@custom_op("logits_kl_backward")
def _logits_kl_backward(
    logits: Tensor,
    ref_logits: Tensor,
    mask: Tensor | None,
    saved: SavedKL,
    grad: Tensor,
    scalars: Tensor,
    columns: int,
    backend: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    """Return the gradients of logits and ref_logits, empty [0] where `needs` is False."""
    rows, ref_rows = as_rows(logits), as_rows(ref_logits)
    out, ref_out = (
        torch.empty_like(x) if needed else None
        for x, needed in zip((rows, ref_rows), needs, strict=True)
    )
    backward = BACKWARD.implementation(rows, backend)
    saved, (temperature,) = SavedKL(saved.stats, flat(saved.kl)), unpack(scalars)
    backward(rows, ref_rows, flat(mask), saved, flat(grad), temperature, columns, out, ref_out)
    return (
        logits.new_empty(0) if out is None else out.view(logits.shape),
        ref_logits.new_empty(0) if ref_out is None else ref_out.view(logits.shape),
    )


@_logits_kl_backward.register_fake
def _(
    logits: Tensor,
    ref_logits: Tensor,
    mask: Tensor | None,
    saved: SavedKL,
    grad: Tensor,
    scalars: Tensor,
    columns: int,
    backend: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    def like(x: Tensor, needed: bool) -> Tensor:
        return torch.empty_like(as_rows(x)).view(x.shape) if needed else x.new_empty(0)

    return like(logits, needs[0]), like(ref_logits, needs[1])


class _Context(Context, Protocol):
    columns: int
    backend: str


def _setup(
    ctx: _Context,
    output: tuple[Tensor, Tensor],
    logits: Tensor,
    ref_logits: Tensor,
    mask: Tensor | None,
    scalars: Tensor,
    columns: int,
    group_name: str,
    backend: str,
) -> None:
    kl, stats = output
    ctx.set_materialize_grads(False)
    ctx.columns, ctx.backend = columns, backend
    ctx.save_for_backward(logits, ref_logits, mask, stats, kl, scalars)


def _logits_kl_grad(ctx: _Context, grad: Tensor | None, _: Tensor | None) -> Gradients:
    if grad is None:
        return {}
    logits, ref_logits, mask, stats, kl, scalars = ctx.saved_tensors
    needs = _logits_kl.needs_grad(ctx, "logits", "ref_logits")
    options = (scalars, ctx.columns, ctx.backend, needs)
    d_logits, d_ref_logits = _logits_kl_backward(
        logits, ref_logits, mask, SavedKL(stats, kl), grad.contiguous(), *options
    )
    return {
        "logits": d_logits if needs[0] else None,
        "ref_logits": d_ref_logits if needs[1] else None,
    }


_logits_kl.register_autograd(_logits_kl_grad, _setup)


def logits_kl(
    logits: Tensor,
    ref_logits: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: Number = 1.0,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    group: ProcessGroup | None = None,
    backend: str = "auto",
) -> Tensor:
    """Return the exact KL(pi || ref) per token, sum_j p_j (log p_j - log q_j), fp32 [...].

    p = softmax(logits / T) and q = softmax(ref_logits / T). Differentiable in both inputs:
        d/dx_j = p_j (log p_j - log q_j - KL) / T,   d/dy_j = (q_j - p_j) / T
    logits, ref_logits [..., V] of one dtype; mask [...] bool; `group`, `vocab_start` and
    `vocab_size` as in `logprobs`. One all-gather of five floats per token. Raises ValueError on
    wrong shapes and dtypes.
    """
    checks.floating("logits", logits)
    has_columns = logits.dim() >= 1 and logits.shape[-1] > 0
    checks.require(has_columns, "logits", logits, "shape [..., V] with V above 0")
    fits = isinstance(ref_logits, Tensor) and ref_logits.shape == logits.shape
    fits = fits and ref_logits.dtype == logits.dtype and ref_logits.device == logits.device
    checks.require(fits, "ref_logits", ref_logits, checks.describe(logits))
    if mask is not None:
        checks.like("mask", mask, logits.shape[:-1], logits.device, "bool")
    checks.positive("temperature", temperature)
    checks.choice("backend", backend, BACKENDS)
    shard = vocab_shard(logits.shape[-1], vocab_start, vocab_size, group)
    scalars = pack(logits, temperature)
    kl, _ = _logits_kl(logits, ref_logits, mask, scalars, shard.columns, shard.group_name, backend)
    return kl
