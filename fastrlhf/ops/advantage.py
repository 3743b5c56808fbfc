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
from fastrlhf.ops.rows import map_tensors
from fastrlhf.ops.scalars import Number, as_tensor, pack, unpack

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class RolloutTargets(NamedTuple):
    """Training targets of PPO, fp32 [B, T], 0 where the mask is False, without gradient."""

    rewards: Tensor
    kl: Tensor
    advantages: Tensor
    returns: Tensor


class Rollout(NamedTuple):
    """Inputs of the targets: scores and bootstrap [B], the others [B, T]."""

    scores: Tensor
    logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    mask: Tensor
    bootstrap: Tensor | None = None


class TargetOptions(NamedTuple):
    """Options of the KL penalty and of GAE."""

    kl_coef: Number
    clip: Number | None
    gamma: Number
    lam: Number
    estimator: str


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
    kl_coef: Number,
    estimator: str = "k1",
    clip: Number | None = None,
    *,
    bootstrap: Tensor | None = None,
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
        bootstrap: [B], the value of what follows a truncated row, added to the last reward: for
            recipes that sum rewards without `gae`, which takes it itself.

    Returns (rewards, kl), fp32 [B, T], 0 where the mask is False and without gradient. `kl` is not
    clipped, so that it can be logged.
    """
    checks.floating("logprobs", logprobs)
    checks.require(logprobs.dim() == 2, "logprobs", logprobs, "shape [B, T]")
    checks.like("scores", scores, logprobs.shape[:1], logprobs.device)
    checks.like("ref_logprobs", ref_logprobs, logprobs.shape, logprobs.device)
    checks.like("mask", mask, logprobs.shape, logprobs.device, "bool")
    checks.choice("estimator", estimator, ESTIMATORS)
    _check_scalars(kl_coef, clip, 1.0, 1.0)
    _check_bootstrap(bootstrap, logprobs)
    with torch.no_grad():
        kl = penalty = torch.where(mask, token_kl(logprobs, ref_logprobs, estimator), 0.0)
        bound = as_tensor(clip, kl)
        if bound is not None:
            bound = bound.to(kl.device, kl.dtype)
            penalty = torch.minimum(torch.maximum(kl, -bound), bound)
        at_end = scores.to(kl.dtype)
        at_end = at_end if bootstrap is None else at_end + bootstrap.to(kl.dtype)
        score = torch.where(_is_last(mask), at_end[:, None], 0.0)
        return torch.where(mask, score - kl_coef * penalty, 0.0), kl


def _check_scalars(kl_coef: Number, clip: Number | None, gamma: Number, lam: Number) -> None:
    checks.finite("kl_coef", kl_coef)
    if clip is not None:
        checks.positive("clip", clip)
    checks.fraction("gamma", gamma)
    checks.fraction("lam", lam)


def _check_bootstrap(bootstrap: Tensor | None, rows: Tensor) -> None:
    if bootstrap is not None:
        checks.like("bootstrap", bootstrap, rows.shape[:1], rows.device)


def _gae_torch(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    gamma: Number,
    lam: Number,
    bootstrap: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the recurrence as it is written, backwards, one position of all rows at a time."""
    dtype = checks.compute_dtype(rewards)
    advantages = torch.zeros(rewards.shape, dtype=dtype, device=rewards.device)
    returns = torch.zeros_like(advantages)
    next_advantage = next_value = advantages.new_zeros(rewards.shape[0])
    if bootstrap is not None:
        next_value = bootstrap.to(dtype)
    for t in range(rewards.shape[1] - 1, -1, -1):
        here, value = mask[:, t], values[:, t].to(dtype)
        delta = rewards[:, t].to(dtype) + gamma * next_value - value
        advantage = delta + gamma * lam * next_advantage
        advantages[:, t] = torch.where(here, advantage, 0.0)
        returns[:, t] = torch.where(here, advantage + value, 0.0)
        next_advantage = torch.where(here, advantage, next_advantage)
        next_value = torch.where(here, value, next_value)
    return advantages, returns


