"""The LM head fused with its tokens' log-probs: hidden states and weight in, `TokenLogprobs` out.

Rows are processed in chunks, so logits [..., V] need never be held at once. The upstream gradient
is unknown in the forward: four GEMMs, or three if the logits are kept for the backward. The losses
that know theirs are in linear_loss.py.
Not supported: hidden states sharded over the sequence (gather them first); weights of another dtype
than hidden (except under torch.autocast, which casts both).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from fastrlhf.ops import checks, collectives
from fastrlhf.ops.layouts import SoftmaxStatistic
from fastrlhf.ops.linear_chunks import (
    CountedRows,
    GradientSums,
    HeadGradients,
    LinearHead,
    LinearTokens,
    as_matrix,
    div,
    empty_pooled,
    grad_scale,
    logits_fit,
    mul_to,
)
from fastrlhf.ops.logprob import (
    TokenLogprobs,
    check_tokens,
    fake_results,
    logprobs_ref,
    public_results,
    ref_gradient,
    shaped_like,
    token_grads,
)
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
from fastrlhf.ops.rows import RowSlice, VocabShard, flat, map_tensors, vocab_shard
from fastrlhf.ops.scalars import Number

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def linear_logits_ref(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute the complete [..., V] logits in plain torch."""
    return torch.nn.functional.linear(hidden, weight, bias)


def linear_logprobs_ref(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: Number = 1.0,
    softcap: Number | None = None,
    mask: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
) -> TokenLogprobs:
    """Compute `linear_logprobs` in plain torch, for tests and benchmarks to compare with."""
    logits = linear_logits_ref(hidden, weight, bias)
    return logprobs_ref(
        logits,
        labels,
        temperature=temperature,
        softcap=softcap,
        mask=mask,
        ref_logprobs=ref_logprobs,
    )


def _kept_rows(labels: Tensor, num_counted: int | None) -> int:
    return labels.numel() if num_counted is None else min(num_counted, labels.numel())


# --- the op ---------------------------------------------------------------------------------------


class _Outputs(NamedTuple):
    """The fields of RowResults, then the logits kept for the backward."""

    logprobs: Tensor
    entropy: Tensor
    logsumexp: Tensor
    kl: Tensor
    row_max: Tensor
    row_sum: Tensor
    kept_logits: Tensor
    """[rows, V], those of the rows that count first; empty [0] if they are recomputed."""


@custom_op("linear_logprobs")
def _linear_logprobs(
    head: LinearHead,
    tokens: LinearTokens,
    ref_logprobs: Tensor | None,
    softmax: Softmax,
    with_entropy: bool,
    keep_logits: bool,
    shard: VocabShard,
    backend: str,
) -> _Outputs:
    temperature, softcap = softmax.values()
    labels, mask, num_counted = flat(tokens.labels).long(), flat(tokens.mask), tokens.num_counted
    width, dtype = head.weight.shape[0], checks.compute_dtype(head.hidden)
    rows = CountedRows(as_matrix(head.hidden), mask, width, num_counted=num_counted)
    # ones in the rows that do not count: finite, and replaced by zeros in results_from
    shape = (len(SoftmaxStatistic), labels.numel())
    stats = torch.ones(shape, dtype=dtype, device=head.hidden.device)
    kept_shape = (_kept_rows(labels, num_counted), width) if keep_logits else (0,)
    kept = head.hidden.new_empty(kept_shape)
    buffer = empty_pooled(head.hidden, 0 if keep_logits else rows.step, width)
    for at in rows:
        out = kept[at] if keep_logits else buffer[: at.stop - at.start]
        logits = head.chunk_logits(rows.chunk(at), out)[None]
        statistics = STATISTICS.implementation(logits, backend, shard.sharded)
        per_token = (rows.take(labels, at), rows.take(rows.mask, at))
        columns = (shard.vocab_start, shard.columns)
        rows.put(stats, at, statistics(logits, *per_token, temperature, *columns, softcap))
    if shard.sharded:
        gathered = collectives.gather_stack(stats, shard.group_name)
        stats = combine_statistics(gathered, temperature)
    ref = None if ref_logprobs is None else flat(ref_logprobs).to(dtype)
    results = results_from(stats, mask, ref, temperature, with_entropy)
    return _Outputs(*shaped_like(results, tokens.labels), kept)


@_linear_logprobs.register_fake
def _(
    head: LinearHead,
    tokens: LinearTokens,
    ref_logprobs: Tensor | None,
    softmax: Softmax,
    with_entropy: bool,
    keep_logits: bool,
    *_: object,
) -> _Outputs:
    shape = (_kept_rows(tokens.labels, tokens.num_counted), head.weight.shape[0])
    kept = head.hidden.new_empty(shape if keep_logits else 0)
    return _Outputs(*fake_results(head.hidden, tokens.labels, ref_logprobs, with_entropy), kept)


