"""Cross-entropy and the PPO policy loss from hidden states and LM-head weight, in three GEMMs.

Everything that weights a token (mask, advantage, old log-prob) is known before the forward, so each
chunk of rows computes
    logits = h W^T;   dlogits in place of logits;   dh = dlogits W and dW += dlogits^T h
and nothing is recomputed or held for all rows. The backward only scales dh and dW.
Not supported: what linear.py does not support.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from fastrlhf.ops import checks, collectives, ppo
from fastrlhf.ops.layouts import PPOMetric, SoftmaxStatistic
from fastrlhf.ops.linear import (
    check_num_counted,
    checked_head,
    fake_gradients,
    linear_logprobs_ref,
)
from fastrlhf.ops.linear_chunks import (
    CountedRows,
    GradientSums,
    LinearHead,
    LinearTokens,
    as_matrix,
    div,
    empty_pooled,
    grad_scale,
    mul_to,
    prefetch_one,
    saved_tensors_are_final,
)
from fastrlhf.ops.logprob import check_tokens
from fastrlhf.ops.logprob_kernels import (
    BACKWARD,
    STATISTICS,
    SavedRow,
    TokenGrads,
    combine_statistics,
    finish_statistics,
    forward_backward_cuda,
)
from fastrlhf.ops.ppo import PPOLoss, PPOOptions, PPOTokens
from fastrlhf.ops.registry import Context, Gradients, custom_op
from fastrlhf.ops.rows import RowSlice, VocabShard, flat, map_tensors, vocab_shard

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def linear_cross_entropy_ref(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    mask: Tensor,
    *,
    bias: Tensor | None = None,
    denominator: float | Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Compute `linear_cross_entropy` in plain torch, for tests and benchmarks to compare with."""
    tokens = linear_logprobs_ref(
        hidden, weight, labels, bias=bias, mask=mask, temperature=temperature
    )
    total = mask.sum().clamp(min=1) if denominator is None else denominator
    return -tokens.logprobs.sum() / total


def linear_ppo_loss_ref(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip: float = 0.2,
    entropy_coef: float = 0.0,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    denominator: float | Tensor | None = None,
) -> PPOLoss:
    """Compute `linear_ppo_loss` in plain torch, for tests and benchmarks to compare with."""
    tokens = linear_logprobs_ref(
        hidden, weight, labels, bias=bias, mask=mask, temperature=temperature
    )
    return ppo.ppo_loss_ref(
        tokens.logprobs,
        old_logprobs,
        advantages,
        mask,
        clip=clip,
        entropy=tokens.entropy,
        entropy_coef=entropy_coef,
        denominator=denominator,
    )


class PolicyTerms(NamedTuple):
    """Inputs of the PPO policy loss; with old_logprobs None the loss is the cross-entropy."""

    old_logprobs: Tensor | None
    advantages: Tensor | None
    clip: float
    entropy_coef: float


CROSS_ENTROPY = PolicyTerms(None, None, clip=0.2, entropy_coef=0.0)


class _Chunk(NamedTuple):
    """One chunk of rows, its logits, and what is known about them so far."""

    at: RowSlice
    hidden: Tensor
    labels: Tensor
    mask: Tensor | None
    logits: Tensor
    statistics: Callable[[], Tensor]
    """Returns those of the complete vocabulary [4, rows]; waits for the other shards'."""
    holds_gradient: bool
    """Whether `logits` hold their gradient already."""


