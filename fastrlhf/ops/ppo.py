"""The clipped PPO policy and value losses (Schulman et al. 2017, equation 7) and their relatives.

Value clipping is that of the paper's reference code. The forward also computes the gradient, which
depends on nothing later except the upstream scalar. policy.py has the options.
Out of scope: a KL penalty in the rewards (advantage.py), and sums across ranks (pass
`denominator`).
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fastrlhf.ops import checks
from fastrlhf.ops.dispatch import BACKENDS
from fastrlhf.ops.kl import token_kl
from fastrlhf.ops.layouts import PPOMetric
from fastrlhf.ops.policy import PolicyArguments, PolicyForm, PPOOptions
from fastrlhf.ops.ppo_kernels import KERNEL, PPOTokens
from fastrlhf.ops.registry import Context, Gradients, custom_op
from fastrlhf.ops.rows import flat, map_tensors
from fastrlhf.ops.scalars import Number, as_tensor, clamp, pack, unpack


class PPOLoss(NamedTuple):
    """0-dim fp32 tensors, detached except for `loss`.

    Means over the mask, or sums / denominator (not ratio_max). `weights` multiply policy_loss,
    value_loss, entropy and kl, not the other fields.
    """

    loss: Tensor
    """policy_loss + value_coef * value_loss - entropy_coef * entropy + kl_coef * kl"""
    policy_loss: Tensor
    """max(-A r, -A clip(r, 1 - low, 1 + high)), r = exp(logprobs - old_logprobs)"""
    value_loss: Tensor
    """0.5 max((v - R)^2, (v_clipped - R)^2)

    v_clipped = old_values + clip(v - old_values, -value_clip, value_clip)
    """
    entropy: Tensor
    clip_fraction: Tensor
    """Fraction of tokens whose clipped policy term is the larger one, so that the gradient is 0.

    With objective="cispo": whose ratio is outside the bounds.
    """
    value_clip_fraction: Tensor
    approx_kl: Tensor
    """r - 1 - log r, which estimates KL(old || new) from the old policy's samples"""
    ratio_mean: Tensor
    ratio_max: Tensor
    """Largest ratio at a True position; 0 if there is none."""
    kl: Tensor
    """The estimate of KL(pi || ref); 0 without ref_logprobs."""


def ppo_loss_ref(
    logprobs: Tensor,
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
    values: Tensor | None = None,
    old_values: Tensor | None = None,
    returns: Tensor | None = None,
    value_clip: Number = 0.2,
    value_coef: Number = 1.0,
    entropy: Tensor | None = None,
    entropy_coef: Number = 0.0,
    denominator: Number | None = None,
) -> PPOLoss:
    """Compute `ppo_loss` in plain torch and autograd, for tests and benchmarks to compare with."""
    dtype = checks.compute_dtype(logprobs)

    def clean(x: Tensor) -> Tensor:
        return torch.where(mask, x.to(dtype), 0.0)

    total = mask.sum().clamp(min=1) if denominator is None else denominator
    weight = clean(torch.ones_like(mask) if weights is None else weights)

    def mean(x: Tensor) -> Tensor:
        return torch.where(mask, x, 0.0).sum() / total

    low, high = clip if isinstance(clip, tuple) else (clip, clip)
    logp, advantage = clean(logprobs), clean(advantages)
    log_r = logp - clean(old_logprobs)
    if ratio == "sequence":
        log_r = log_r.sum(-1, True) / mask.sum(-1, keepdim=True).clamp(min=1)
        log_r = clean(log_r.expand_as(logp))
    r = log_r.exp()
    bounded = clamp(r, 1 - low, 1 + high)
    plain, clipped = -advantage * r, -advantage * bounded
    per_token, cut = torch.maximum(plain, clipped), clipped > plain
    if objective == "cispo":
        per_token, cut = -advantage * bounded.detach() * logp, bounded != r
    elif dual_clip is not None:
        ceiling = torch.where(advantage < 0, -advantage * dual_clip, torch.inf)
        per_token, cut = torch.minimum(per_token, ceiling), cut | (per_token > ceiling)
    policy = mean(weight * per_token)
    value = value_clipped = entropy_mean = kl = policy.new_zeros(())
    if values is not None and old_values is not None and returns is not None:
        v, old, target = clean(values), clean(old_values), clean(returns)
        inside = (old + clamp(v - old, -value_clip, value_clip) - target).square()
        value = mean(weight * 0.5 * torch.maximum((v - target).square(), inside))
        value_clipped = mean((inside > (v - target).square()).to(dtype))
    if entropy is not None:
        entropy_mean = mean(weight * clean(entropy))
    if ref_logprobs is not None:
        kl = mean(weight * token_kl(logp, clean(ref_logprobs), kl_estimator))
    return PPOLoss(
        loss=policy + value_coef * value - entropy_coef * entropy_mean + kl_coef * kl,
        policy_loss=policy.detach(),
        value_loss=value.detach(),
        entropy=entropy_mean.detach(),
        clip_fraction=mean(cut.to(dtype)).detach(),
        value_clip_fraction=value_clipped.detach(),
        approx_kl=mean(torch.expm1(log_r) - log_r).detach(),
        ratio_mean=mean(r).detach(),
        ratio_max=torch.where(mask, r, 0.0).max().detach(),
        kl=kl.detach(),
    )


