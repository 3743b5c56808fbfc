"""Log-probabilities, entropy and log-sum-exp of given tokens from logits, with the vocabulary whole or sharded.

Left out on purpose: second derivatives, and the GEMM that makes the logits (linear.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastrlhf.ops import checks, collectives
from fastrlhf.ops.dispatch import BACKENDS, Kernel
from fastrlhf.ops.registry import custom_op, register_autograd, register_fake
from fastrlhf.ops.rows import as_rows, flat, local_columns, row_blocks

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class TokenLogprobs(NamedTuple):
    """Per-token results, fp32 [...] (float64 for float64 logits)."""

    logprobs: Tensor
    """log softmax(logits / T)[label]"""
    entropy: Tensor | None
    """-sum_j p_j log p_j, when asked for"""
    logsumexp: Tensor
    """log sum_j exp(logits_j / T)"""
    kl: Tensor | None
    """logprobs - ref_logprobs (k1), when ref_logprobs was given"""


def logprobs_ref(
    logits: Tensor, labels: Tensor, *, temperature: float = 1.0, mask: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
) -> TokenLogprobs:  # fmt: skip
    """Plain torch, differentiated by autograd, holding several [..., V] tensors: what tests compare with."""
    x = logits.to(checks.compute_dtype(logits))
    keep = torch.ones_like(labels, dtype=torch.bool) if mask is None else mask
    logp = torch.log_softmax(torch.where(keep[..., None], x, 0.0) / temperature, -1)
    lse = torch.logsumexp(torch.where(keep[..., None], x, 0.0) / temperature, -1)
    p = logp.exp()
    entropy = -(p * torch.where(p > 0, logp, 0.0)).sum(
        -1
    )  # the where inside: 0 * -inf has no gradient
    chosen = logp.gather(-1, torch.where(keep, labels, 0).long()[..., None]).squeeze(-1)
    chosen, entropy, lse = (torch.where(keep, t, 0.0) for t in (chosen, entropy, lse))
    kl = (
        None
        if ref_logprobs is None
        else torch.where(keep, chosen - ref_logprobs.to(chosen.dtype), 0.0)
    )
    return TokenLogprobs(chosen, entropy, lse, kl)


# --- raw bodies: rows are [B, L, V] views, per-token tensors are flat [N], N = B * L ---------------------------------


def _statistics_torch(
    rows: Tensor,
    labels: Tensor,
    mask: Tensor | None,
    temperature: float,
    vocab_start: int,
    columns: int,
) -> Tensor:
    """Per token (M = max x, sum e, sum e (x - M) / T, x[label]) with e = exp((x - M) / T), over this shard: [4, N].

    The label's logit is -inf on shards that do not hold it; rows masked out read as zeros, whatever they hold.
    The maximum is of the raw logits, so that x - M is exact near the maximum whatever the temperature.
    """
    dtype, lead = checks.compute_dtype(rows), rows.shape[:2]
    stats = torch.zeros(4, *lead, dtype=dtype, device=rows.device)
    local = (labels - vocab_start).view(lead)
    keep = None if mask is None else mask.view(lead)
    for at in row_blocks(rows, columns):
        x = rows[at][..., :columns].to(dtype)
        if keep is not None:
            x = x.masked_fill(~keep[at][..., None], 0.0)
        stats[:, at[0], at[1]] = _block_statistics(x, local[at], temperature)
    return stats.view(4, -1)


def _block_statistics(x: Tensor, local: Tensor, temperature: float) -> Tensor:
    columns = x.shape[-1]
    if columns == 0:  # a shard that holds only padding
        empty = x.new_full(x.shape[:-1], -torch.inf)
        return torch.stack([empty, torch.zeros_like(empty), torch.zeros_like(empty), empty])
    top = x.amax(-1)
    shift = torch.where(top == -torch.inf, 0.0, top)
    u = (x - shift[..., None]) / temperature
    e = u.exp()
    weighted = torch.where(e == 0, 0.0, e * u).sum(-1)  # 0 * -inf is 0 here: lim x log x
    owned = (local >= 0) & (local < columns)
    target = x.gather(-1, local.clamp(0, columns - 1)[..., None]).squeeze(-1)
    return torch.stack([top, e.sum(-1), weighted, torch.where(owned, target, -torch.inf)])


def _backward_torch(
    rows: Tensor, labels: Tensor, mask: Tensor | None, row_max: Tensor, row_sum: Tensor, entropy: Tensor | None,
    grad_logprobs: Tensor | None, grad_entropy: Tensor | None, grad_logsumexp: Tensor | None, temperature: float,
    vocab_start: int, columns: int, out: Tensor,
) -> None:  # fmt: skip
    """Write d/dx_j = (g_lp (1[j = label] - p_j) + g_lse p_j - g_H p_j (log p_j + H)) / T into `out` (may be `rows`)."""
    dtype, lead = checks.compute_dtype(rows), rows.shape[:2]
    zero = torch.zeros_like(row_max)
    g_lp, g_h, g_lse = (
        zero if g is None else g.to(dtype) for g in (grad_logprobs, grad_entropy, grad_logsumexp)
    )
    if mask is not None:
        g_lp, g_h, g_lse = (torch.where(mask, g, 0.0) for g in (g_lp, g_h, g_lse))
    log_sum = row_sum.log()
    through_p = g_lse - g_lp
    h_minus_log_sum = (
        zero if entropy is None else entropy - log_sum
    )  # log p_j + H = (x_j - M) / T - log sum + H
    local = (labels - vocab_start).view(lead)
    owned = ((local >= 0) & (local < columns)).view(lead)
    views = [
        t.view(lead)[..., None] for t in (row_max, row_sum, g_lp, g_h, through_p, h_minus_log_sum)
    ]
    for at in row_blocks(rows, columns):
        top, total, to_label, to_h, to_p, shift = (t[at] for t in views)
        u = (rows[at][..., :columns].to(dtype) - top) / temperature
        p = u.exp() / total
        d = p * to_p
        if grad_entropy is not None:
            d = d - torch.where(p == 0, 0.0, p * (u + shift)) * to_h
        if columns:
            label = local[at].clamp(0, columns - 1)[..., None]
            d.scatter_add_(-1, label, torch.where(owned[at][..., None], to_label, 0.0))
        d = d / temperature
        out[at][..., :columns] = (
            d if mask is None else torch.where(mask.view(lead)[at][..., None], d, 0.0)
        )
        out[at][..., columns:] = 0


def _statistics_cuda(library: Any, *arguments: Any) -> Tensor:
    return library.logprob_statistics(*arguments)


def _backward_cuda(
    library: Any, rows: Tensor, labels: Tensor, mask: Tensor | None, row_max: Tensor, row_sum: Tensor,
    entropy: Tensor | None, *upstream_and_rest: Any,
) -> None:  # fmt: skip
    """Forms the row's statistics again, in the one read of it that the gradient needs anyway."""
    library.logprob_forward_backward(rows, labels, mask, *upstream_and_rest)