@custom_op("linear_logprobs_backward")
def _linear_logprobs_backward(
    head: LinearHead,
    tokens: LinearTokens,
    saved: SavedRow,
    kept_logits: Tensor,
    upstream: TokenGrads,
    softmax: Softmax,
    shard: VocabShard,
    backend: str,
    needs: list[bool],
) -> HeadGradients:
    """Return the gradients of the head, empty [0] where `needs` is False."""
    labels, width = flat(tokens.labels).long(), head.weight.shape[0]
    temperature, softcap = softmax.values()
    rows = CountedRows(
        as_matrix(head.hidden), flat(tokens.mask), width, num_counted=tokens.num_counted
    )
    saved, upstream = map_tensors(flat, saved), map_tensors(flat, upstream)
    scale = grad_scale(rows, *upstream)
    upstream = map_tensors(lambda g: div(g, scale), upstream)
    sums = GradientSums(rows, head.weight, needs)
    buffer = empty_pooled(head.hidden, rows.step, width)

    def add_chunk(at: RowSlice) -> None:
        hidden, out = rows.chunk(at), buffer[: at.stop - at.start]
        # kept logits survive, for a second backward; recomputed ones are overwritten
        logits = kept_logits[at] if kept_logits.numel() else head.chunk_logits(hidden, out)
        backward = BACKWARD.implementation(logits, backend)
        backward(
            logits[None],
            rows.take(labels, at),
            rows.take(rows.mask, at),
            map_tensors(lambda t: rows.take(t, at), saved),
            map_tensors(lambda g: rows.take(g, at), upstream),
            temperature,
            shard.vocab_start,
            shard.columns,
            out[None],
            softcap,
        )
        sums.add(at, out, hidden)

    for at in rows:
        add_chunk(at)
    d_hidden, d_weight, d_bias = sums.reduce(shard.group_name)
    if needs[0]:
        d_hidden = d_hidden.view(head.hidden.shape)
    return HeadGradients(
        mul_to(d_hidden, scale, head.hidden.dtype),
        mul_to(d_weight, scale, head.weight.dtype),
        mul_to(d_bias, scale, head.weight.dtype),
    )


@_linear_logprobs_backward.register_fake
def _(
    head: LinearHead,
    tokens: LinearTokens,
    saved: SavedRow,
    kept_logits: Tensor,
    upstream: TokenGrads,
    softmax: Softmax,
    shard: VocabShard,
    backend: str,
    needs: list[bool],
) -> HeadGradients:
    return fake_gradients(head, needs, head.weight.dtype)


def fake_gradients(head: LinearHead, needs: list[bool], dtype: torch.dtype) -> HeadGradients:
    """Return empty gradients of `head`, those of weight and bias in `dtype`."""
    hidden, weight = head.hidden, head.weight
    return HeadGradients(
        hidden.new_empty(hidden.shape if needs[0] else 0),
        weight.new_empty(weight.shape if needs[1] else 0, dtype=dtype),
        weight.new_empty(weight.shape[0] if needs[2] else 0, dtype=dtype),
    )


class _Context(Context, Protocol):
    capped: bool
    num_counted: int | None
    shard: VocabShard
    backend: str


def _setup(
    ctx: _Context,
    output: _Outputs,
    head: LinearHead,
    tokens: LinearTokens,
    ref_logprobs: Tensor | None,
    softmax: Softmax,
    with_entropy: bool,
    keep_logits: bool,
    shard: VocabShard,
    backend: str,
) -> None:
    _logp, entropy, _lse, _kl, row_max, row_sum, kept = output
    ctx.set_materialize_grads(False)
    ctx.capped, ctx.num_counted = softmax.capped, tokens.num_counted
    ctx.shard, ctx.backend = shard, backend
    saved = SavedRow(row_max, row_sum, entropy if with_entropy else None)
    per_token = (tokens.labels, tokens.mask)
    ctx.save_for_backward(*head, *per_token, *saved, kept, softmax.scalars)


def _linear_logprobs_grad(ctx: _Context, *upstream: Tensor | None) -> Gradients:
    grads, grad_kl = token_grads(*upstream[:4])
    *head, labels, mask, row_max, row_sum, entropy, kept, scalars = ctx.saved_tensors
    gradients: dict[str, Tensor | None] = {}
    if grad_kl is not None and _linear_logprobs.needs_grad(ctx, "ref_logprobs")[0]:
        gradients["ref_logprobs"] = ref_gradient(grad_kl, mask)
    needs = _linear_logprobs.needs_grad(ctx, *LinearHead._fields)
    if not any(needs):
        return gradients
    computed = _linear_logprobs_backward(
        LinearHead(*head),
        LinearTokens(labels, mask, ctx.num_counted),
        SavedRow(row_max, row_sum, None if grads.grad_entropy is None else entropy),
        kept,
        grads,
        Softmax(scalars, ctx.capped),
        ctx.shard,
        ctx.backend,
        needs,
    )
    by_name = zip(LinearHead._fields, computed, needs, strict=True)
    return {**gradients, **{name: g for name, g, needed in by_name if needed}}


