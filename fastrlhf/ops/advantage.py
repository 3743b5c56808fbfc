"""KL-shaped rewards and generalized advantage estimation over padded rollouts [B, T].

Not supported: gradients, since both are targets of the losses. Whitening alone is in masked.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastrlhf.ops import checks, layouts
from fastrlhf.ops.collectives import all_reduce_sum
from fastrlhf.ops.dispatch import BACKENDS, Kernel
from fastrlhf.ops.kl import ESTIMATORS, token_kl
from fastrlhf.ops.layouts import Moment
from fastrlhf.ops.registry import custom_op

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class RolloutTargets(NamedTuple):
    """Training targets of PPO, fp32 [B, T], 0 where the mask is False, without gradient."""

    rewards: Tensor
    kl: Tensor
    advantages: Tensor
    returns: Tensor


class Rollout(NamedTuple):
    """Inputs of the targets: scores [B], the others [B, T]."""

    scores: Tensor
    logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    mask: Tensor


class TargetOptions(NamedTuple):
    """Options of the KL penalty and of GAE."""

    estimator: str
    clip: float | None
    gamma: float
    lam: float


class ShapedGAE(NamedTuple):
    """RolloutTargets [B, T], and the advantages' moments [B, 3] by row, laid out as Moment."""

    rewards: Tensor
    kl: Tensor
    advantages: Tensor
    returns: Tensor
    moments: Tensor


def _is_last(mask: Tensor) -> Tensor:
    """Mark the last True position of each row; an all-False row has none."""
    from_here_on = mask.flip(-1).cumsum(-1).flip(-1)  # number of True positions
    return mask & (from_here_on == 1)