STATISTICS = Kernel(
    "logprob_statistics", _statistics_torch, "fastrlhf.kernels.logprob", _statistics_cuda
)
BACKWARD = Kernel("logprob_backward", _backward_torch, "fastrlhf.kernels.logprob", _backward_cuda)


def combine_statistics(stats: Tensor, temperature: float) -> Tensor:
    """Merge the shards' statistics [R, 4, N], in rank order, into those of the whole vocabulary [4, N]."""
    row_max = stats[:, 0].amax(0)
    shift = (stats[:, 0] - row_max) / temperature
    scale = torch.where(stats[:, 1] == 0, 0.0, shift.exp())
    weighted = torch.where(scale == 0, 0.0, scale * (stats[:, 2] + shift * stats[:, 1]))
    return torch.stack(
        [row_max, (scale * stats[:, 1]).sum(0), weighted.sum(0), stats[:, 3].amax(0)]
    )


def finish_statistics(
    stats: Tensor, mask: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(logprobs, entropy, logsumexp) [N] from whole-vocabulary statistics [4, N]."""
    row_max, row_sum, weighted, target = stats
    log_sum = row_sum.log()
    logp = (target - row_max) / temperature - log_sum
    results = (logp, log_sum - weighted / row_sum, row_max / temperature + log_sum)
    if mask is None:
        return results
    logp, entropy, lse = (torch.where(mask, t, 0.0) for t in results)
    return logp, entropy, lse


def forward_rows(
    rows: Tensor, labels: Tensor, mask: Tensor | None, ref_logprobs: Tensor | None, temperature: float,
    with_entropy: bool, vocab_start: int, columns: int, group_name: str, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(logprobs, entropy, logsumexp, kl, row_max, row_sum), each [N]; entropy and kl are empty when not asked for."""
    if not group_name and STATISTICS.choose(rows, backend) == "triton":  # one launch does it all
        forward = STATISTICS.body("triton", "logprob_forward")
        return forward(
            rows, labels, mask, ref_logprobs, temperature, with_entropy, vocab_start, columns
        )
    body = STATISTICS.on(rows, backend, sharded=bool(group_name))
    stats = body(rows, labels, mask, temperature, vocab_start, columns)
    if group_name:
        stats = combine_statistics(collectives.gather_stack(stats, group_name), temperature)
    return outputs_from(stats, mask, ref_logprobs, temperature, with_entropy)


def outputs_from(
    stats: Tensor,
    mask: Tensor | None,
    ref_logprobs: Tensor | None,
    temperature: float,
    with_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    logp, entropy, lse = finish_statistics(stats, mask, temperature)
    kl = stats.new_empty(0)
    if ref_logprobs is not None:
        kl = logp - ref_logprobs
        kl = kl if mask is None else torch.where(mask, kl, 0.0)
    # clones: the outputs of a custom op may not share memory
    return (
        logp,
        entropy if with_entropy else stats.new_empty(0),
        lse,
        kl,
        stats[0].clone(),
        stats[1].clone(),
    )


# --- the op ----------------------------------------------------------------------------------------------------------


@custom_op(
    "token_logprobs",
    "(Tensor logits, Tensor labels, Tensor? mask, Tensor? ref_logprobs, float temperature, bool with_entropy,"
    " int vocab_start, int columns, str group_name, bool inplace_backward, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _token_logprobs(
    logits: Tensor, labels: Tensor, mask: Tensor | None, ref_logprobs: Tensor | None, temperature: float,
    with_entropy: bool, vocab_start: int, columns: int, group_name: str, inplace_backward: bool, backend: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    ref = None if ref_logprobs is None else flat(ref_logprobs).to(checks.compute_dtype(logits))
    results = forward_rows(
        as_rows(logits), flat(labels).long(), flat(mask), ref, temperature, with_entropy, vocab_start, columns,
        group_name, backend,
    )  # fmt: skip
    return tuple(t.view(labels.shape) if t.numel() == labels.numel() else t for t in results)


@register_fake(_token_logprobs)
def _(logits, labels, mask, ref_logprobs, temperature, with_entropy, *_):  # type: ignore[no-untyped-def]
    def per_token() -> Tensor:
        return logits.new_empty(labels.shape, dtype=checks.compute_dtype(logits))

    def nothing() -> Tensor:
        return logits.new_empty(0, dtype=checks.compute_dtype(logits))

    entropy = per_token() if with_entropy else nothing()
    kl = nothing() if ref_logprobs is None else per_token()
    return per_token(), entropy, per_token(), kl, per_token(), per_token()


_BACKWARD_ARGUMENTS = (
    "Tensor labels, Tensor? mask, Tensor row_max, Tensor row_sum, Tensor? entropy, Tensor? grad_logprobs,"
    " Tensor? grad_entropy, Tensor? grad_logsumexp, float temperature, int vocab_start, int columns, str backend"
)


def _backward_into(
    out: Tensor, rows: Tensor, per_token: tuple[Tensor | None, ...], options: tuple[Any, ...]
) -> None:
    temperature, vocab_start, columns, backend = options
    labels, *rest = (flat(t) for t in per_token)
    assert labels is not None
    BACKWARD.on(rows, backend)(rows, labels.long(), *rest, temperature, vocab_start, columns, out)


@custom_op(
    "token_logprobs_backward",
    f"(Tensor logits, {_BACKWARD_ARGUMENTS}) -> Tensor",
)
def _token_logprobs_backward(
    logits: Tensor, labels: Tensor, mask: Tensor | None, row_max: Tensor, row_sum: Tensor, entropy: Tensor | None,
    grad_logprobs: Tensor | None, grad_entropy: Tensor | None, grad_logsumexp: Tensor | None, temperature: float,
    vocab_start: int, columns: int, backend: str,
) -> Tensor:  # fmt: skip
    rows = as_rows(logits)
    out = torch.empty_like(rows)
    per_token = (
        labels,
        mask,
        row_max,
        row_sum,
        entropy,
        grad_logprobs,
        grad_entropy,
        grad_logsumexp,
    )
    _backward_into(out, rows, per_token, (temperature, vocab_start, columns, backend))
    return out.view(logits.shape)


@register_fake(_token_logprobs_backward)
def _(logits, *_):  # type: ignore[no-untyped-def]
    return torch.empty_like(as_rows(logits)).view(logits.shape)


@custom_op(
    "token_logprobs_backward_",
    f"(Tensor(a!) logits, {_BACKWARD_ARGUMENTS}) -> ()",
)
def _token_logprobs_backward_inplace(
    logits: Tensor, labels: Tensor, mask: Tensor | None, row_max: Tensor, row_sum: Tensor, entropy: Tensor | None,
    grad_logprobs: Tensor | None, grad_entropy: Tensor | None, grad_logsumexp: Tensor | None, temperature: float,
    vocab_start: int, columns: int, backend: str,
) -> None:  # fmt: skip
    rows = as_rows(logits)
    assert rows.data_ptr() == logits.data_ptr(), (
        "in-place backward is only asked for on logits viewed without a copy"
    )
    per_token = (
        labels,
        mask,
        row_max,
        row_sum,
        entropy,
        grad_logprobs,
        grad_entropy,
        grad_logsumexp,
    )
    _backward_into(rows, rows, per_token, (temperature, vocab_start, columns, backend))
    torch.autograd.graph.increment_version(logits)  # so that a second backward raises


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    (
        logits,
        labels,
        mask,
        _ref,
        temperature,
        with_entropy,
        start,
        columns,
        _group,
        ctx.inplace,
        backend,
    ) = inputs
    ctx.set_materialize_grads(False)
    ctx.options = (temperature, start, columns, backend)
    _logp, entropy, _lse, _kl, row_max, row_sum = output
    ctx.save_for_backward(logits, labels, mask, row_max, row_sum, entropy if with_entropy else None)


def given(grads: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    """The gradients of an op's outputs, None for the empty ones, which stand for results that were not asked for."""
    return [None if g is None or g.numel() == 0 else g for g in grads]


def _sum_of(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _token_logprobs_grad(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    grad_logp, grad_entropy, grad_lse, grad_kl = given(grads[:4])
    logits, labels, mask, row_max, row_sum, entropy = ctx.saved_tensors
    grad_ref = None
    if grad_kl is not None and ctx.needs_input_grad[3]:
        grad_ref = -grad_kl if mask is None else torch.where(mask, -grad_kl, 0.0)
    grad_logits = None
    if ctx.needs_input_grad[0]:
        saved = (labels, mask, row_max, row_sum, entropy if grad_entropy is not None else None)
        arguments = (*saved, _sum_of(grad_logp, grad_kl), grad_entropy, grad_lse, *ctx.options)
        if ctx.inplace:
            _token_logprobs_backward_inplace(logits, *arguments)
            grad_logits = logits
        else:
            grad_logits = _token_logprobs_backward(logits, *arguments)
    return grad_logits, None, None, grad_ref, *(None,) * 7


register_autograd(_token_logprobs, _token_logprobs_grad, _setup)


def check_tokens(
    lead: torch.Size, device: torch.device, labels: Tensor, mask: Tensor | None, ref_logprobs: Tensor | None,
    temperature: float, backend: str,
) -> None:  # fmt: skip
    """The checks that logprobs and the linear ops share."""
    checks.like("labels", labels, lead, device, "integer")
    if mask is not None:
        checks.like("mask", mask, lead, device, "bool")
    if ref_logprobs is not None:
        checks.like("ref_logprobs", ref_logprobs, lead, device)
    checks.positive("temperature", temperature)
    checks.choice("backend", backend, BACKENDS)


def _may_overwrite(logits: Tensor) -> bool:
    """Overwriting is a permission: it is not used on a leaf (a parameter), on a copy, nor in a compiled graph."""
    if torch.compiler.is_compiling() or logits.is_leaf:
        return False
    return as_rows(logits).data_ptr() == logits.data_ptr()


def logprobs(
    logits: Tensor, labels: Tensor, *, temperature: float = 1.0, mask: Tensor | None = None,
    with_entropy: bool = False, ref_logprobs: Tensor | None = None, vocab_start: int | None = None,
    vocab_size: int | None = None, group: ProcessGroup | None = None, inplace_backward: bool = False,
    backend: str = "auto",
) -> TokenLogprobs:  # fmt: skip
    """Log-prob of each label under softmax(logits / temperature), in one pass over the logits.

    logits [..., V] fp32/bf16/fp16, any strides with a unit last one are read in place (`logits[:, :-1]`); labels [...]
    int, indices into the whole vocabulary; mask [...] bool, False positions give exactly 0 and no gradient whatever
    they hold; ref_logprobs [...] asks for `kl`. All outputs are fp32 [...] (float64 logits: float64), differentiable
    for any upstream:
        d/dx_j = (g_lp (1[j = label] - p_j) + g_lse p_j - g_H p_j (log p_j + H)) / T
    A label that no column holds has log-prob -inf.

    `group`: the vocabulary is sharded over it and `logits` are this rank's columns, from `vocab_start` on (default
    rank * V). `vocab_size` is the true size; columns at or past it are padding, left out of the softmax, gradient 0.
    One all-gather of four floats a token, combined in rank order: every rank returns bit-identical results.
    `inplace_backward` lets the backward overwrite `logits` with its gradient (then no second backward).
    Raises ValueError on wrong shapes, dtypes or devices; RuntimeError when `backend` cannot run.
    """
    checks.floating("logits", logits)
    checks.require(
        logits.dim() >= 1 and logits.shape[-1] > 0,
        "logits",
        logits,
        "shape [..., V] with V above 0",
    )
    check_tokens(logits.shape[:-1], logits.device, labels, mask, ref_logprobs, temperature, backend)
    start, columns = local_columns(logits.shape[-1], vocab_start, vocab_size, group)
    inplace = inplace_backward and _may_overwrite(logits)
    logp, entropy, lse, kl, _, _ = _token_logprobs(
        logits, labels, mask, ref_logprobs, float(temperature), with_entropy, start, columns,
        collectives.name_of(group), inplace, backend,
    )  # fmt: skip
    return TokenLogprobs(
        logp, entropy if with_entropy else None, lse, None if ref_logprobs is None else kl
    )
