"""What the losses from hidden states do with one chunk of logits: its loss and its gradient.

linear_loss.py has the ops. Uniform smoothing needs no pass over the logits: their mean over the
vocabulary is the product of a hidden state with the mean row of the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastrlhf.ops import collectives, ppo_kernels
from fastrlhf.ops.layouts import PPOMetric, SoftmaxStatistic
from fastrlhf.ops.linear_chunks import (
    CountedRows,
    GradientSums,
    LinearHead,
    div,
    empty_pooled,
    prefetch_one,
)
from fastrlhf.ops.logprob_kernels import (
    BACKWARD,
    STATISTICS,
    SavedRow,
    TokenGrads,
    combine_statistics,
    finish_statistics,
    forward_backward_cuda,
)
from fastrlhf.ops.policy import PolicyForm, PPOOptions
from fastrlhf.ops.ppo_kernels import PPOTokens
from fastrlhf.ops.rows import RowSlice, VocabShard, map_tensors
from fastrlhf.ops.scalars import Number


class PolicyTokens(NamedTuple):
    """Constants of the policy loss [...]; with old_logprobs None the loss is the cross-entropy."""

    old_logprobs: Tensor | None
    advantages: Tensor | None
    ref_logprobs: Tensor | None = None
    weights: Tensor | None = None


class LossTerms(NamedTuple):
    """Which optional terms a loss has: those it lacks cost nothing."""

    capped: bool
    with_entropy: bool
    smoothed: bool
    with_z: bool


class LossOptions(NamedTuple):
    """Everything that selects and scales the terms of a loss."""

    temperature: Number
    softcap: Number | None
    label_smoothing: Number
    z_loss: Number
    policy: PPOOptions
    form: PolicyForm
    terms: LossTerms


class Chunk(NamedTuple):
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


class ChunkedLogits(NamedTuple):
    """Makes the logits and statistics of the rows that count, chunk by chunk."""

    head: LinearHead
    rows: CountedRows
    labels_N: Tensor
    options: LossOptions
    shard: VocabShard
    backend: str
    d_logprobs_N: Tensor | None
    """The upstream gradient, if it needs no statistics: a backend that can then computes the
    gradient in the same read of the logits."""

    def chunks(self) -> Iterator[Chunk]:
        """Yield each chunk; if sharded, its statistics travel while the next chunk's GEMM runs."""
        made = self._chunks(alive=2 if self.shard.sharded else 1)
        return prefetch_one(made) if self.shard.sharded else made

    def _chunks(self, alive: int) -> Iterator[Chunk]:
        """Yield chunks, `alive` of which are used at a time."""
        rows, step, width = self.rows, self.rows.step, self.head.weight.shape[0]
        buffers = empty_pooled(rows.hidden, alive * step, width).view(alive, step, width)
        chosen = STATISTICS.choose(buffers, self.backend, self.shard.sharded)
        options = (self.options.temperature, self.shard.vocab_start, self.shard.columns)
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
                stats = statistics(logits[None], labels, mask, *options, self.options.softcap)
            yield Chunk(at, hidden, labels, mask, logits, self._combined(stats), in_one_read)

    def _combined(self, stats: Tensor) -> Callable[[], Tensor]:
        if not self.shard.sharded:
            return lambda: stats
        gathered = collectives.gather_stack_async(stats, self.shard.group_name)
        return lambda: combine_statistics(gathered(), self.options.temperature)


def policy_loss(
    logprobs: Tensor,
    entropy: Tensor,
    mask: Tensor,
    constants: PolicyTokens,
    options: LossOptions,
    backend: str,
) -> tuple[Tensor, TokenGrads]:
    """Return the sums of the policy loss of tokens [n], as PPOMetric, and their gradients."""
    assert constants.old_logprobs is not None and constants.advantages is not None
    one = torch.ones((), dtype=logprobs.dtype, device=logprobs.device)
    # the cuda backend has kernels for the logits only
    asked = "auto" if backend == "cuda" else backend
    run = ppo_kernels.KERNEL.implementation(logprobs, asked)
    given = (constants.old_logprobs, constants.advantages, mask, None, None, None, entropy)
    tokens = PPOTokens(logprobs, *given, constants.ref_logprobs, constants.weights)
    sums, d_logprobs, _ = run(tokens, one, options.policy, options.form)
    d_entropy = None
    if options.terms.with_entropy:
        weights = mask if constants.weights is None else torch.where(mask, constants.weights, 0.0)
        d_entropy = -options.policy.entropy_coef * weights.to(logprobs.dtype)
    return sums, TokenGrads(d_logprobs, d_entropy, None)


class MeanRow(NamedTuple):
    """The mean row of the weight and of the bias over the complete vocabulary, fp32."""

    whole_H: Tensor
    bias: Tensor
    """0-dim"""
    here_H: Tensor
    """This shard's part of `whole_H`: the parts add up to it."""
    vocabulary: Tensor
    """Its size, 0-dim."""

    @staticmethod
    def of(head: LinearHead, shard: VocabShard, dtype: torch.dtype) -> MeanRow:
        rows = head.weight[: shard.columns]
        sums = rows.new_zeros(rows.shape[1] + 2, dtype=dtype)
        sums[:-2] = rows.sum(0, dtype=dtype)
        sums[-2] = 0.0 if head.bias is None else head.bias[: shard.columns].sum(dtype=dtype)
        sums[-1] = shard.columns
        here = sums[:-2].clone()
        total = collectives.reduce_sum_(sums, shard.group_name)
        return MeanRow(total[:-2] / total[-1], total[-2] / total[-1], here / total[-1], total[-1])


