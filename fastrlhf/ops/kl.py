"""Per-token KL estimates from sampled log-probs, and the exact per-token KL from two sets of logits.

Left out on purpose: reductions. Average with `masked_mean`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastrlhf.ops import checks, collectives
from fastrlhf.ops.dispatch import BACKENDS, Kernel
from fastrlhf.ops.registry import custom_op, register_autograd, register_fake
from fastrlhf.ops.rows import as_rows, flat, local_columns, row_blocks

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

ESTIMATORS = ("k1", "abs", "k2", "k3")


def token_kl(logprobs: Tensor, ref_logprobs: Tensor, estimator: str = "k1") -> Tensor:
    """Estimate KL(pi || ref) per token from the log-probs of sampled tokens, with d = logprobs - ref_logprobs.

    "k1": d; "abs": |d|; "k2": d^2 / 2; "k3": exp(-d) - 1 + d (non-negative and, like k1, unbiased; Schulman 2020,
    "Approximating KL divergence"). Any shape [...]; fp32; differentiable in both inputs.
    """
    checks.floating("logprobs", logprobs)
    checks.like("ref_logprobs", ref_logprobs, logprobs.shape, logprobs.device)
    checks.choice("estimator", estimator, ESTIMATORS)
    dtype = checks.compute_dtype(logprobs)
    d = logprobs.to(dtype) - ref_logprobs.to(dtype)
    if estimator == "k1":
        return d
    if estimator == "abs":
        return d.abs()
    if estimator == "k2":
        return 0.5 * d * d
    return torch.expm1(-d) + d


def logits_kl_ref(
    logits: Tensor, ref_logits: Tensor, mask: Tensor | None = None, temperature: float = 1.0
) -> Tensor:
    """Plain torch: sum_j p_j (log p_j - log q_j), through autograd, holding several [..., V] tensors."""
    dtype = checks.compute_dtype(logits)
    x, y = logits.to(dtype), ref_logits.to(dtype)
    if mask is not None:
        x, y = torch.where(mask[..., None], x, 0.0), torch.where(mask[..., None], y, 0.0)
    logp, logq = torch.log_softmax(x / temperature, -1), torch.log_softmax(y / temperature, -1)
    p = logp.exp()
    kl = (p * torch.where(p > 0, logp - logq, 0.0)).sum(-1)
    return kl if mask is None else torch.where(mask, kl, 0.0)


# --- raw bodies: rows are [B, L, V] views, per-token tensors are flat [N], N = B * L ---------------------------------


def _statistics_torch(
    rows: Tensor, ref_rows: Tensor, mask: Tensor | None, temperature: float, columns: int
) -> Tensor:
    """Per token (max x, sum e, max y, sum f, sum e (x - y) / T), e = exp((x - max x) / T), f likewise: [5, N]."""
    dtype = checks.compute_dtype(rows)
    stats = rows.new_zeros(5, *rows.shape[:2], dtype=dtype)
    mask2 = None if mask is None else mask.view(rows.shape[:2])
    for at in row_blocks(rows, columns):
        x, y = rows[at][..., :columns].to(dtype), ref_rows[at][..., :columns].to(dtype)
        if mask2 is not None:
            x, y = (t.masked_fill(~mask2[at][..., None], 0.0) for t in (x, y))
        (max_x, e), (max_y, f) = _shifted_exp(x, temperature), _shifted_exp(y, temperature)
        cross = torch.where(e == 0, 0.0, e * (x - y)).sum(-1) / temperature
        stats[:, at[0], at[1]] = torch.stack([max_x, e.sum(-1), max_y, f.sum(-1), cross])
    return stats.view(5, -1)


def _shifted_exp(x: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    if x.shape[-1] == 0:  # a shard that holds only padding
        return x.new_full(x.shape[:-1], -torch.inf), x
    top = x.amax(-1)
    shift = torch.where(top == -torch.inf, 0.0, top)
    return top, torch.exp((x - shift[..., None]) / temperature)


def _backward_torch(
    rows: Tensor, ref_rows: Tensor, mask: Tensor | None, stats: Tensor, kl: Tensor, grad: Tensor, temperature: float,
    columns: int, out: Tensor | None, ref_out: Tensor | None,
) -> None:  # fmt: skip
    """d/dx_j = g p_j (log p_j - log q_j - kl) / T into `out`; d/dy_j = g (q_j - p_j) / T into `ref_out`."""
    dtype, lead = checks.compute_dtype(rows), rows.shape[:2]
    max_x, sum_x, max_y, sum_y = stats[:4].view(4, *lead)
    g = grad.view(lead) if mask is None else torch.where(mask, grad, 0.0).view(lead)
    kl2 = kl.view(lead)
    for at in row_blocks(rows, columns):
        u = (rows[at][..., :columns].to(dtype) - max_x[at][..., None]) / temperature
        w = (ref_rows[at][..., :columns].to(dtype) - max_y[at][..., None]) / temperature
        p, q = u.exp() / sum_x[at][..., None], w.exp() / sum_y[at][..., None]
        keep = None if mask is None else mask.view(lead)[at][..., None]
        if out is not None:
            shift = (sum_y[at].log() - sum_x[at].log() - kl2[at])[..., None]
            d = torch.where(p == 0, 0.0, p * (u - w + shift)) * (g[at] / temperature)[..., None]
            _store(out[at], d, keep, columns)
        if ref_out is not None:
            _store(ref_out[at], (q - p) * (g[at] / temperature)[..., None], keep, columns)


def _store(out: Tensor, d: Tensor, keep: Tensor | None, columns: int) -> None:
    out[..., :columns] = d if keep is None else torch.where(keep, d, 0.0)
    out[..., columns:] = 0


STATISTICS = Kernel("logits_kl_statistics", _statistics_torch, "fastrlhf.kernels.logits_kl")
BACKWARD = Kernel("logits_kl_backward", _backward_torch, "fastrlhf.kernels.logits_kl")


def _finish(
    stats: Tensor, mask: Tensor | None, temperature: float, group_name: str
) -> tuple[Tensor, Tensor]:
    """Combine the ranks' statistics in rank order; KL = E_p[(x - y) / T] - lse(x / T) + lse(y / T)."""
    if group_name:
        stats = _combine(collectives.gather_stack(stats, group_name), temperature)
    max_x, sum_x, max_y, sum_y, cross = stats
    kl = cross / sum_x - (max_x - max_y) / temperature - sum_x.log() + sum_y.log()
    return stats, kl if mask is None else torch.where(mask, kl, 0.0)


