"""The clipped PPO policy and value losses (Schulman et al. 2017, equation 7).

Value clipping is that of the paper's reference code. The forward also computes the gradient, which
depends on nothing later except the upstream scalar.
Out of scope: the KL penalty, which is part of the rewards (advantage.py), and sums across ranks
(pass `denominator`).
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fastrlhf.ops import checks, layouts
from fastrlhf.ops.dispatch import BACKENDS, Kernel
from fastrlhf.ops.layouts import PPOMetric
from fastrlhf.ops.registry import Context, Gradients, custom_op
from fastrlhf.ops.rows import flat, map_tensors


class PPOLoss(NamedTuple):
    """0-dim fp32 tensors, detached except for `loss`.

    Means over the mask, or sums / denominator (not ratio_max).
    """

    loss: Tensor
    """policy_loss + value_coef * value_loss - entropy_coef * entropy"""
    policy_loss: Tensor
    """max(-A r, -A clip(r, 1 - clip, 1 + clip)), r = exp(logprobs - old_logprobs)"""
    value_loss: Tensor
    """0.5 max((v - R)^2, (v_clipped - R)^2)

    v_clipped = old_values + clip(v - old_values, -value_clip, value_clip)
    """
    entropy: Tensor
    clip_fraction: Tensor
    """Fraction of tokens whose clipped policy term is the larger one, so that the gradient is 0."""
    value_clip_fraction: Tensor
    approx_kl: Tensor
    """r - 1 - log r, which estimates KL(old || new) from the old policy's samples"""
    ratio_mean: Tensor
    ratio_max: Tensor
    """Largest ratio at a True position; 0 if there is none."""


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


class PPOOptions(NamedTuple):
    """Coefficients of the PPO loss."""

    clip: float
    value_clip: float
    value_coef: float
    entropy_coef: float


def ppo_loss_ref(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip: float = 0.2,
    values: Tensor | None = None,
    old_values: Tensor | None = None,
    returns: Tensor | None = None,
    value_clip: float = 0.2,
    value_coef: float = 1.0,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    denominator: float | Tensor | None = None,
) -> PPOLoss:
    """Compute `ppo_loss` in plain torch and autograd, for tests and benchmarks to compare with."""
    dtype = checks.compute_dtype(logprobs)

    def clean(x: Tensor) -> Tensor:
        return torch.where(mask, x.to(dtype), 0.0)

    total = mask.sum().clamp(min=1) if denominator is None else denominator

    def mean(x: Tensor) -> Tensor:
        return torch.where(mask, x, 0.0).sum() / total

    log_ratio = clean(logprobs) - clean(old_logprobs)
    ratio, advantage = log_ratio.exp(), clean(advantages)
    plain, clipped = -advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip)
    policy = mean(torch.maximum(plain, clipped))
    value = value_clipped = entropy_mean = policy.new_zeros(())
    if values is not None and old_values is not None and returns is not None:
        v, old, target = clean(values), clean(old_values), clean(returns)
        inside = (old + (v - old).clamp(-value_clip, value_clip) - target).square()
        value = mean(0.5 * torch.maximum((v - target).square(), inside))
        value_clipped = mean((inside > (v - target).square()).to(dtype))
    if entropy is not None:
        entropy_mean = mean(clean(entropy))
    return PPOLoss(
        loss=policy + value_coef * value - entropy_coef * entropy_mean,
        policy_loss=policy.detach(),
        value_loss=value.detach(),
        entropy=entropy_mean.detach(),
        clip_fraction=mean((clipped > plain).to(dtype)).detach(),
        value_clip_fraction=value_clipped.detach(),
        approx_kl=mean(torch.expm1(log_ratio) - log_ratio).detach(),
        ratio_mean=mean(ratio).detach(),
        ratio_max=torch.where(mask, ratio, 0.0).max().detach(),
    )