_linear_logprobs.register_autograd(_linear_logprobs_grad, _setup)


def checked_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> LinearHead:
    """Check the operands and cast them as F.linear does under torch.autocast (float64 stays)."""
    checks.floating("hidden", hidden)
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = _cast(hidden, dtype), _cast(weight, dtype)
        bias = None if bias is None else _cast(bias, dtype)
    holds = hidden.dim() >= 1 and hidden.shape[-1] > 0
    checks.require(holds, "hidden", hidden, "shape [..., H] with H above 0")
    fits = isinstance(weight, Tensor) and weight.dim() == 2 and weight.shape[-1] == hidden.shape[-1]
    same = fits and weight.dtype == hidden.dtype and weight.device == hidden.device
    expected = (
        f"[V, {hidden.shape[-1]}] with V above 0, of hidden's dtype and device ({hidden.dtype})"
    )
    checks.require(same and weight.shape[0] > 0, "weight", weight, expected)
    if bias is not None:
        fits = isinstance(bias, Tensor) and bias.shape == weight.shape[:1]
        same = fits and bias.dtype == hidden.dtype and bias.device == hidden.device
        checks.require(same, "bias", bias, f"[{weight.shape[0]}] of hidden's dtype")
    return LinearHead(hidden, weight, bias)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast differentiably; leave what autocast skips, and anything but a tensor, to the checks."""
    castable = (torch.float32, torch.bfloat16, torch.float16)
    return x.to(dtype) if isinstance(x, Tensor) and x.dtype in castable else x


def check_num_counted(num_counted: int | None, mask: Tensor | None) -> None:
    if num_counted is not None:
        checks.require(mask is not None, "num_counted", num_counted, "None where there is no mask")
        expected = "the number of the mask's True positions, or a larger one"
        checks.require(num_counted >= 0, "num_counted", num_counted, expected)


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    recompute: bool | str = "auto",
    temperature: Number = 1.0,
    softcap: Number | None = None,
    mask: Tensor | None = None,
    with_entropy: bool = False,
    ref_logprobs: Tensor | None = None,
    num_counted: int | None = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    group: ProcessGroup | None = None,
    backend: str = "auto",
) -> TokenLogprobs:
    """Return `logprobs(hidden @ weight.T + bias, labels, ...)` without holding the logits.

    Differentiable in hidden, weight (accumulated in fp32), bias and ref_logprobs.

    Args:
        hidden: [..., H].
        weight: [V, H], of hidden's dtype (torch.autocast casts both).
        labels: [...]; this and the other arguments as in `logprobs`.
        bias: [V].
        recompute: True recomputes each chunk's logits in the backward (4 GEMMs, never [..., V]).
            False keeps them in hidden's dtype (3 GEMMs). "auto" keeps them if they fit a quarter of
            a GPU's free memory, 1 GiB on a CPU, or FASTRLHF_LINEAR_BUDGET_MB, which also bounds a
            chunk's logits.
        num_counted: The mask's number of True positions, or a larger one. Masked rows cost nothing
            on a CPU; on a GPU only if this is given, since counting its mask would wait for it.
        group: Process group that the vocabulary is sharded over. weight and bias are this rank's
            rows and get local gradients; hidden is the same on every rank and gets the full
            gradient, summed over the group here.
    """
    head = checked_head(hidden, weight, bias)
    lead, device, width = head.hidden.shape[:-1], head.hidden.device, weight.shape[0]
    check_tokens(lead, device, labels, mask, ref_logprobs, backend)
    check_num_counted(num_counted, mask)
    checks.choice("recompute", recompute, ("auto", True, False))
    shard = vocab_shard(width, vocab_start, vocab_size, group)
    differentiated = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in head
    )
    keep = differentiated and (
        recompute is False
        or (recompute == "auto" and logits_fit(head.hidden, _kept_rows(labels, num_counted), width))
    )
    outputs = _linear_logprobs(
        head,
        LinearTokens(labels, mask, num_counted),
        ref_logprobs,
        Softmax.of(head.hidden, temperature, softcap),
        with_entropy,
        keep,
        shard,
        backend,
    )
    return public_results(RowResults(*outputs[:6]), with_entropy, ref_logprobs)