class _ChunkedLogits(NamedTuple):
    """Makes the logits and statistics of the rows that count, chunk by chunk."""

    head: LinearHead
    rows: CountedRows
    labels_N: Tensor
    temperature: float
    shard: VocabShard
    backend: str
    d_logprobs_N: Tensor | None
    """The upstream gradient, if it needs no statistics: a backend that can then computes the
    gradient in the same read of the logits."""

    def chunks(self) -> Iterator[_Chunk]:
        """Yield each chunk; if sharded, its statistics travel while the next chunk's GEMM runs."""
        made = self._chunks(alive=2 if self.shard.sharded else 1)
        return prefetch_one(made) if self.shard.sharded else made

    def _chunks(self, alive: int) -> Iterator[_Chunk]:
        """Yield chunks, `alive` of which are used at a time."""
        rows, step, width = self.rows, self.rows.step, self.head.weight.shape[0]
        buffers = empty_pooled(rows.hidden, alive * step, width).view(alive, step, width)
        chosen = STATISTICS.choose(buffers, self.backend, self.shard.sharded)
        options = (self.temperature, self.shard.vocab_start, self.shard.columns)
        for i, at in enumerate(rows):
            hidden, labels = rows.chunk(at), rows.take(self.labels_N, at)
            mask = rows.take(rows.mask, at)
            logits = self.head.chunk_logits(hidden, buffers[i % alive, : at.stop - at.start])
            in_one_read = chosen == "cuda" and self.d_logprobs_N is not None
            if in_one_read:
                upstream = TokenGrads(rows.take(self.d_logprobs_N, at), None, None)
                arguments = (logits[None], labels, mask, upstream, *options, logits[None])
                stats = forward_backward_cuda(*arguments)
            else:
                statistics = STATISTICS.implementation(logits, chosen)
                stats = statistics(logits[None], labels, mask, *options)
            yield _Chunk(at, hidden, labels, mask, logits, self._combined(stats), in_one_read)

    def _combined(self, stats: Tensor) -> Callable[[], Tensor]:
        if not self.shard.sharded:
            return lambda: stats
        gathered = collectives.gather_stack_async(stats, self.shard.group_name)
        return lambda: combine_statistics(gathered(), self.temperature)


def _chunk_loss(
    logprobs: Tensor, entropy: Tensor, mask: Tensor | None, policy: PolicyTerms, backend: str
) -> tuple[Tensor, TokenGrads]:
    """Return the chunk's sums, laid out as PPOMetric, and their gradients."""
    counted = torch.ones_like(logprobs, dtype=torch.bool) if mask is None else mask
    weights = counted.to(logprobs.dtype)
    if policy.old_logprobs is None or policy.advantages is None:
        sums = torch.zeros(len(PPOMetric), dtype=logprobs.dtype, device=logprobs.device)
        sums[PPOMetric.LOSS] = -logprobs.sum()
        return sums, TokenGrads(-weights, None, None)
    one = torch.ones((), dtype=logprobs.dtype, device=logprobs.device)
    # the cuda backend has kernels for the logits only
    run = ppo.KERNEL.implementation(logprobs, "auto" if backend == "cuda" else backend)
    constants = (policy.old_logprobs, policy.advantages, counted)
    tokens = PPOTokens(logprobs, *constants, None, None, None, entropy)
    options = PPOOptions(policy.clip, policy.clip, 1.0, policy.entropy_coef)
    sums, d_logprobs, _ = run(tokens, one, options)
    d_entropy = -policy.entropy_coef * weights if policy.entropy_coef else None
    return sums, TokenGrads(d_logprobs, d_entropy, None)


class _Outputs(NamedTuple):
    loss: Tensor
    metrics: Tensor
    """[10], laid out as PPOMetric. GRAD_SCALE is the factor that the gradients still lack."""
    d_hidden: Tensor
    d_weight: Tensor
    d_bias: Tensor


