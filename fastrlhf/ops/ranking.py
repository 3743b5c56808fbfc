"""The pairwise ranking loss of a reward model over all pairs of K ranked responses (InstructGPT, equation 1).

The forward forms the gradient as well. Left out on purpose: padding; prompts are ragged, described by offsets.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrlhf.ops import checks
from fastrlhf.ops.dispatch import BACKENDS, Kernel
from fastrlhf.ops.registry import custom_op, register_autograd, register_fake

REDUCTIONS = ("prompts", "pairs")


class RankingLoss(NamedTuple):
    """0-dim fp32 tensors; all but `loss` are detached."""

    loss: Tensor
    accuracy: Tensor
    """share of the strict pairs whose better response has the strictly higher score"""
    pairs: Tensor
    """how many strict pairs there were"""
    margin: Tensor
    """mean over the strict pairs of better score - worse score"""


def _pairs(scores: Tensor, ranks: Tensor, prompt_offsets: Tensor) -> tuple[Tensor, Tensor]:
    """(the prompt of each response [N], whether response i is strictly better than j of the same prompt [N, N])."""
    position = torch.arange(scores.shape[0], device=scores.device)
    prompt = torch.searchsorted(
        prompt_offsets[1:].contiguous(), position.to(prompt_offsets.dtype), right=True
    )
    return prompt, (prompt[:, None] == prompt[None]) & (ranks[:, None] < ranks[None])


def pairwise_ranking_loss_ref(
    scores: Tensor, ranks: Tensor, prompt_offsets: Tensor, *, reduction: str = "prompts"
) -> RankingLoss:
    """Plain torch, differentiated by autograd, holding [N, N] tensors: what tests and benchmarks compare with."""
    x = scores.to(checks.compute_dtype(scores))
    prompt, better = _pairs(scores, ranks, prompt_offsets)
    margin = x[:, None] - x[None]
    losses = torch.where(better, -F.logsigmoid(margin), 0.0).sum(1)
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
    scores: Tensor, ranks: Tensor, prompt_offsets: Tensor, per_prompt: bool
) -> tuple[Tensor, Tensor]:
    """(metrics [5]: loss, accuracy, pairs, margin, 1 / denominator; gradient [N], not yet divided by the denominator).

    The denominator is the number of prompts that have a strict pair (`per_prompt`), or of strict pairs.
    """
    x = scores.to(checks.compute_dtype(scores))
    prompt, better = _pairs(scores, ranks, prompt_offsets)
    margin = x[:, None] - x[None]
    pairs = better.sum(dtype=x.dtype)
    weight, denominator = torch.ones_like(x), pairs
    if per_prompt:
        counts = x.new_zeros(prompt_offsets.shape[0] - 1).index_add(
            0, prompt, better.sum(1, dtype=x.dtype)
        )
        weight, denominator = 1 / counts.clamp(min=1)[prompt], (counts > 0).sum(dtype=x.dtype)
    scale = 1 / denominator.clamp(min=1)
    losses = torch.where(better, -F.logsigmoid(margin), 0.0) * weight[:, None]
    slope = torch.where(better, -torch.sigmoid(-margin), 0.0) * weight[:, None]
    per_pair = 1 / pairs.clamp(min=1)
    accuracy = (better & (margin > 0)).sum(dtype=x.dtype) * per_pair
    mean_margin = torch.where(better, margin, 0.0).sum() * per_pair
    return torch.stack([losses.sum() * scale, accuracy, pairs, mean_margin, scale]), slope.sum(
        1
    ) - slope.sum(0)


KERNEL = Kernel("ranking_loss", _ranking_loss_torch, "fastrlhf.kernels.ranking")


@custom_op(
    "ranking_loss",
    "(Tensor scores, Tensor ranks, Tensor prompt_offsets, bool per_prompt, str backend) -> (Tensor, Tensor, Tensor)",
)
def _ranking_loss(
    scores: Tensor, ranks: Tensor, prompt_offsets: Tensor, per_prompt: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    body = KERNEL.on(scores, backend)
    metrics, grad = body(
        scores.contiguous(), ranks.contiguous(), prompt_offsets.contiguous(), per_prompt
    )
    return metrics[0].clone(), metrics, grad


@register_fake(_ranking_loss)
def _(scores, ranks, prompt_offsets, per_prompt, backend):  # type: ignore[no-untyped-def]
    def empty(*shape: int) -> Tensor:
        return scores.new_empty(shape, dtype=checks.compute_dtype(scores))

    return empty(), empty(5), empty(*scores.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.dtype = inputs[0].dtype
    ctx.save_for_backward(output[1], output[2])


def _grad(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad_loss is None:
        return (None,) * 5
    metrics, grad = ctx.saved_tensors
    return (grad * (grad_loss * metrics[4])).to(ctx.dtype), None, None, None, None


register_autograd(_ranking_loss, _grad, _setup)


def pairwise_ranking_loss(
    scores: Tensor,
    ranks: Tensor,
    prompt_offsets: Tensor,
    *,
    reduction: str = "prompts",
    backend: str = "auto",
) -> RankingLoss:
    """-log sigmoid(s_better - s_worse) over every pair of responses to one prompt, all prompts in one pass.

    scores [N] fp32/bf16/fp16; ranks [N], int or float, lower is better; prompt_offsets [G + 1] int: prompt g has the
    responses prompt_offsets[g] : prompt_offsets[g + 1], from 0 to N (a value outside is not checked: that would wait
    for the GPU). Equal ranks are ties and form no pair. "prompts": mean over each prompt's strict pairs, then over the
    prompts that have any, so that a prompt counts once however many responses were ranked (the paper's 1 / C(K, 2));
    "pairs": mean over all strict pairs. Without any pair every field is 0. Wrong shapes and dtypes: ValueError.
    """
    checks.floating("scores", scores)
    checks.require(scores.dim() == 1, "scores", scores, "shape [N]")
    numeric = isinstance(ranks, Tensor) and ranks.dtype in (*checks.INTEGERS, *checks.FLOATS)
    expected = f"an integer or float tensor of shape {list(scores.shape)} on {scores.device}"
    fits = numeric and ranks.shape == scores.shape and ranks.device == scores.device
    checks.require(fits, "ranks", ranks, expected)
    offsets = isinstance(prompt_offsets, Tensor) and prompt_offsets.dtype in checks.INTEGERS
    fits = offsets and prompt_offsets.dim() == 1 and prompt_offsets.shape[0] > 1
    checks.require(
        fits and prompt_offsets.device == scores.device, "prompt_offsets", prompt_offsets,
        f"an integer tensor of shape [G + 1], G > 0, on {scores.device}",
    )  # fmt: skip
    checks.choice("reduction", reduction, REDUCTIONS)
    checks.choice("backend", backend, BACKENDS)
    loss, metrics, _ = _ranking_loss(scores, ranks, prompt_offsets, reduction == "prompts", backend)
    accuracy, pairs, margin = metrics.detach()[1:4].unbind()
    return RankingLoss(loss, accuracy, pairs, margin)