class _Outputs(NamedTuple):
    loss: Tensor
    metrics: Tensor
    grad_logprobs: Tensor
    grad_values: Tensor


@custom_op("ppo_loss")
def _ppo_loss(
    tokens: PPOTokens,
    denominator: Tensor | None,
    scalars: Tensor,
    form: PolicyForm,
    backend: str,
) -> _Outputs:
    run, options = KERNEL.implementation(tokens.logprobs, backend), PPOOptions(*unpack(scalars))
    flat_tokens = map_tensors(flat, tokens)
    metrics, grad_logprobs, grad_values = run(flat_tokens, denominator, options, form)
    if tokens.values is not None:
        grad_values = grad_values.view(tokens.values.shape)
    loss = metrics[PPOMetric.LOSS].clone()
    return _Outputs(loss, metrics, grad_logprobs.view(tokens.logprobs.shape), grad_values)


@_ppo_loss.register_fake
def _(tokens: PPOTokens, *_: object) -> _Outputs:
    def empty(*shape: int) -> Tensor:
        return tokens.logprobs.new_empty(shape, dtype=checks.compute_dtype(tokens.logprobs))

    values = empty(0) if tokens.values is None else empty(*tokens.values.shape)
    return _Outputs(empty(), empty(len(PPOMetric)), empty(*tokens.logprobs.shape), values)


class _Context(Context, Protocol):
    dtypes: tuple[torch.dtype | None, ...]
    """Of logprobs, values and entropy."""


def _setup(
    ctx: _Context,
    output: _Outputs,
    tokens: PPOTokens,
    denominator: Tensor | None,
    scalars: Tensor,
    form: PolicyForm,
    backend: str,
) -> None:
    _, metrics, grad_logprobs, grad_values = output
    ctx.set_materialize_grads(False)
    differentiable = (tokens.logprobs, tokens.values, tokens.entropy)
    ctx.dtypes = tuple(None if t is None else t.dtype for t in differentiable)
    constants = (tokens.mask, tokens.weights, scalars)
    ctx.save_for_backward(metrics, grad_logprobs, grad_values, *constants)


def _ppo_loss_grad(ctx: _Context, grad_loss: Tensor | None, *_: Tensor | None) -> Gradients:
    if grad_loss is None:
        return {}
    metrics, grad_logprobs, grad_values, mask, weights, scalars = ctx.saved_tensors
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
        each = -scalars[PPOOptions._fields.index("entropy_coef")] * upstream
        entropy = torch.where(mask, each if weights is None else each * weights, 0.0)
        gradients["entropy"] = entropy.to(ctx.dtypes[2])
    return gradients