@custom_op("linear_loss")
def _linear_loss(
    head: LinearHead,
    tokens: LinearTokens,
    policy: PolicyTerms,
    denominator: Tensor | None,
    temperature: float,
    shard: VocabShard,
    chunk_width: int,
    backend: str,
    needs: list[bool],
) -> _Outputs:
    """Compute the loss and the gradients of the head that `needs` names.

    Half-precision gradients are those of the sum / grad_scale (see there); the others are those of
    the loss itself, so that the backward has nothing left to multiply.
    """
    mask, dtype = flat(tokens.mask), checks.compute_dtype(head.hidden)
    assert mask is not None
    matrix = as_matrix(head.hidden)
    rows = CountedRows(matrix, mask, chunk_width, shard.sharded, tokens.num_counted)
    old_logprobs, advantages = flat(policy.old_logprobs), flat(policy.advantages)
    scale = grad_scale(rows, advantages, at_least=policy.entropy_coef)
    count = mask.sum().clamp(min=1).to(dtype) if denominator is None else denominator.to(dtype)
    divisor = count if scale is None else scale
    metrics = torch.zeros(len(PPOMetric), dtype=dtype, device=head.hidden.device)
    gradients = GradientSums(rows, head.weight, needs)
    d_logprobs_N = None
    if policy.old_logprobs is None and any(needs):
        d_logprobs_N = torch.where(mask, -1.0 / divisor, 0.0)
    labels_N = flat(tokens.labels).long()
    logits = _ChunkedLogits(head, rows, labels_N, temperature, shard, backend, d_logprobs_N)
    for chunk in logits.chunks():
        stats = chunk.statistics()
        logp, entropy, _ = finish_statistics(stats, chunk.mask, temperature)
        taken = (rows.take(old_logprobs, chunk.at), rows.take(advantages, chunk.at))
        of_chunk = PolicyTerms(*taken, policy.clip, policy.entropy_coef)
        sums, grads = _chunk_loss(logp, entropy, chunk.mask, of_chunk, backend)
        _add_metrics_(metrics, sums)
        if any(needs) and not chunk.holds_gradient:
            grads = map_tensors(lambda g: div(g, divisor), grads)
            _write_gradient_(chunk, stats, entropy, grads, temperature, shard, backend)
        if any(needs):
            gradients.add(chunk.at, chunk.logits, chunk.hidden)
    metrics[: PPOMetric.RATIO_MAX] /= count
    metrics[PPOMetric.GRAD_SCALE] = 1.0 if scale is None else scale / count
    d_hidden, d_weight, d_bias = gradients.reduce(shard.group_name)
    if needs[0]:
        d_hidden = d_hidden.view(head.hidden.shape)
    return _Outputs(metrics[PPOMetric.LOSS].clone(), metrics, d_hidden, d_weight, d_bias)


def _add_metrics_(metrics: Tensor, sums: Tensor) -> None:
    """Add a chunk's sums; the largest ratio is a maximum."""
    ratio_max = torch.maximum(metrics[PPOMetric.RATIO_MAX], sums[PPOMetric.RATIO_MAX])
    metrics += sums
    metrics[PPOMetric.RATIO_MAX] = ratio_max


def _write_gradient_(
    chunk: _Chunk,
    stats: Tensor,
    entropy: Tensor,
    grads: TokenGrads,
    temperature: float,
    shard: VocabShard,
    backend: str,
) -> None:
    """Overwrite the chunk's logits with their gradient."""
    row_max, row_sum = stats[SoftmaxStatistic.ROW_MAX], stats[SoftmaxStatistic.ROW_SUM]
    saved = SavedRow(row_max, row_sum, None if grads.grad_entropy is None else entropy)
    columns, logits = (shard.vocab_start, shard.columns), chunk.logits[None]
    backward = BACKWARD.implementation(chunk.logits, backend)
    backward(logits, chunk.labels, chunk.mask, saved, grads, temperature, *columns, logits)


@_linear_loss.register_fake
def _(
    head: LinearHead,
    tokens: LinearTokens,
    policy: PolicyTerms,
    denominator: Tensor | None,
    temperature: float,
    shard: VocabShard,
    chunk_width: int,
    backend: str,
    needs: list[bool],
) -> _Outputs:
    dtype = checks.compute_dtype(head.hidden)
    loss, metrics = (head.hidden.new_empty(s, dtype=dtype) for s in ((), (len(PPOMetric),)))
    return _Outputs(loss, metrics, *fake_gradients(head, needs, dtype))


class _Context(Context, Protocol):
    dtypes: list[torch.dtype]
    """Of hidden, weight and bias."""


def _setup(
    ctx: _Context,
    output: _Outputs,
    head: LinearHead,
    tokens: LinearTokens,
    policy: PolicyTerms,
    denominator: Tensor | None,
    temperature: float,
    shard: VocabShard,
    chunk_width: int,
    backend: str,
    needs: list[bool],
) -> None:
    _loss, *saved = output
    ctx.set_materialize_grads(False)
    ctx.dtypes = [(head.weight if t is None else t).dtype for t in head]
    ctx.save_for_backward(*saved)


