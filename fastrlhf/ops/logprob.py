"""Log-probs, entropy and log-sum-exp of given tokens from logits, the vocabulary sharded or not.

Not supported: second derivatives. Out of scope: the GEMM that makes the logits (linear.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from fastrlhf.ops import checks, collectives
from fastrlhf.ops.dispatch import BACKENDS
from fastrlhf.ops.logprob_kernels import (
    BACKWARD,
    STATISTICS,
    RowResults,
    SavedRow,
    Softmax,
    TokenGrads,
    combine_statistics,
    results_from,
)
from fastrlhf.ops.registry import Context, Gradients, custom_op
from fastrlhf.ops.rows import VocabShard, as_rows, flat, map_tensors, vocab_shard
from fastrlhf.ops.scalars import Number

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class TokenLogprobs(NamedTuple):
    """Per-token results, fp32 [...] (float64 for float64 logits)."""

    logprobs: Tensor
    """log softmax(logits / T)[label]"""
    entropy: Tensor | None
    """-sum_j p_j log p_j, with `with_entropy`"""
    logsumexp: Tensor
    """log sum_j exp(logits_j / T)"""
    kl: Tensor | None
    """logprobs - ref_logprobs (k1), with `ref_logprobs`"""


def logprobs_ref(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: Number = 1.0,
    softcap: Number | None = None,
    mask: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
) -> TokenLogprobs:
    """Compute `logprobs` in plain torch, for tests and benchmarks to compare with.

    Autograd differentiates it; it holds several [..., V] tensors.
    """
    x = logits.to(checks.compute_dtype(logits))
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    keep = torch.ones_like(labels, dtype=torch.bool) if mask is None else mask
    logp = torch.log_softmax(torch.where(keep[..., None], x, 0.0) / temperature, -1)
    lse = torch.logsumexp(torch.where(keep[..., None], x, 0.0) / temperature, -1)
    p = logp.exp()
    # the inner where: 0 * -inf has no gradient
    entropy = -(p * torch.where(p > 0, logp, 0.0)).sum(-1)
    chosen = logp.gather(-1, torch.where(keep, labels, 0).long()[..., None]).squeeze(-1)
    chosen, entropy, lse = (torch.where(keep, t, 0.0) for t in (chosen, entropy, lse))
    kl = None
    if ref_logprobs is not None:
        kl = torch.where(keep, chosen - ref_logprobs.to(chosen.dtype), 0.0)
    return TokenLogprobs(chosen, entropy, lse, kl)


def _forward_rows(
    rows: Tensor,
    labels: Tensor,
    mask: Tensor | None,
    ref_logprobs: Tensor | None,
    softmax: Softmax,
    with_entropy: bool,
    shard: VocabShard,
    backend: str,
) -> RowResults:
    temperature, softcap = softmax.values()
    if not shard.sharded and STATISTICS.choose(rows, backend) == "triton":
        # one launch computes all results
        forward = STATISTICS.triton_function("logprob_forward", rows)
        options = (temperature, with_entropy, shard.vocab_start, shard.columns, softcap)
        return cast(RowResults, forward(rows, labels, mask, ref_logprobs, *options))
    statistics = STATISTICS.implementation(rows, backend, shard.sharded)
    stats = statistics(rows, labels, mask, temperature, shard.vocab_start, shard.columns, softcap)
    if shard.sharded:
        gathered = collectives.gather_stack(stats, shard.group_name)
        stats = combine_statistics(gathered, temperature)
    return results_from(stats, mask, ref_logprobs, temperature, with_entropy)


def shaped_like(results: RowResults, labels: Tensor) -> RowResults:
    """View each result [N] in the shape of the labels; leave the empty ones alone."""
    views = (t.view(labels.shape) if t.numel() == labels.numel() else t for t in results)
    return RowResults(*views)


def fake_results(
    logits: Tensor, labels: Tensor, ref_logprobs: Tensor | None, with_entropy: bool
) -> RowResults:
    """Return empty results for `labels`, in the compute dtype of `logits`."""

    def empty(requested: bool = True) -> Tensor:
        shape = labels.shape if requested else (0,)
        return logits.new_empty(shape, dtype=checks.compute_dtype(logits))

    kl = empty(ref_logprobs is not None)
    return RowResults(empty(), empty(with_entropy), empty(), kl, empty(), empty())


# --- the op ---------------------------------------------------------------------------------------


@custom_op("token_logprobs")
def _token_logprobs(
    logits: Tensor,
    labels: Tensor,
    mask: Tensor | None,
    ref_logprobs: Tensor | None,
    softmax: Softmax,
    with_entropy: bool,
    shard: VocabShard,
    inplace_backward: bool,
    backend: str,
) -> RowResults:
    ref = None if ref_logprobs is None else flat(ref_logprobs).to(checks.compute_dtype(logits))
    per_token = (flat(labels).long(), flat(mask), ref)
    results = _forward_rows(as_rows(logits), *per_token, softmax, with_entropy, shard, backend)
    return shaped_like(results, labels)


@_token_logprobs.register_fake
def _(
    logits: Tensor,
    labels: Tensor,
    mask: Tensor | None,
    ref_logprobs: Tensor | None,
    softmax: Softmax,
    with_entropy: bool,
    *_: object,
) -> RowResults:
    return fake_results(logits, labels, ref_logprobs, with_entropy)


def _backward_into(
    out: Tensor,
    rows: Tensor,
    labels: Tensor,
    mask: Tensor | None,
    saved: SavedRow,
    upstream: TokenGrads,
    softmax: Softmax,
    shard: VocabShard,
    backend: str,
) -> None:
    saved, upstream = map_tensors(flat, saved), map_tensors(flat, upstream)
    backward = BACKWARD.implementation(rows, backend)
    (temperature, softcap), columns = softmax.values(), (shard.vocab_start, shard.columns)
    per_row = (flat(labels).long(), flat(mask), saved, upstream)
    backward(rows, *per_row, temperature, *columns, out, softcap)


@custom_op("token_logprobs_backward")
def _token_logprobs_backward(
    logits: Tensor,
    labels: Tensor,
    mask: Tensor | None,
    saved: SavedRow,
    upstream: TokenGrads,
    softmax: Softmax,
    shard: VocabShard,
    backend: str,
) -> Tensor:
    rows = as_rows(logits)
    out = torch.empty_like(rows)
    _backward_into(out, rows, labels, mask, saved, upstream, softmax, shard, backend)
    return out.view(logits.shape)


@_token_logprobs_backward.register_fake
def _(logits: Tensor, *_: object) -> Tensor:
    return torch.empty_like(as_rows(logits)).view(logits.shape)


@custom_op("token_logprobs_backward_", mutates="logits")
def _token_logprobs_backward_inplace(
    logits: Tensor,
    labels: Tensor,
    mask: Tensor | None,
    saved: SavedRow,
    upstream: TokenGrads,
    softmax: Softmax,
    shard: VocabShard,
    backend: str,
) -> None:
    rows = as_rows(logits)
    assert rows.data_ptr() == logits.data_ptr(), (
        "the in-place backward is used only for logits that as_rows does not copy"
    )
    _backward_into(rows, rows, labels, mask, saved, upstream, softmax, shard, backend)
    torch.autograd.graph.increment_version(logits)  # so that a second backward raises


class _Context(Context, Protocol):
    capped: bool
    shard: VocabShard
    inplace: bool
    backend: str


def _setup(
    ctx: _Context,
    output: RowResults,
    logits: Tensor,
    labels: Tensor,
    mask: Tensor | None,
    ref_logprobs: Tensor | None,
    softmax: Softmax,
    with_entropy: bool,
    shard: VocabShard,
    inplace_backward: bool,
    backend: str,
) -> None:
    _logp, entropy, _lse, _kl, row_max, row_sum = output
    ctx.set_materialize_grads(False)
    ctx.capped, ctx.shard = softmax.capped, shard
    ctx.inplace, ctx.backend = inplace_backward, backend
    kept_entropy = entropy if with_entropy else None
    ctx.save_for_backward(logits, labels, mask, row_max, row_sum, kept_entropy, softmax.scalars)


def token_grads(
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    grad_logsumexp: Tensor | None,
    grad_kl: Tensor | None,
) -> tuple[TokenGrads, Tensor | None]:
    """Return the upstream of a row's results and of its KL, which also passes to the log-probs.

    A gradient of an empty output, one that was not requested, counts as None.
    """
    logp, entropy, lse, kl = (
        None if g is None or g.numel() == 0 else g
        for g in (grad_logprobs, grad_entropy, grad_logsumexp, grad_kl)
    )
    if kl is not None:
        logp = kl if logp is None else logp + kl
    return TokenGrads(logp, entropy, lse), kl


def ref_gradient(grad_kl: Tensor, mask: Tensor | None) -> Tensor:
    """Return the gradient of ref_logprobs in kl = logprobs - ref_logprobs."""
    return -grad_kl if mask is None else torch.where(mask, -grad_kl, 0.0)


def _token_logprobs_grad(ctx: _Context, *upstream: Tensor | None) -> Gradients:
    grads, grad_kl = token_grads(*upstream[:4])
    logits, labels, mask, row_max, row_sum, entropy, scalars = ctx.saved_tensors
    needs_logits, needs_ref = _token_logprobs.needs_grad(ctx, "logits", "ref_logprobs")
    gradients: dict[str, Tensor | None] = {}
    if grad_kl is not None and needs_ref:
        gradients["ref_logprobs"] = ref_gradient(grad_kl, mask)
    if needs_logits:
        saved = SavedRow(row_max, row_sum, None if grads.grad_entropy is None else entropy)
        softmax = Softmax(scalars, ctx.capped)
        arguments = (labels, mask, saved, grads, softmax, ctx.shard, ctx.backend)
        if ctx.inplace:
            _token_logprobs_backward_inplace(logits, *arguments)
            gradients["logits"] = logits
        else:
            gradients["logits"] = _token_logprobs_backward(logits, *arguments)
    return gradients


_token_logprobs.register_autograd(_token_logprobs_grad, _setup)


def check_tokens(
    lead: torch.Size,
    device: torch.device,
    labels: Tensor,
    mask: Tensor | None,
    ref_logprobs: Tensor | None,
    backend: str,
) -> None:
    """Check the arguments that logprobs and the linear ops share."""
    checks.like("labels", labels, lead, device, "integer")
    if mask is not None:
        checks.like("mask", mask, lead, device, "bool")
    if ref_logprobs is not None:
        checks.like("ref_logprobs", ref_logprobs, lead, device)
    checks.choice("backend", backend, BACKENDS)


def _may_overwrite(logits: Tensor) -> bool:
    """Return whether the backward may write into `logits`.

    Not a leaf (a parameter), not logits that as_rows copies, and not in a compiled graph.
    """
    if torch.compiler.is_compiling() or logits.is_leaf:
        return False
    return as_rows(logits).data_ptr() == logits.data_ptr()


def logprobs(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: Number = 1.0,
    softcap: Number | None = None,
    mask: Tensor | None = None,
    with_entropy: bool = False,
    ref_logprobs: Tensor | None = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    group: ProcessGroup | None = None,
    inplace_backward: bool = False,
    backend: str = "auto",
) -> TokenLogprobs:
    """Return the log-prob of each label under softmax(logits / temperature).

    One pass over the logits. Differentiable for any upstream gradients:
        d/dx_j = (g_lp (1[j = label] - p_j) + g_lse p_j - g_H p_j (log p_j + H)) / T

    Args:
        logits: [..., V] fp32, bf16 or fp16. Any strides with a unit last one are read in place
            (`logits[:, :-1]`).
        labels: [...] int, indices into the complete vocabulary. The log-prob of a label that no
            column holds is -inf.
        temperature: A number or a 0-dim tensor; 1 / temperature is what others call logit_scale.
        softcap: Replaces x by softcap tanh(x / softcap) before the temperature (Gemma 2, arXiv
            2408.00118).
        mask: [...] bool. False positions give exactly 0 and no gradient, whatever they hold.
        with_entropy: Also return the entropy.
        ref_logprobs: [...]. Also return `kl`.
        group: Process group that the vocabulary is sharded over; `logits` are this rank's columns.
            One all-gather of four floats per token, combined in rank order: every rank returns
            bit-identical results.
        vocab_start: Vocabulary index of this rank's first column; rank * V by default.
        vocab_size: True vocabulary size. Columns at or past it are padding: excluded from the
            softmax, with gradient 0.
        inplace_backward: Let the backward overwrite `logits` with its gradient (then a second
            backward raises).

    Outputs are fp32 [...] (float64 for float64 logits). Raises ValueError on wrong shapes, dtypes
    or devices, RuntimeError if `backend` cannot run.
    """
    checks.floating("logits", logits)
    has_columns = logits.dim() >= 1 and logits.shape[-1] > 0
    checks.require(has_columns, "logits", logits, "shape [..., V] with V above 0")
    check_tokens(logits.shape[:-1], logits.device, labels, mask, ref_logprobs, backend)
    shard = vocab_shard(logits.shape[-1], vocab_start, vocab_size, group)
    results = _token_logprobs(
        logits,
        labels,
        mask,
        ref_logprobs,
        Softmax.of(logits, temperature, softcap),
        with_entropy,
        shard,
        inplace_backward and _may_overwrite(logits),
        backend,
    )
    return public_results(RowResults(*results), with_entropy, ref_logprobs)


def public_results(
    results: RowResults, with_entropy: bool, ref_logprobs: Tensor | None
) -> TokenLogprobs:
    """Return the results with None for those that were not requested."""
    return TokenLogprobs(
        results.logprobs,
        results.entropy if with_entropy else None,
        results.logsumexp,
        None if ref_logprobs is None else results.kl,
    )
