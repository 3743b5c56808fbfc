"""The pairwise ranking loss of a reward model over all pairs of K ranked responses.

(InstructGPT, arXiv 2203.02155, equation 1.) The forward also computes the gradient.
Not supported: padding. Prompts are ragged, described by offsets.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrlhf.ops import checks, layouts
from fastrlhf.ops.dispatch import BACKENDS, Kernel
from fastrlhf.ops.layouts import RankingMetric
from fastrlhf.ops.registry import Context, Gradients, custom_op
from fastrlhf.ops.scalars import Number, pack, unpack

REDUCTIONS = ("prompts", "pairs")


class RankingLoss(NamedTuple):
    """0-dim fp32 tensors, detached except for `loss`."""

    loss: Tensor
    accuracy: Tensor
    """Fraction of the strict pairs whose better response has the strictly higher score."""
    pairs: Tensor
    """Number of strict pairs."""
    margin: Tensor
    """Mean over the strict pairs of better score - worse score."""


def strict_pairs(scores: Tensor, ranks: Tensor, prompt_offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Return each response's prompt [N], and which pairs count [N, N].

    Pair (i, j) counts if i and j answer the same prompt and i is strictly better.
    """
    position = torch.arange(scores.shape[0], device=scores.device)
    prompt = torch.searchsorted(
        prompt_offsets[1:].contiguous(), position.to(prompt_offsets.dtype), right=True
    ).clamp(max=prompt_offsets.shape[0] - 2)  # offsets that end early on a GPU, see `_sound`
    return prompt, (prompt[:, None] == prompt[None]) & (ranks[:, None] < ranks[None])


def _sound(prompt_offsets: Tensor, count: int) -> Tensor:
    """Return whether the offsets rise from 0 to `count`, bool 0-dim."""
    rising = (prompt_offsets[1:] >= prompt_offsets[:-1]).all()
    return rising & (prompt_offsets[0] == 0) & (prompt_offsets[-1] == count)


def pairwise_ranking_loss_ref(
    scores: Tensor,
    ranks: Tensor,
    prompt_offsets: Tensor,
    *,
    reduction: str = "prompts",
    margins: Tensor | None = None,
    center_coef: Number = 0.0,
) -> RankingLoss:
    """Compute `pairwise_ranking_loss` in plain torch, for tests and benchmarks to compare with.

    Autograd differentiates it; it holds [N, N] tensors.
    """
    x = scores.to(checks.compute_dtype(scores))
    prompt, better = strict_pairs(scores, ranks, prompt_offsets)
    margin = x[:, None] - x[None]
    needed = 0.0 if margins is None else margins[:, None] - margins[None]
    each = -F.logsigmoid(margin - needed) + center_coef * (x[:, None] + x[None]).square()
    losses = torch.where(better, each, 0.0).sum(1)
    count = better.sum(1)
    pairs = count.sum()
    if reduction == "pairs":
        loss = losses.sum() / pairs.clamp(min=1)
    else:
        size = prompt_offsets.shape[0] - 1
        total = x.new_zeros(size).index_add(0, prompt, losses)
        counted = count.new_zeros(size).index_add(0, prompt, count)
        loss = (total / counted.clamp(min=1)).sum() / (counted > 0).sum().clamp(min=1)
    accuracy = (better & (margin > 0)).sum() / pairs.clamp(min=1)
    mean_margin = torch.where(better, margin, 0.0).sum() / pairs.clamp(min=1)
    return RankingLoss(loss, *(t.detach().to(x.dtype) for t in (accuracy, pairs, mean_margin)))


def _ranking_loss_torch(
    scores: Tensor,
    ranks: Tensor,
    prompt_offsets: Tensor,
    per_prompt: bool,
    margins: Tensor | None = None,
    center_coef: Number = 0.0,
) -> tuple[Tensor, Tensor]:
    """Return (metrics [5] as RankingMetric, gradient [N], not yet divided by the denominator).

    The denominator is the number of prompts that have a strict pair (`per_prompt`), or of strict
    pairs.
    """
    x = scores.to(checks.compute_dtype(scores))
    prompt, better = strict_pairs(scores, ranks, prompt_offsets)
    margin = x[:, None] - x[None]
    pairs = better.sum(dtype=x.dtype)
    weight, denominator = torch.ones_like(x), pairs
    if per_prompt:
        of_response = better.sum(1, dtype=x.dtype)
        counts = x.new_zeros(prompt_offsets.shape[0] - 1).index_add(0, prompt, of_response)
        weight, denominator = 1 / counts.clamp(min=1)[prompt], (counts > 0).sum(dtype=x.dtype)
    scale = 1 / denominator.clamp(min=1)
    above = margin
    if margins is not None:
        needed = margins.to(x.dtype)
        above = margin - (needed[:, None] - needed[None])
    losses = torch.where(better, -F.logsigmoid(above), 0.0) * weight[:, None]
    slope = torch.where(better, -torch.sigmoid(-above), 0.0) * weight[:, None]
    grad = slope.sum(1) - slope.sum(0)
    if isinstance(center_coef, Tensor) or center_coef != 0:
        total = torch.where(better, x[:, None] + x[None], 0.0)
        losses = losses + center_coef * total.square() * weight[:, None]
        pull = 2 * center_coef * total * weight[:, None]
        grad = grad + pull.sum(1) + pull.sum(0)
    per_pair = 1 / pairs.clamp(min=1)
    metrics = layouts.stack(
        RankingMetric,
        loss=losses.sum() * scale,
        accuracy=(better & (margin > 0)).sum(dtype=x.dtype) * per_pair,
        pairs=pairs,
        margin=torch.where(better, margin, 0.0).sum() * per_pair,
        grad_scale=scale,
    )
    if prompt_offsets.is_cuda:  # on a CPU they have been checked
        metrics = torch.where(_sound(prompt_offsets, x.shape[0]), metrics, torch.nan)
    return metrics, grad


