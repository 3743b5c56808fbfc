"""The clipped PPO policy and value losses (Schulman et al. 2017, equation 7; value clipping as in its reference code).

The forward forms the gradient as well, since nothing that it depends on but the upstream scalar comes later.
Left out on purpose: the KL penalty (it is in the rewards: advantage.py) and sums across ranks (pass `denominator`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrlhf.ops import checks
from fastrlhf.ops.dispatch import BACKENDS, Kernel
from fastrlhf.ops.registry import custom_op, register_autograd, register_fake
from fastrlhf.ops.rows import flat


class PPOLoss(NamedTuple):
    """0-dim fp32 tensors; all but `loss` detached. Means over the mask, or sums / denominator (not ratio_max)."""

    loss: Tensor
    """policy_loss + value_coef * value_loss - entropy_coef * entropy"""
    policy_loss: Tensor
    """max(-A r, -A clip(r, 1 - clip, 1 + clip)), r = exp(logprobs - old_logprobs)"""
    value_loss: Tensor
    """0.5 max((v - R)^2, (v_clipped - R)^2), v_clipped = old_values + clip(v - old_values, -value_clip, value_clip)"""
    entropy: Tensor
    clip_fraction: Tensor
    """where the clipped policy term is the larger one, so that the gradient is cut"""
    value_clip_fraction: Tensor
    approx_kl: Tensor
    """r - 1 - log r, which estimates KL(old || new) from the old policy's samples"""
    ratio_mean: Tensor
    ratio_max: Tensor
    """over True positions; 0 when there are none"""


def ppo_loss_ref(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *, clip: float = 0.2,
    values: Tensor | None = None, old_values: Tensor | None = None, returns: Tensor | None = None,
    value_clip: float = 0.2, value_coef: float = 1.0, entropy: Tensor | None = None, entropy_coef: float = 0.0,
    denominator: float | Tensor | None = None,
) -> PPOLoss:  # fmt: skip
    """Plain torch, differentiated by autograd: what tests and benchmarks compare with."""
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
    metrics = (
        policy, value, entropy_mean, mean((clipped > plain).to(dtype)), value_clipped,
        mean(torch.expm1(log_ratio) - log_ratio), mean(ratio), torch.where(mask, ratio, 0.0).max(),
    )  # fmt: skip
    loss = policy + value_coef * value - entropy_coef * entropy_mean
    return PPOLoss(loss, *(m.detach() for m in metrics))