def _shaped_gae_torch(rollout: Rollout, options: TargetOptions) -> ShapedGAE:
    scores, logprobs, ref_logprobs, values, mask, bootstrap = rollout
    penalty = (options.kl_coef, options.estimator, options.clip)
    rewards, kl = shaped_rewards(scores, logprobs, ref_logprobs, mask, *penalty)
    discounts = (options.gamma, options.lam)
    advantages, returns = _gae_torch(rewards, values, mask, *discounts, bootstrap)
    count = mask.sum(1).to(advantages.dtype)
    mean = advantages.sum(1) / count.clamp(min=1)
    squares = torch.where(mask, advantages - mean[:, None], 0.0).square().sum(1)
    moments = layouts.stack(Moment, dim=1, count=count, mean=mean, squared_deviations=squares)
    return ShapedGAE(rewards, kl, advantages, returns, moments)


KERNEL = Kernel("gae", _gae_torch, "fastrlhf.kernels.gae")
SHAPED = Kernel("shaped_gae", _shaped_gae_torch, "fastrlhf.kernels.gae")


@custom_op("gae")
def _gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    bootstrap: Tensor | None,
    scalars: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor]:
    run, (gamma, lam) = KERNEL.implementation(rewards, backend), unpack(scalars)
    bootstrap = None if bootstrap is None else bootstrap.contiguous()
    table = (rewards.contiguous(), values.contiguous(), mask.contiguous())
    return run(*table, gamma, lam, bootstrap)