_ppo_loss.register_autograd(_ppo_loss_grad, _setup)


def result_from(loss: Tensor, metrics: Tensor) -> PPOLoss:
    """Return the differentiable loss with the other metrics [11], detached."""
    _, *details, _grad_scale = metrics.detach().unbind()
    return PPOLoss(loss, *details)


def ppo_loss(
    logprobs: Tensor,
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
    values: Tensor | None = None,
    old_values: Tensor | None = None,
    returns: Tensor | None = None,
    value_clip: Number = 0.2,
    value_coef: Number = 1.0,
    entropy: Tensor | None = None,
    entropy_coef: Number = 0.0,
    denominator: Number | None = None,
    backend: str = "auto",
) -> PPOLoss:
    """Return the policy, value, entropy and KL terms of PPO and their metrics, in one pass.

    PPOLoss has the equations. `loss` is differentiable in logprobs, values and entropy; all other
    tensors, and scalars (numbers or 0-dim tensors), are constants.

    Args:
        logprobs, old_logprobs, advantages, entropy: [...] fp32, bf16 or fp16.
        mask: [...] bool. False positions do not count, whatever they hold.
        clip: Bounds of the ratio, 1 - clip and 1 + clip, or (low, high) for 1 - low and 1 + high
            (clip-higher: DAPO, arXiv 2503.14476).
        dual_clip: Bounds the loss of a token with A < 0 to -A dual_clip (arXiv 1912.09729).
        ref_logprobs: [...]. Adds kl_coef times the mean of `token_kl(logprobs, ref_logprobs,
            kl_estimator)`, as GRPO does (arXiv 2402.03300).
        weights: [...] float, multiplied into every term of the loss; the mask stays bool and the
            denominator what it is.
        objective: "clip", or "cispo" (arXiv 2506.13585): -A sg(clip(r)) log p, which keeps the
            gradient of clipped tokens.
        ratio: "token", or "sequence" (GSPO, arXiv 2507.18071): the exponential of the mean log-ratio
            over the True positions of the last dimension.
        values, old_values, returns: [...], all three or none.
        denominator: Makes every field a sum / denominator, so that micro-batches and ranks add up:
            such as the token count of the global batch.

    Raises ValueError on wrong shapes and dtypes.
    """
    checks.floating("logprobs", logprobs)
    shape, device = logprobs.shape, logprobs.device
    required = {"old_logprobs": old_logprobs, "advantages": advantages}
    optional = {"values": values, "old_values": old_values, "returns": returns, "entropy": entropy}
    given = {name: tensor for name, tensor in optional.items() if tensor is not None}
    for name, tensor in {**required, **given}.items():
        checks.like(name, tensor, shape, device)
    checks.like("mask", mask, shape, device, "bool")
    for name in ("values", "old_values", "returns"):
        together = (optional[name] is None) == (values is None)
        expected = "values, old_values and returns together, or none of them"
        checks.require(together, name, optional[name], expected)
    policy = PolicyArguments(
        clip, dual_clip, ref_logprobs, kl_coef, kl_estimator, weights, objective, ratio
    )
    form, options = policy.checked(shape, device)
    checks.positive("value_clip", value_clip)
    checks.denominator(denominator, device)
    checks.choice("backend", backend, BACKENDS)
    options = options._replace(
        value_clip=value_clip, value_coef=value_coef, entropy_coef=entropy_coef
    )
    given_values = (values, old_values, returns)
    constants = (old_logprobs, advantages, mask)
    tokens = PPOTokens(logprobs, *constants, *given_values, entropy, ref_logprobs, weights)
    divide_by, scalars = as_tensor(denominator, logprobs), pack(logprobs, *options)
    loss, metrics, _, _ = _ppo_loss(tokens, divide_by, scalars, form, backend)
    return result_from(loss, metrics)