def shaped_rewards(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    kl_coef: float | Tensor,
    estimator: str = "k1",
    clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the per-token rewards of a rollout: -kl_coef * kl_t, plus the score at the last token.

    (InstructGPT, arXiv 2203.02155, equation 2, spread over tokens.) The last token is the row's
    last True position.

    Args:
        scores: [B].
        logprobs, ref_logprobs: [B, T].
        mask: [B, T] bool.
        kl_coef: A float or a 0-dim tensor (an adaptive controller's).
        clip: Bound on each token's |kl| before it is multiplied by kl_coef.

    Returns (rewards, kl), fp32 [B, T], 0 where the mask is False and without gradient. `kl` is not
    clipped, so that it can be logged.
    """
    checks.floating("logprobs", logprobs)
    checks.require(logprobs.dim() == 2, "logprobs", logprobs, "shape [B, T]")
    checks.like("scores", scores, logprobs.shape[:1], logprobs.device)
    checks.like("ref_logprobs", ref_logprobs, logprobs.shape, logprobs.device)
    checks.like("mask", mask, logprobs.shape, logprobs.device, "bool")
    checks.choice("estimator", estimator, ESTIMATORS)
    if clip is not None:
        checks.positive("clip", clip)
    with torch.no_grad():
        kl = torch.where(mask, token_kl(logprobs, ref_logprobs, estimator), 0.0)
        penalty = kl if clip is None else kl.clamp(-clip, clip)
        score = torch.where(_is_last(mask), scores.to(kl.dtype)[:, None], 0.0)
        return torch.where(mask, score - kl_coef * penalty, 0.0), kl


def _gae_torch(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Compute the recurrence as it is written, backwards, one position of all rows at a time."""
    dtype = checks.compute_dtype(rewards)
    advantages = torch.zeros(rewards.shape, dtype=dtype, device=rewards.device)
    returns = torch.zeros_like(advantages)
    next_advantage = next_value = advantages.new_zeros(rewards.shape[0])
    for t in range(rewards.shape[1] - 1, -1, -1):
        here, value = mask[:, t], values[:, t].to(dtype)
        delta = rewards[:, t].to(dtype) + gamma * next_value - value
        advantage = delta + gamma * lam * next_advantage
        advantages[:, t] = torch.where(here, advantage, 0.0)
        returns[:, t] = torch.where(here, advantage + value, 0.0)
        next_advantage = torch.where(here, advantage, next_advantage)
        next_value = torch.where(here, value, next_value)
    return advantages, returns


def _shaped_gae_torch(rollout: Rollout, kl_coef: Tensor, options: TargetOptions) -> ShapedGAE:
    scores, logprobs, ref_logprobs, values, mask = rollout
    penalty = (kl_coef, options.estimator, options.clip)
    rewards, kl = shaped_rewards(scores, logprobs, ref_logprobs, mask, *penalty)
    advantages, returns = _gae_torch(rewards, values, mask, options.gamma, options.lam)
    count = mask.sum(1).to(advantages.dtype)
    mean = advantages.sum(1) / count.clamp(min=1)
    squares = torch.where(mask, advantages - mean[:, None], 0.0).square().sum(1)
    moments = layouts.stack(Moment, dim=1, count=count, mean=mean, squared_deviations=squares)
    return ShapedGAE(rewards, kl, advantages, returns, moments)


KERNEL = Kernel("gae", _gae_torch, "fastrlhf.kernels.gae")
SHAPED = Kernel("shaped_gae", _shaped_gae_torch, "fastrlhf.kernels.gae")


@custom_op("gae")
def _gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float, backend: str
) -> tuple[Tensor, Tensor]:
    run = KERNEL.implementation(rewards, backend)
    return run(rewards.contiguous(), values.contiguous(), mask.contiguous(), gamma, lam)


@_gae.register_fake
def _(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float, backend: str
) -> tuple[Tensor, Tensor]:
    def empty() -> Tensor:
        return rewards.new_empty(rewards.shape, dtype=checks.compute_dtype(rewards))

    return empty(), empty()


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    gamma: float = 1.0,
    lam: float = 0.95,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Return the (advantages, returns) of generalized advantage estimation, fp32 [B, T].

        A_t = r_t + gamma v_next - v_t + gamma lam A_next,   R_t = A_t + v_t

    (Schulman et al. 2016, equation 16.) rewards, values [B, T]; mask [B, T] bool. False positions,
    interior ones too, are skipped: "next" is the next True position of the row, and v_next = A_next
    = 0 after the last. They hold 0 in both outputs, which carry no gradient.
    """
    checks.floating("rewards", rewards)
    checks.require(rewards.dim() == 2, "rewards", rewards, "shape [B, T]")
    checks.like("values", values, rewards.shape, rewards.device)
    checks.like("mask", mask, rewards.shape, rewards.device, "bool")
    for name, x in (("gamma", gamma), ("lam", lam)):
        checks.fraction(name, x)
    checks.choice("backend", backend, BACKENDS)
    return _gae(rewards.detach(), values.detach(), mask, float(gamma), float(lam), backend)


@custom_op("shaped_gae")
def _shaped_gae(
    rollout: Rollout, kl_coef: Tensor, options: TargetOptions, backend: str
) -> ShapedGAE:
    contiguous = Rollout(*(t.contiguous() for t in rollout))
    return SHAPED.implementation(rollout.logprobs, backend)(contiguous, kl_coef, options)


@_shaped_gae.register_fake
def _(rollout: Rollout, kl_coef: Tensor, options: TargetOptions, backend: str) -> ShapedGAE:
    batch, length = rollout.logprobs.shape

    def empty(columns: int) -> Tensor:
        dtype = checks.compute_dtype(rollout.logprobs)
        return rollout.logprobs.new_empty((batch, columns), dtype=dtype)

    per_token = (empty(length), empty(length), empty(length), empty(length))
    return ShapedGAE(*per_token, empty(len(Moment)))


def _whiten(
    advantages: Tensor, mask: Tensor, moments: Tensor, eps: float, group: ProcessGroup | None
) -> Tensor:
    """Return (A - mean) / sqrt(var + eps) from the moments by row (Chan et al. 1979)."""
    count, mean = moments[:, Moment.COUNT], moments[:, Moment.MEAN]
    sums = torch.stack([count.sum(), (count * mean).sum()])
    total, weighted = all_reduce_sum(sums, group).unbind()
    center = weighted / total.clamp(min=1)
    squares = moments[:, Moment.SQUARED_DEVIATIONS] + count * (mean - center).square()
    var = all_reduce_sum(squares.sum(), group) / total.clamp(min=1)
    return torch.where(mask, (advantages - center) * torch.rsqrt(var + eps), 0.0)


def rollout_targets(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    kl_coef: float | Tensor,
    estimator: str = "k1",
    clip: float | None = None,
    gamma: float = 1.0,
    lam: float = 0.95,
    whiten: bool = True,
    group: ProcessGroup | None = None,
    backend: str = "auto",
) -> RolloutTargets:
    """Compute `shaped_rewards`, `gae` and, if `whiten`, `masked_whiten` of the advantages at once.

    One pass over the rollout; whitening is over `group`. The arguments are those of the three ops
    and the results agree to rounding. A recipe that whitens the rewards calls the three ops.
    """
    checks.floating("logprobs", logprobs)
    checks.require(logprobs.dim() == 2, "logprobs", logprobs, "shape [B, T]")
    checks.like("scores", scores, logprobs.shape[:1], logprobs.device)
    checks.like("ref_logprobs", ref_logprobs, logprobs.shape, logprobs.device)
    checks.like("values", values, logprobs.shape, logprobs.device)
    checks.like("mask", mask, logprobs.shape, logprobs.device, "bool")
    checks.choice("estimator", estimator, ESTIMATORS)
    checks.choice("backend", backend, BACKENDS)
    for name, x in (("gamma", gamma), ("lam", lam)):
        checks.fraction(name, x)
    if clip is not None:
        checks.positive("clip", clip)
    dtype = checks.compute_dtype(logprobs)
    if isinstance(kl_coef, Tensor):  # a controller may keep it on the host
        kl_coef = kl_coef.detach().to(logprobs.device, dtype, non_blocking=True)
    else:
        kl_coef = torch.full((), float(kl_coef), dtype=dtype, device=logprobs.device)
    rollout = Rollout(
        scores.detach(), logprobs.detach(), ref_logprobs.detach(), values.detach(), mask
    )
    options = TargetOptions(estimator, clip, float(gamma), float(lam))
    rewards, kl, advantages, returns, moments = _shaped_gae(rollout, kl_coef, options, backend)
    if whiten:
        advantages = _whiten(advantages, mask, moments, 1e-8, group)
    return RolloutTargets(rewards, kl, advantages, returns)