KERNEL = Kernel("ranking_loss", _ranking_loss_torch, "fastrlhf.kernels.ranking")


class _Outputs(NamedTuple):
    loss: Tensor
    metrics: Tensor
    grad_scores: Tensor


@custom_op("ranking_loss")
def _ranking_loss(
    scores: Tensor,
    ranks: Tensor,
    prompt_offsets: Tensor,
    margins: Tensor | None,
    scalars: Tensor,
    per_prompt: bool,
    backend: str,
) -> _Outputs:
    if not prompt_offsets.is_cuda:
        count = scores.shape[0]
        expected = f"values that rise from 0 to the number of scores ({count})"
        sound = bool(_sound(prompt_offsets, count))
        checks.require(sound, "prompt_offsets", prompt_offsets, expected)
    inputs = (scores.contiguous(), ranks.contiguous(), prompt_offsets.contiguous())
    margins = None if margins is None else margins.contiguous()
    run, (center_coef,) = KERNEL.implementation(scores, backend), unpack(scalars)
    metrics, grad = run(*inputs, per_prompt, margins, center_coef)
    return _Outputs(metrics[RankingMetric.LOSS].clone(), metrics, grad)


@_ranking_loss.register_fake
def _(scores: Tensor, *_: object) -> _Outputs:
    def empty(*shape: int) -> Tensor:
        return scores.new_empty(shape, dtype=checks.compute_dtype(scores))

    return _Outputs(empty(), empty(len(RankingMetric)), empty(*scores.shape))


class _Context(Context, Protocol):
    dtype: torch.dtype


def _setup(
    ctx: _Context,
    output: _Outputs,
    scores: Tensor,
    ranks: Tensor,
    prompt_offsets: Tensor,
    margins: Tensor | None,
    scalars: Tensor,
    per_prompt: bool,
    backend: str,
) -> None:
    _, metrics, grad_scores = output
    ctx.set_materialize_grads(False)
    ctx.dtype = scores.dtype
    ctx.save_for_backward(metrics, grad_scores)


def _ranking_loss_grad(ctx: _Context, grad_loss: Tensor | None, *_: Tensor | None) -> Gradients:
    if grad_loss is None:
        return {}
    metrics, grad_scores = ctx.saved_tensors
    upstream = grad_loss * metrics[RankingMetric.GRAD_SCALE]
    return {"scores": (grad_scores * upstream).to(ctx.dtype)}


_ranking_loss.register_autograd(_ranking_loss_grad, _setup)


def pairwise_ranking_loss(
    scores: Tensor,
    ranks: Tensor,
    prompt_offsets: Tensor,
    *,
    reduction: str = "prompts",
    margins: Tensor | None = None,
    center_coef: Number = 0.0,
    backend: str = "auto",
) -> RankingLoss:
    """Return -log sigmoid(s_better - s_worse), averaged over pairs of responses to one prompt.

    One pass over all prompts. Equal ranks are ties and form no pair. Without any pair every field
    is 0.

    Args:
        scores: [N] fp32, bf16 or fp16.
        ranks: [N] int or float; lower is better.
        prompt_offsets: [G + 1] int, rising from 0 to N: prompt g has the responses
            prompt_offsets[g] : prompt_offsets[g + 1]. Others raise ValueError; on a GPU, which would
            have to be waited for, they make the result and all gradients NaN.
        reduction: "prompts" is the mean over each prompt's strict pairs, then over the prompts that
            have any, so that a prompt counts once however many responses were ranked (the paper's
            1 / C(K, 2)). "pairs" is the mean over all strict pairs.
        margins: [N], constants. A pair's loss becomes -log sigmoid(s_better - s_worse - (m_better -
            m_worse)), as in Llama 2 (arXiv 2307.09288, equation 2). `accuracy` and `margin` stay
            those of the scores.
        center_coef: Adds center_coef (s_better + s_worse)^2 to a pair's loss, which keeps scores
            near 0 (arXiv 2312.09244).

    Raises ValueError on wrong shapes and dtypes.
    """
    checks.floating("scores", scores)
    checks.require(scores.dim() == 1, "scores", scores, "shape [N]")
    numeric = isinstance(ranks, Tensor) and ranks.dtype in (*checks.INTEGERS, *checks.FLOATS)
    expected = f"an integer or float tensor of shape {list(scores.shape)} on {scores.device}"
    fits = numeric and ranks.shape == scores.shape and ranks.device == scores.device
    checks.require(fits, "ranks", ranks, expected)
    offsets = isinstance(prompt_offsets, Tensor) and prompt_offsets.dtype in checks.INTEGERS
    fits = offsets and prompt_offsets.dim() == 1 and prompt_offsets.shape[0] > 1
    fits = fits and prompt_offsets.device == scores.device
    expected = f"an integer tensor of shape [G + 1], G > 0, on {scores.device}"
    checks.require(fits, "prompt_offsets", prompt_offsets, expected)
    checks.choice("reduction", reduction, REDUCTIONS)
    checks.choice("backend", backend, BACKENDS)
    if margins is not None:
        checks.like("margins", margins, scores.shape, scores.device)
    checks.not_negative("center_coef", center_coef)
    inputs = (scores, ranks, prompt_offsets, margins, pack(scores, center_coef))
    loss, metrics, _ = _ranking_loss(*inputs, reduction == "prompts", backend)
    _, accuracy, pairs, margin, _grad_scale = metrics.detach().unbind()
    return RankingLoss(loss, accuracy, pairs, margin)