@_gae.register_fake
def _(rewards: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    def empty() -> Tensor:
        return rewards.new_empty(rewards.shape, dtype=checks.compute_dtype(rewards))

    return empty(), empty()


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    gamma: Number = 1.0,
    lam: Number = 0.95,
    *,
    bootstrap: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Return the (advantages, returns) of generalized advantage estimation, fp32 [B, T].

        A_t = r_t + gamma v_next - v_t + gamma lam A_next,   R_t = A_t + v_t

    (Schulman et al. 2016, equation 16.) rewards, values [B, T]; mask [B, T] bool. False positions,
    interior ones too, are skipped: "next" is the next True position of the row. They hold 0 in both
    outputs, which carry no gradient. After the last True position A_next = 0, and v_next = 0, or
    `bootstrap` [B]: the value of the state in which a row was truncated.
    """
    checks.floating("rewards", rewards)
    checks.require(rewards.dim() == 2, "rewards", rewards, "shape [B, T]")
    checks.like("values", values, rewards.shape, rewards.device)
    checks.like("mask", mask, rewards.shape, rewards.device, "bool")
    _check_bootstrap(bootstrap, rewards)
    _check_scalars(0.0, None, gamma, lam)
    checks.choice("backend", backend, BACKENDS)
    bootstrap = None if bootstrap is None else bootstrap.detach()
    table = (rewards.detach(), values.detach(), mask)
    return _gae(*table, bootstrap, pack(rewards, gamma, lam), backend)


@custom_op("shaped_gae")
def _shaped_gae(
    rollout: Rollout, scalars: Tensor, clipped: bool, estimator: str, backend: str
) -> ShapedGAE:
    kl_coef, clip, gamma, lam = unpack(scalars)
    options = TargetOptions(kl_coef, clip if clipped else None, gamma, lam, estimator)
    contiguous = map_tensors(lambda t: None if t is None else t.contiguous(), rollout)
    return SHAPED.implementation(rollout.logprobs, backend)(contiguous, options)


@_shaped_gae.register_fake
def _(rollout: Rollout, *_: object) -> ShapedGAE:
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
    kl_coef: Number,
    estimator: str = "k1",
    clip: Number | None = None,
    gamma: Number = 1.0,
    lam: Number = 0.95,
    bootstrap: Tensor | None = None,
    whiten: bool = True,
    group: ProcessGroup | None = None,
    backend: str = "auto",
) -> RolloutTargets:
    """Compute `shaped_rewards`, `gae` and, if `whiten`, `masked_whiten` of the advantages at once.

    One pass over the rollout; whitening is over `group`. The arguments are those of the three ops
    (`bootstrap` that of `gae`) and the results agree to rounding. A recipe that whitens the rewards
    calls the three ops.
    """
    checks.floating("logprobs", logprobs)
    checks.require(logprobs.dim() == 2, "logprobs", logprobs, "shape [B, T]")
    checks.like("scores", scores, logprobs.shape[:1], logprobs.device)
    checks.like("ref_logprobs", ref_logprobs, logprobs.shape, logprobs.device)
    checks.like("values", values, logprobs.shape, logprobs.device)
    checks.like("mask", mask, logprobs.shape, logprobs.device, "bool")
    checks.choice("estimator", estimator, ESTIMATORS)
    checks.choice("backend", backend, BACKENDS)
    _check_scalars(kl_coef, clip, gamma, lam)
    _check_bootstrap(bootstrap, logprobs)
    given = Rollout(scores, logprobs, ref_logprobs, values, mask, bootstrap)
    rollout = map_tensors(lambda t: None if t is None else t.detach(), given)
    clipped, bound = clip is not None, 1.0 if clip is None else clip
    scalars = pack(logprobs, kl_coef, bound, gamma, lam)
    targets = _shaped_gae(rollout, scalars, clipped, estimator, backend)
    rewards, kl, advantages, returns, moments = targets
    if whiten:
        advantages = _whiten(advantages, mask, moments, 1e-8, group)
    return RolloutTargets(rewards, kl, advantages, returns)


def group_advantages(
    rewards: Tensor, group_ids: Tensor, *, normalize: bool = True, leave_one_out: bool = False
) -> Tensor:
    """Return each response's reward relative to those of its group, fp32 [N], without gradient.

        A_i = r_i - mean of the group,   divided by (std of the group + 1e-6) if `normalize`

    (GRPO: DeepSeekMath, arXiv 2402.03300, section 4.1.2; without `normalize`: Dr. GRPO, arXiv
    2503.20783.) The standard deviation is the unbiased one. `leave_one_out` subtracts the mean of
    the others instead (RLOO, arXiv 2402.14740). A group of one has advantage 0.

    Args:
        rewards: [N] fp32, bf16 or fp16.
        group_ids: [N] int. Equal numbers, whatever they are and wherever they stand, are a group.

    Raises ValueError on wrong shapes and dtypes.
    """
    checks.floating("rewards", rewards)
    checks.require(rewards.dim() == 1, "rewards", rewards, "shape [N]")
    checks.like("group_ids", group_ids, rewards.shape, rewards.device, "integer")
    with torch.no_grad():
        # in float64: sums of a GPU come in any order, and round to the same float32
        r, group = rewards.double(), _numbered(group_ids)
        zeros = torch.zeros_like(r)
        count = zeros.index_add(0, group, torch.ones_like(r))[group]
        mean = zeros.index_add(0, group, r)[group] / count
        centered = torch.where(count > 1, r - mean, 0.0)
        others = (count - 1).clamp(min=1)
        var = zeros.index_add(0, group, centered.square())[group] / others
        advantages = centered * (count / others) if leave_one_out else centered
        if normalize:
            advantages = advantages / (var.sqrt() + 1e-6)
        return advantages.to(checks.compute_dtype(rewards))


def _numbered(ids: Tensor) -> Tensor:
    """Return ids [N] as numbers below N, equal where the ids are; waits for nothing."""
    ordered, order = ids.sort()
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[1:] = ordered[1:] != ordered[:-1]
    return torch.empty_like(order).scatter_(0, order, new.cumsum(0) - 1)