def _ppo_loss_torch(
    tokens: PPOTokens, denominator: Tensor | None, options: PPOOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the metrics and the gradients of the sums, for flat tokens [N].

    (metrics [10] as PPOMetric, d sum(policy) / d logprobs [N], value_coef * d sum(value) / d values
    [N], or [0] without values). The gradients are not yet divided by the denominator, so that they
    neither underflow in fp16 nor have to wait for the mask to be counted.
    """
    logprobs, mask, dtype = tokens.logprobs, tokens.mask, checks.compute_dtype(tokens.logprobs)

    def clean(x: Tensor) -> Tensor:
        return torch.where(mask, x.to(dtype), 0.0)

    total = mask.sum().clamp(min=1) if denominator is None else denominator
    scale = 1.0 / total.to(dtype)
    log_ratio = clean(logprobs) - clean(tokens.old_logprobs)
    ratio, advantage = log_ratio.exp(), clean(tokens.advantages)
    clipped_ratio = ratio.clamp(1 - options.clip, 1 + options.clip)
    plain, clipped = -advantage * ratio, -advantage * clipped_ratio
    grad_logprobs = torch.where(clipped > plain, 0.0, plain)
    zero = scale.new_zeros(())
    value, value_clipped, grad_values = _value_terms(tokens, options)
    entropy = zero if tokens.entropy is None else clean(tokens.entropy).sum()
    kept_ratio = torch.where(mask, ratio, 0.0)
    metrics = scale * layouts.stack(
        PPOMetric,
        loss=zero,
        policy_loss=torch.maximum(plain, clipped).sum(),
        value_loss=value,
        entropy=entropy,
        clip_fraction=(clipped > plain).sum(dtype=dtype),
        value_clip_fraction=value_clipped,
        approx_kl=(torch.expm1(log_ratio) - log_ratio).sum(),
        ratio_mean=kept_ratio.sum(),
        ratio_max=zero,
        grad_scale=zero + 1,
    )
    metrics[PPOMetric.LOSS] = (
        metrics[PPOMetric.POLICY_LOSS]
        + options.value_coef * metrics[PPOMetric.VALUE_LOSS]
        - options.entropy_coef * metrics[PPOMetric.ENTROPY]
    )
    if mask.numel():
        metrics[PPOMetric.RATIO_MAX] = kept_ratio.max()
    return metrics, grad_logprobs, grad_values


def _value_terms(tokens: PPOTokens, options: PPOOptions) -> tuple[Tensor, Tensor, Tensor]:
    """Return (sum of the value loss, number of clipped values, gradient [N] or [0])."""
    dtype = checks.compute_dtype(tokens.logprobs)
    if tokens.values is None or tokens.old_values is None or tokens.returns is None:
        zero = tokens.logprobs.new_zeros((), dtype=dtype)
        return zero, zero, tokens.logprobs.new_empty(0, dtype=dtype)
    v, old, target = (
        torch.where(tokens.mask, t.to(dtype), 0.0)
        for t in (tokens.values, tokens.old_values, tokens.returns)
    )
    step, bounded = v - old, (v - old).clamp(-options.value_clip, options.value_clip)
    error, clipped_error = v - target, old + bounded - target
    # A step inside the bound is never cut: old + (v - old) may round past v, which would lose its
    # gradient.
    cut = (step != bounded) & (clipped_error.square() > error.square())
    value = 0.5 * torch.where(cut, clipped_error, error).square().sum()
    return value, cut.sum(dtype=dtype), torch.where(cut, 0.0, options.value_coef * error)


KERNEL = Kernel("ppo_loss", _ppo_loss_torch, "fastrlhf.kernels.ppo_loss")


class _Outputs(NamedTuple):
    loss: Tensor
    metrics: Tensor
    grad_logprobs: Tensor
    grad_values: Tensor


@custom_op("ppo_loss")
def _ppo_loss(
    tokens: PPOTokens, denominator: Tensor | None, options: PPOOptions, backend: str
) -> _Outputs:
    run = KERNEL.implementation(tokens.logprobs, backend)
    metrics, grad_logprobs, grad_values = run(map_tensors(flat, tokens), denominator, options)
    if tokens.values is not None:
        grad_values = grad_values.view(tokens.values.shape)
    loss = metrics[PPOMetric.LOSS].clone()
    return _Outputs(loss, metrics, grad_logprobs.view(tokens.logprobs.shape), grad_values)


@_ppo_loss.register_fake
def _(tokens: PPOTokens, denominator: Tensor | None, options: PPOOptions, backend: str) -> _Outputs:
    def empty(*shape: int) -> Tensor:
        return tokens.logprobs.new_empty(shape, dtype=checks.compute_dtype(tokens.logprobs))

    values = empty(0) if tokens.values is None else empty(*tokens.values.shape)
    return _Outputs(empty(), empty(len(PPOMetric)), empty(*tokens.logprobs.shape), values)


class _Context(Context, Protocol):
    entropy_coef: float
    dtypes: tuple[torch.dtype | None, ...]
    """Of logprobs, values and entropy."""


def _setup(
    ctx: _Context,
    output: _Outputs,
    tokens: PPOTokens,
    denominator: Tensor | None,
    options: PPOOptions,
    backend: str,
) -> None:
    _, metrics, grad_logprobs, grad_values = output
    ctx.set_materialize_grads(False)
    ctx.entropy_coef = options.entropy_coef
    differentiable = (tokens.logprobs, tokens.values, tokens.entropy)
    ctx.dtypes = tuple(None if t is None else t.dtype for t in differentiable)
    ctx.save_for_backward(metrics, grad_logprobs, grad_values, tokens.mask)


def _ppo_loss_grad(ctx: _Context, grad_loss: Tensor | None, *_: Tensor | None) -> Gradients:
    if grad_loss is None:
        return {}
    metrics, grad_logprobs, grad_values, mask = ctx.saved_tensors
    upstream = grad_loss * metrics[PPOMetric.GRAD_SCALE]
    needs_logprobs, needs_values, needs_entropy = _ppo_loss.needs_grad(
        ctx, "logprobs", "values", "entropy"
    )
    gradients: dict[str, Tensor | None] = {}
    if needs_logprobs:
        gradients["logprobs"] = (grad_logprobs * upstream).to(ctx.dtypes[0])
    if needs_values:
        gradients["values"] = (grad_values * upstream).to(ctx.dtypes[1])
    if needs_entropy:
        entropy = torch.where(mask, -ctx.entropy_coef * upstream, 0.0)
        gradients["entropy"] = entropy.to(ctx.dtypes[2])
    return gradients


_ppo_loss.register_autograd(_ppo_loss_grad, _setup)


def as_denominator(denominator: float | Tensor | None, like: Tensor) -> Tensor | None:
    """Return the denominator as a 0-dim tensor on the device of `like`.

    A float is filled in on the device, which waits for nothing.
    """
    if denominator is None or isinstance(denominator, Tensor):
        return denominator
    return torch.full((), float(denominator), dtype=checks.compute_dtype(like), device=like.device)


def result_from(loss: Tensor, metrics: Tensor) -> PPOLoss:
    """Return the differentiable loss with the other metrics [10], detached."""
    _, *details, _grad_scale = metrics.detach().unbind()
    return PPOLoss(loss, *details)


def ppo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip: float = 0.2,
    values: Tensor | None = None,
    old_values: Tensor | None = None,
    returns: Tensor | None = None,
    value_clip: float = 0.2,
    value_coef: float = 1.0,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    denominator: float | Tensor | None = None,
    backend: str = "auto",
) -> PPOLoss:
    """Return the policy, value and entropy terms of PPO and their metrics, in one pass.

    PPOLoss has the equations. `loss` is differentiable in logprobs, values and entropy;
    old_logprobs, advantages, old_values, returns and denominator are constants.

    Args:
        logprobs, old_logprobs, advantages, entropy: [...] fp32, bf16 or fp16.
        mask: [...] bool. False positions do not count, whatever they hold.
        values, old_values, returns: [...], all three or none.
        denominator: Makes every field a sum / denominator, so that micro-batches and ranks add up:
            a float or a 0-dim tensor, such as the token count of the global batch.

    Raises ValueError on wrong shapes and dtypes.
    """
    checks.floating("logprobs", logprobs)
    shape, device = logprobs.shape, logprobs.device
    required = {"old_logprobs": old_logprobs, "advantages": advantages}
    optional = {"values": values, "old_values": old_values, "returns": returns, "entropy": entropy}
    for name, tensor in {
        **required,
        **{k: v for k, v in optional.items() if v is not None},
    }.items():
        checks.like(name, tensor, shape, device)
    checks.like("mask", mask, shape, device, "bool")
    for name in ("values", "old_values", "returns"):
        together = (optional[name] is None) == (values is None)
        expected = "values, old_values and returns together, or none of them"
        checks.require(together, name, optional[name], expected)
    checks.positive("clip", clip)
    checks.positive("value_clip", value_clip)
    checks.denominator(denominator, device)
    checks.choice("backend", backend, BACKENDS)
    options = PPOOptions(float(clip), float(value_clip), float(value_coef), float(entropy_coef))
    tokens = PPOTokens(
        logprobs, old_logprobs, advantages, mask, values, old_values, returns, entropy
    )
    loss, metrics, _, _ = _ppo_loss(tokens, as_denominator(denominator, logprobs), options, backend)
    return result_from(loss, metrics)