class CrossEntropy:
    """The cross-entropy of chunks, with uniform label smoothing and the square of log Z."""

    def __init__(
        self, head: LinearHead, options: LossOptions, shard: VocabShard, dtype: torch.dtype
    ) -> None:
        self.options, self.columns = options, shard.columns
        self.mean = MeanRow.of(head, shard, dtype) if options.terms.smoothed else None
        self.hidden_sum_H: Tensor | None = None
        self.count: Tensor | float = 0.0

    def loss(self, chunk: Chunk, logprobs: Tensor, logsumexp: Tensor) -> tuple[Tensor, TokenGrads]:
        """Return the chunk's sums, as PPOMetric (the loss alone), and their gradients.

        -(1 - e) log p_y + e (lse - mean_j z_j) + z_loss lse^2,   z_j = x_j / T
        """
        options, mask = self.options, chunk.mask
        counted = torch.ones_like(logprobs) if mask is None else mask.to(logprobs.dtype)
        each, d_logprobs, d_lse = -logprobs, -counted, None
        if self.mean is not None:
            smoothing = options.label_smoothing
            mean = chunk.hidden.to(logprobs.dtype) @ self.mean.whole_H + self.mean.bias
            uniform = (logsumexp - mean / options.temperature) * counted
            each = (1 - smoothing) * each + smoothing * uniform
            d_logprobs, d_lse = (1 - smoothing) * d_logprobs, smoothing * counted
        if options.terms.with_z:
            each = each + options.z_loss * logsumexp.square()
            d_z = 2 * options.z_loss * logsumexp
            d_lse = d_z if d_lse is None else d_lse + d_z
        sums = torch.zeros(len(PPOMetric), dtype=logprobs.dtype, device=logprobs.device)
        sums[PPOMetric.LOSS] = each.sum()
        return sums, TokenGrads(d_logprobs, None, d_lse)

    def add_mean_gradient(self, chunk: Chunk, sums: GradientSums, divisor: Tensor) -> None:
        """Add the gradient of the mean logit, the same for every column of a row."""
        if self.mean is None:
            return
        each = -self.options.label_smoothing / (self.options.temperature * divisor)
        rows = chunk.logits.shape[0]
        counted = chunk.hidden.new_ones(rows) if chunk.mask is None else chunk.mask
        counted = counted.to(self.mean.here_H.dtype)
        if sums.needs_hidden:
            share = (each * counted)[:, None] * self.mean.here_H
            sums.add_hidden(chunk.at, share)
        hidden_sum = each * (counted @ chunk.hidden.to(counted.dtype))
        before = self.hidden_sum_H
        self.hidden_sum_H = hidden_sum if before is None else before + hidden_sum
        self.count = self.count + each * counted.sum()

    def finish(self, sums: GradientSums) -> None:
        """Add the mean logit's part of dW and db: the same row for every word of the vocabulary."""
        if self.mean is None or self.hidden_sum_H is None:
            return
        if sums.needs_weight:
            sums.d_weight[: self.columns] += self.hidden_sum_H / self.mean.vocabulary
        if sums.needs_bias:
            sums.d_bias[: self.columns] += self.count / self.mean.vocabulary


def add_metrics_(metrics: Tensor, sums: Tensor) -> None:
    """Add a chunk's sums; the largest ratio is a maximum."""
    ratio_max = torch.maximum(metrics[PPOMetric.RATIO_MAX], sums[PPOMetric.RATIO_MAX])
    metrics += sums
    metrics[PPOMetric.RATIO_MAX] = ratio_max


def write_gradient_(
    chunk: Chunk,
    stats: Tensor,
    entropy: Tensor,
    grads: TokenGrads,
    divisor: Tensor,
    options: LossOptions,
    shard: VocabShard,
    backend: str,
) -> None:
    """Overwrite the chunk's logits with their gradient, divided by `divisor`."""
    grads = map_tensors(lambda g: div(g, divisor), grads)
    row_max, row_sum = stats[SoftmaxStatistic.ROW_MAX], stats[SoftmaxStatistic.ROW_SUM]
    saved = SavedRow(row_max, row_sum, None if grads.grad_entropy is None else entropy)
    columns, logits = (shard.vocab_start, shard.columns), chunk.logits[None]
    backward = BACKWARD.implementation(chunk.logits, backend)
    per_row = (chunk.labels, chunk.mask, saved, grads)
    backward(logits, *per_row, options.temperature, *columns, logits, options.softcap)


def all_logprobs(
    logits: ChunkedLogits, mask_N: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return log-probs and entropies [N], 0 where masked, in a pass of their own."""
    results = torch.zeros(2, mask_N.shape[0], dtype=dtype, device=mask_N.device)
    for chunk in logits.chunks():
        temperature = logits.options.temperature
        logp, entropy, _ = finish_statistics(chunk.statistics(), chunk.mask, temperature)
        logits.rows.put(results, chunk.at, torch.stack([logp, entropy]))
    return results[0], results[1]
