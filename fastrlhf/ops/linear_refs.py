"""The losses from hidden states in plain torch, for tests and benchmarks to compare with."""

from __future__ import annotations

import torch
from torch import Tensor

from fastrlhf.ops import ppo
from fastrlhf.ops.linear import linear_logits_ref, linear_logprobs_ref
from fastrlhf.ops.ppo import PPOLoss
from fastrlhf.ops.scalars import Number


def linear_cross_entropy_ref(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    mask: Tensor,
    *,
    bias: Tensor | None = None,
    denominator: Number | None = None,
    temperature: Number = 1.0,
    softcap: Number | None = None,
    label_smoothing: Number = 0.0,
    z_loss: Number = 0.0,
) -> Tensor:
    """Compute `linear_cross_entropy` with autograd, holding the logits."""
    tokens = linear_logprobs_ref(
        hidden, weight, labels, bias=bias, mask=mask, temperature=temperature, softcap=softcap
    )
    total = mask.sum().clamp(min=1) if denominator is None else denominator
    mean = linear_logits_ref(hidden, weight, bias).to(tokens.logsumexp.dtype).mean(-1) / temperature
    uniform = torch.where(mask, tokens.logsumexp - mean, 0.0)
    each = label_smoothing * uniform - (1 - label_smoothing) * tokens.logprobs
    return (each + z_loss * tokens.logsumexp.square()).sum() / total


def linear_ppo_loss_ref(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip: Number | tuple[Number, Number] = 0.2,
    dual_clip: Number | None = None,
    ref_logprobs: Tensor | None = None,
    kl_coef: Number = 0.0,
    kl_estimator: str = "k3",
    weights: Tensor | None = None,
    objective: str = "clip",
    ratio: str = "token",
    entropy_coef: Number = 0.0,
    temperature: Number = 1.0,
    softcap: Number | None = None,
    bias: Tensor | None = None,
    denominator: Number | None = None,
) -> PPOLoss:
    """Compute `linear_ppo_loss` with autograd, holding the logits."""
    tokens = linear_logprobs_ref(
        hidden, weight, labels, bias=bias, mask=mask, temperature=temperature, softcap=softcap
    )
    return ppo.ppo_loss_ref(
        tokens.logprobs,
        old_logprobs,
        advantages,
        mask,
        clip=clip,
        dual_clip=dual_clip,
        ref_logprobs=ref_logprobs,
        kl_coef=kl_coef,
        kl_estimator=kl_estimator,
        weights=weights,
        objective=objective,
        ratio=ratio,
        entropy=tokens.entropy,
        entropy_coef=entropy_coef,
        denominator=denominator,
    )