def _linear_loss_grad(ctx: _Context, grad_loss: Tensor | None, *_: Tensor | None) -> Gradients:
    if grad_loss is None:
        return {}
    metrics, *computed = ctx.saved_tensors
    upstream, final = grad_loss * metrics[PPOMetric.GRAD_SCALE], saved_tensors_are_final()
    needs = _linear_loss.needs_grad(ctx, *LinearHead._fields)
    by_name = zip(LinearHead._fields, computed, ctx.dtypes, needs, strict=True)
    return {name: mul_to(g, upstream, dtype, final) for name, g, dtype, needed in by_name if needed}


_linear_loss.register_autograd(_linear_loss_grad, _setup)


def _run_loss(
    head: LinearHead,
    tokens: LinearTokens,
    policy: PolicyTerms,
    *,
    denominator: float | Tensor | None,
    temperature: float,
    vocab_start: int | None,
    vocab_size: int | None,
    group: ProcessGroup | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Check the arguments that both losses share, and return (loss, metrics [10])."""
    lead, device, width = head.hidden.shape[:-1], head.hidden.device, head.weight.shape[0]
    check_tokens(lead, device, tokens.labels, None, None, temperature, backend)
    checks.like("mask", tokens.mask, lead, device, "bool")
    checks.denominator(denominator, device)
    check_num_counted(tokens.num_counted, tokens.mask)
    shard = vocab_shard(width, vocab_start, vocab_size, group)
    # All ranks must cut the same chunks; only the true size gives the others' widths.
    chunk_width = width if group is None else -(-(vocab_size or 0) // group.size())
    grad = torch.is_grad_enabled()
    needs = [grad and t is not None and t.requires_grad for t in head]
    divide_by = ppo.as_denominator(denominator, head.hidden)
    options = (float(temperature), shard, chunk_width, backend, needs)
    loss, metrics, _, _, _ = _linear_loss(head, tokens, policy, divide_by, *options)
    return loss, metrics


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    mask: Tensor,
    *,
    bias: Tensor | None = None,
    denominator: float | Tensor | None = None,
    temperature: float = 1.0,
    num_counted: int | None = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    group: ProcessGroup | None = None,
    backend: str = "auto",
) -> Tensor:
    """Return the cross-entropy of (hidden @ weight.T + bias) / T at the True positions, 0-dim fp32.

    -sum of log softmax(...)[label] / denominator. The denominator (a float or a 0-dim tensor)
    defaults to the number of True positions. Shapes, dtypes, `num_counted` and `group` as in
    `linear_logprobs`. Three GEMMs in the forward, none in the backward; the logits of all rows are
    never held at once. dW [V, H] is held in fp32 until the backward.
    """
    loss, _ = _run_loss(
        checked_head(hidden, weight, bias),
        LinearTokens(labels, mask, num_counted),
        CROSS_ENTROPY,
        denominator=denominator,
        temperature=temperature,
        vocab_start=vocab_start,
        vocab_size=vocab_size,
        group=group,
        backend=backend,
    )
    return loss


def linear_ppo_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip: float = 0.2,
    entropy_coef: float = 0.0,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    denominator: float | Tensor | None = None,
    num_counted: int | None = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    group: ProcessGroup | None = None,
    backend: str = "auto",
) -> PPOLoss:
    """Return `ppo_loss` of the log-probs and entropy of (hidden @ weight.T + bias) / T.

    The logits are not held. old_logprobs, advantages [...] are constants; the value fields of the
    result are 0. The rest as in `linear_cross_entropy`: three GEMMs, the gradient computed in the
    forward.
    """
    checks.floating("hidden", hidden)
    for name, tensor in (("old_logprobs", old_logprobs), ("advantages", advantages)):
        checks.like(name, tensor, hidden.shape[:-1], hidden.device)
    checks.positive("clip", clip)
    loss, metrics = _run_loss(
        checked_head(hidden, weight, bias),
        LinearTokens(labels, mask, num_counted),
        PolicyTerms(old_logprobs, advantages, float(clip), float(entropy_coef)),
        denominator=denominator,
        temperature=temperature,
        vocab_start=vocab_start,
        vocab_size=vocab_size,
        group=group,
        backend=backend,
    )
    return ppo.result_from(loss, metrics)