def _ppo_loss_torch(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, values: Tensor | None,
    old_values: Tensor | None, returns: Tensor | None, entropy: Tensor | None, denominator: Tensor | None, clip: float,
    value_clip: float, value_coef: float, entropy_coef: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(metrics [10], d sum(policy) / d logprobs [N], value_coef * d sum(value) / d values [N], or [0] without values).

    metrics: the fields of PPOLoss in order, then 1 / denominator. The gradients are of sums, not yet divided by the
    denominator, so that they neither underflow in fp16 nor have to wait for the mask to be counted.
    """
    dtype = checks.compute_dtype(logprobs)

    def clean(x: Tensor) -> Tensor:
        return torch.where(mask, x.to(dtype), 0.0)

    scale = 1.0 / (
        mask.sum().clamp(min=1).to(dtype) if denominator is None else denominator.to(dtype)
    )
    log_ratio = clean(logprobs) - clean(old_logprobs)
    ratio, advantage = log_ratio.exp(), clean(advantages)
    plain, clipped = -advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip)
    grad_logprobs = torch.where(clipped > plain, 0.0, plain)
    sums = (
        [torch.maximum(plain, clipped).sum()]
        + [scale.new_zeros(())] * 2
        + [(clipped > plain).sum(dtype=dtype)]
    )
    value_clipped, grad_values = scale.new_zeros(()), logprobs.new_empty(0, dtype=dtype)
    if values is not None and old_values is not None and returns is not None:
        v, old, target = clean(values), clean(old_values), clean(returns)
        step, bounded = v - old, (v - old).clamp(-value_clip, value_clip)
        off, off_clipped = v - target, old + bounded - target
        # a step inside the bound is never cut: old + (v - old) may round past v, which would lose its gradient
        cut = (step != bounded) & (off_clipped.square() > off.square())
        sums[1] = 0.5 * torch.where(cut, off_clipped, off).square().sum()
        value_clipped = cut.sum(dtype=dtype)
        grad_values = torch.where(cut, 0.0, value_coef * off)
    if entropy is not None:
        sums[2] = clean(entropy).sum()
    approx_kl = (torch.expm1(log_ratio) - log_ratio).sum()
    means = (
        torch.stack([*sums, value_clipped, approx_kl, torch.where(mask, ratio, 0.0).sum()]) * scale
    )
    loss = means[0] + value_coef * means[1] - entropy_coef * means[2]
    ratio_max = torch.where(mask, ratio, 0.0).max() if mask.numel() else torch.zeros_like(loss)
    return torch.cat([loss[None], means, ratio_max[None], scale[None]]), grad_logprobs, grad_values


KERNEL = Kernel("ppo_loss", _ppo_loss_torch, "fastrlhf.kernels.ppo_loss")


@custom_op(
    "ppo_loss",
    "(Tensor logprobs, Tensor old_logprobs, Tensor advantages, Tensor mask, Tensor? values, Tensor? old_values,"
    " Tensor? returns, Tensor? entropy, Tensor? denominator, float clip, float value_clip, float value_coef,"
    " float entropy_coef, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _ppo_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, values: Tensor | None,
    old_values: Tensor | None, returns: Tensor | None, entropy: Tensor | None, denominator: Tensor | None, clip: float,
    value_clip: float, value_coef: float, entropy_coef: float, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    per_token = (logprobs, old_logprobs, advantages, mask, values, old_values, returns, entropy)
    body = KERNEL.on(logprobs, backend)
    options = (clip, value_clip, value_coef, entropy_coef)
    metrics, grad_logprobs, grad_values = body(*(flat(t) for t in per_token), denominator, *options)
    grad_values = grad_values if values is None else grad_values.view(values.shape)
    return metrics[0].clone(), metrics, grad_logprobs.view(logprobs.shape), grad_values


@register_fake(_ppo_loss)
def _(logprobs, old_logprobs, advantages, mask, values, *_):  # type: ignore[no-untyped-def]
    def empty(*shape: int) -> Tensor:
        return logprobs.new_empty(shape, dtype=checks.compute_dtype(logprobs))

    return (
        empty(),
        empty(10),
        empty(*logprobs.shape),
        empty(0) if values is None else empty(*values.shape),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, metrics, grad_logprobs, grad_values = output
    ctx.set_materialize_grads(False)
    ctx.entropy_coef = inputs[12]
    values, entropy = inputs[4], inputs[7]
    ctx.dtypes = tuple(None if t is None else t.dtype for t in (inputs[0], values, entropy))
    ctx.save_for_backward(metrics, grad_logprobs, grad_values, inputs[3])


def _grad(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Any, ...]:
    grads: list[Tensor | None] = [None] * 14
    if grad_loss is None:
        return tuple(grads)
    metrics, grad_logprobs, grad_values, mask = ctx.saved_tensors
    upstream = grad_loss * metrics[9]
    if ctx.needs_input_grad[0]:
        grads[0] = (grad_logprobs * upstream).to(ctx.dtypes[0])
    if ctx.needs_input_grad[4]:
        grads[4] = (grad_values * upstream).to(ctx.dtypes[1])
    if ctx.needs_input_grad[7]:
        grads[7] = torch.where(mask, -ctx.entropy_coef * upstream, 0.0).to(ctx.dtypes[2])
    return tuple(grads)


register_autograd(_ppo_loss, _grad, _setup)


def as_denominator(denominator: float | Tensor | None, like: Tensor) -> Tensor | None:
    """The denominator as a 0-dim tensor beside `like`; a float becomes one by a fill, which waits for nothing."""
    if denominator is None or isinstance(denominator, Tensor):
        return denominator
    return torch.full((), float(denominator), dtype=checks.compute_dtype(like), device=like.device)


def ppo_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *, clip: float = 0.2,
    values: Tensor | None = None, old_values: Tensor | None = None, returns: Tensor | None = None,
    value_clip: float = 0.2, value_coef: float = 1.0, entropy: Tensor | None = None, entropy_coef: float = 0.0,
    denominator: float | Tensor | None = None, backend: str = "auto",
) -> PPOLoss:  # fmt: skip
    """Policy, value and entropy terms of PPO, with their metrics, in one pass; see PPOLoss for the equations.

    All tensors [...], fp32/bf16/fp16, mask bool; False positions count for nothing whatever they hold. `values`,
    `old_values` and `returns` come together or not at all. `denominator` (a float or a 0-dim tensor, such as the token
    count of the whole global batch) makes every field a sum / denominator, so that micro-batches and ranks add up.
    `loss` is differentiable in logprobs, values and entropy; old_logprobs, advantages, old_values, returns and
    denominator are constants. Raises ValueError on wrong shapes and dtypes.
    """
    checks.floating("logprobs", logprobs)
    shape, device = logprobs.shape, logprobs.device
    given = {"old_logprobs": old_logprobs, "advantages": advantages}
    optional = {"values": values, "old_values": old_values, "returns": returns, "entropy": entropy}
    for name, tensor in {**given, **{k: v for k, v in optional.items() if v is not None}}.items():
        checks.like(name, tensor, shape, device)
    checks.like("mask", mask, shape, device, "bool")
    for name in ("values", "old_values", "returns"):
        together = (optional[name] is None) == (values is None)
        checks.require(
            together,
            name,
            optional[name],
            "values, old_values and returns together, or none of them",
        )
    checks.positive("clip", clip)
    checks.positive("value_clip", value_clip)
    checks.denominator(denominator, device)
    checks.choice("backend", backend, BACKENDS)
    divide_by = as_denominator(denominator, logprobs)
    loss, metrics, _, _ = _ppo_loss(
        logprobs, old_logprobs, advantages, mask, values, old_values, returns, entropy, divide_by, float(clip),
        float(value_clip), float(value_coef), float(entropy_coef), backend,
    )  # fmt: skip
    return PPOLoss(loss, *metrics.detach()[1:9].unbind())
