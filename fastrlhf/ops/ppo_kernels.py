"""Kernel of the PPO losses: metrics and the gradients of their sums, for flat tokens [N]."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastrlhf.ops import checks, layouts
from fastrlhf.ops.dispatch import Kernel
from fastrlhf.ops.layouts import PPOMetric
from fastrlhf.ops.policy import (
    PolicyForm,
    PPOOptions,
    kl_terms,
    policy_terms,
    sequence_mean,
)
from fastrlhf.ops.scalars import clamp


class PPOTokens(NamedTuple):
    """Per-token inputs of the PPO loss; `values`, `old_values` and `returns` together or none."""

    logprobs: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    mask: Tensor
    values: Tensor | None
    old_values: Tensor | None
    returns: Tensor | None
    entropy: Tensor | None
    ref_logprobs: Tensor | None = None
    weights: Tensor | None = None


PLAIN = PolicyForm("clip", "token", "k3", 1)
"""The form of Schulman et al. 2017."""


def _ppo_loss_torch(
    tokens: PPOTokens, denominator: Tensor | None, options: PPOOptions, form: PolicyForm = PLAIN
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the metrics and the gradients of the sums.

    (metrics [11] as PPOMetric, d sum(policy + kl_coef kl) / d logprobs [N], value_coef * d
    sum(value) / d values [N], or [0] without values). The gradients are not yet divided by the
    denominator, so that they neither underflow in fp16 nor have to wait for the mask to be counted.
    """
    mask, dtype = tokens.mask, checks.compute_dtype(tokens.logprobs)

    def clean(x: Tensor) -> Tensor:
        return torch.where(mask, x.to(dtype), 0.0)

    total = mask.sum().clamp(min=1) if denominator is None else denominator
    scale = 1.0 / total.to(dtype)
    logprobs, log_ratio, grad_logprobs, policy, cut = _policy(tokens, options, form, clean)
    kl = zero = scale.new_zeros(())
    if tokens.ref_logprobs is not None:
        each, slope = kl_terms(logprobs, clean(tokens.ref_logprobs), form.kl_estimator)
        each, slope = _weighted(each, tokens, clean), _weighted(slope, tokens, clean)
        kl, grad_logprobs = each.sum(), grad_logprobs + options.kl_coef * clean(slope)
    value, value_clipped, grad_values = _value_terms(tokens, options, clean)
    entropy = zero
    if tokens.entropy is not None:
        entropy = _weighted(clean(tokens.entropy), tokens, clean).sum()
    kept_ratio = torch.where(mask, log_ratio.exp(), 0.0)
    metrics = scale * layouts.stack(
        PPOMetric,
        loss=zero,
        policy_loss=policy,
        value_loss=value,
        entropy=entropy,
        clip_fraction=cut.sum(dtype=dtype),
        value_clip_fraction=value_clipped,
        approx_kl=(torch.expm1(log_ratio) - log_ratio).sum(),
        ratio_mean=kept_ratio.sum(),
        ratio_max=zero,
        kl=kl,
        grad_scale=zero + 1,
    )
    metrics[PPOMetric.LOSS] = (
        metrics[PPOMetric.POLICY_LOSS]
        + options.value_coef * metrics[PPOMetric.VALUE_LOSS]
        - options.entropy_coef * metrics[PPOMetric.ENTROPY]
    )
    if tokens.ref_logprobs is not None:
        metrics[PPOMetric.LOSS] += options.kl_coef * metrics[PPOMetric.KL]
    if mask.numel():
        metrics[PPOMetric.RATIO_MAX] = kept_ratio.max()
    return metrics, grad_logprobs, grad_values


def _weighted(x: Tensor, tokens: PPOTokens, clean: Callable[[Tensor], Tensor]) -> Tensor:
    return x if tokens.weights is None else x * clean(tokens.weights)


def _policy(
    tokens: PPOTokens,
    options: PPOOptions,
    form: PolicyForm,
    clean: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return (logprobs, log-ratio, gradient of the policy's sum, that sum, where it is cut)."""
    logprobs, advantage = clean(tokens.logprobs), clean(tokens.advantages)
    log_ratio = logprobs - clean(tokens.old_logprobs)
    by_sequence = form.ratio == "sequence"
    if by_sequence:
        log_ratio = sequence_mean(log_ratio, tokens.mask, form.length)
    terms = policy_terms(log_ratio, advantage, logprobs, options, form.objective)
    gradient = _weighted(terms.slope, tokens, clean)
    if by_sequence and form.objective == "clip":
        # every token of a sequence moves its ratio by 1 / n, and with it the terms of all
        gradient = sequence_mean(gradient, tokens.mask, form.length)
    cut = terms.cut & tokens.mask
    return logprobs, log_ratio, gradient, _weighted(terms.loss, tokens, clean).sum(), cut


def _value_terms(
    tokens: PPOTokens, options: PPOOptions, clean: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (sum of the value loss, number of clipped values, gradient [N] or [0])."""
    dtype = checks.compute_dtype(tokens.logprobs)
    if tokens.values is None or tokens.old_values is None or tokens.returns is None:
        zero = tokens.logprobs.new_zeros((), dtype=dtype)
        return zero, zero, tokens.logprobs.new_empty(0, dtype=dtype)
    v, old, target = (clean(t) for t in (tokens.values, tokens.old_values, tokens.returns))
    step, bounded = v - old, clamp(v - old, -options.value_clip, options.value_clip)
    error, clipped_error = v - target, old + bounded - target
    # A step inside the bound is never cut: old + (v - old) may round past v, which would lose its
    # gradient.
    cut = (step != bounded) & (clipped_error.square() > error.square())
    squares = torch.where(cut, clipped_error, error).square()
    value = 0.5 * _weighted(squares, tokens, clean).sum()
    gradient = torch.where(cut, 0.0, options.value_coef * error)
    return value, cut.sum(dtype=dtype), _weighted(gradient, tokens, clean)


KERNEL = Kernel("ppo_loss", _ppo_loss_torch, "fastrlhf.kernels.ppo_loss")