def _combine(stats: Tensor, temperature: float) -> Tensor:
    """[R, 5, N] -> [5, N]."""
    max_x, max_y = stats[:, 0].amax(0), stats[:, 2].amax(0)
    scale = torch.where(stats[:, 1] == 0, 0.0, torch.exp((stats[:, 0] - max_x) / temperature))
    ref_scale = torch.where(stats[:, 3] == 0, 0.0, torch.exp((stats[:, 2] - max_y) / temperature))
    cross = torch.where(scale == 0, 0.0, scale * stats[:, 4])
    return torch.stack(
        [max_x, (scale * stats[:, 1]).sum(0), max_y, (ref_scale * stats[:, 3]).sum(0), cross.sum(0)]
    )


@custom_op(
    "logits_kl",
    "(Tensor logits, Tensor ref_logits, Tensor? mask, float temperature, int columns, str group_name,"
    " str backend) -> (Tensor, Tensor)",
)
def _logits_kl(
    logits: Tensor, ref_logits: Tensor, mask: Tensor | None, temperature: float, columns: int, group_name: str,
    backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    rows, ref_rows = as_rows(logits), as_rows(ref_logits)
    keep = flat(mask)
    stats = STATISTICS.on(rows, backend)(rows, ref_rows, keep, temperature, columns)
    stats, kl = _finish(stats, keep, temperature, group_name)
    return kl.view(logits.shape[:-1]), stats


@register_fake(_logits_kl)
def _(logits, ref_logits, mask, temperature, columns, group_name, backend):  # type: ignore[no-untyped-def]
    dtype, lead = checks.compute_dtype(logits), logits.shape[:-1]
    return logits.new_empty(lead, dtype=dtype), logits.new_empty((5, lead.numel()), dtype=dtype)


@custom_op(
    "logits_kl_backward",
    "(Tensor logits, Tensor ref_logits, Tensor? mask, Tensor stats, Tensor kl, Tensor grad, float temperature,"
    " int columns, str backend, bool needs_logits, bool needs_ref) -> (Tensor, Tensor)",
)
def _logits_kl_backward(
    logits: Tensor, ref_logits: Tensor, mask: Tensor | None, stats: Tensor, kl: Tensor, grad: Tensor,
    temperature: float, columns: int, backend: str, needs_logits: bool, needs_ref: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    rows, ref_rows = as_rows(logits), as_rows(ref_logits)
    out = torch.empty_like(rows) if needs_logits else None
    ref_out = torch.empty_like(ref_rows) if needs_ref else None
    body = BACKWARD.on(rows, backend)
    body(
        rows, ref_rows, flat(mask), stats, flat(kl), flat(grad), temperature, columns, out, ref_out
    )
    nothing = logits.new_empty(0)
    return (
        nothing if out is None else out.view(logits.shape),
        ref_logits.new_empty(0) if ref_out is None else ref_out.view(logits.shape),
    )


@register_fake(_logits_kl_backward)
def _(
    logits,
    ref_logits,
    mask,
    stats,
    kl,
    grad,
    temperature,
    columns,
    backend,
    needs_logits,
    needs_ref,
):  # type: ignore[no-untyped-def]
    def like(x: Tensor, needed: bool) -> Tensor:
        return torch.empty_like(as_rows(x)).view(x.shape) if needed else x.new_empty(0)

    return like(logits, needs_logits), like(ref_logits, needs_ref)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, ref_logits, mask, *ctx.options = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, ref_logits, mask, output[1], output[0])


def _logits_kl_grad(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 7
    temperature, columns, _group, backend = ctx.options
    needs = ctx.needs_input_grad[:2]
    logits, ref_logits, mask, stats, kl = ctx.saved_tensors
    d, ref_d = _logits_kl_backward(
        logits,
        ref_logits,
        mask,
        stats,
        kl,
        grad.contiguous(),
        temperature,
        columns,
        backend,
        *needs,
    )
    return (d if needs[0] else None, ref_d if needs[1] else None, *(None,) * 5)


register_autograd(_logits_kl, _logits_kl_grad, _setup)


def logits_kl(
    logits: Tensor, ref_logits: Tensor, *, mask: Tensor | None = None, temperature: float = 1.0,
    vocab_start: int | None = None, vocab_size: int | None = None, group: ProcessGroup | None = None,
    backend: str = "auto",
) -> Tensor:  # fmt: skip
    """Exact KL(pi || ref) per token, sum_j p_j (log p_j - log q_j), with p = softmax(logits / T), q = softmax(ref / T).

    logits, ref_logits [..., V] of one dtype; mask [...] bool. Returns fp32 [...]; differentiable in both inputs
    (d/dx_j = p_j (log p_j - log q_j - KL) / T and d/dy_j = (q_j - p_j) / T). `group`, `vocab_start` and `vocab_size`
    as in `logprobs`; one all-gather of five floats a token. Raises ValueError on wrong shapes and dtypes.
    """
    checks.floating("logits", logits)
    checks.require(
        logits.dim() >= 1 and logits.shape[-1] > 0,
        "logits",
        logits,
        "shape [..., V] with V above 0",
    )
    fits = (
        isinstance(ref_logits, Tensor)
        and ref_logits.shape == logits.shape
        and ref_logits.dtype == logits.dtype
    )
    checks.require(
        fits and ref_logits.device == logits.device,
        "ref_logits",
        ref_logits,
        checks.describe(logits),
    )
    if mask is not None:
        checks.like("mask", mask, logits.shape[:-1], logits.device, "bool")
    checks.positive("temperature", temperature)
    checks.choice("backend", backend, BACKENDS)
    _, columns = local_columns(logits.shape[-1], vocab_start, vocab_size, group)
    name = collectives.name_of(group)
    return _logits_kl(logits, ref_logits, mask, float(temperature), columns, name, backend)[0]
