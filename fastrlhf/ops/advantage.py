"""KL-shaped rewards and generalised advantage estimation over padded rollouts [B, T].

Left out on purpose: gradients (both are targets of the losses, never differentiated) and whitening (masked.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastrlhf.ops import checks
from fastrlhf.ops.collectives import all_reduce_sum
from fastrlhf.ops.dispatch import BACKENDS, Kernel
from fastrlhf.ops.kl import ESTIMATORS, token_kl
from fastrlhf.ops.registry import custom_op, register_fake

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class RolloutTargets(NamedTuple):
    """What PPO trains on, fp32 [B, T], 0 where the mask is False, without gradient."""

    rewards: Tensor
    kl: Tensor
    advantages: Tensor
    returns: Tensor


def _is_last(mask: Tensor) -> Tensor:
    """True at the last True position of each row, nowhere in an all-False row."""
    after = mask.flip(-1).cumsum(-1).flip(-1)  # how many True from here on
    return mask & (after == 1)


def shaped_rewards(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, kl_coef: float | Tensor,
    estimator: str = "k1", clip: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Per-token rewards of a rollout: -kl_coef * kl_t, plus the score at the row's last True position.

    scores [B]; logprobs, ref_logprobs [B, T]; mask [B, T] bool. `kl_coef` is a float or a 0-dim tensor (an adaptive
    controller's). `clip` bounds each token's penalty to +-clip before it is multiplied by kl_coef. Returns (rewards,
    kl), fp32 [B, T], 0 where the mask is False and without gradient; `kl` is never clipped, so that it can be logged.
    (InstructGPT, arXiv 2203.02155, equation 2, spread over tokens.)
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
    """The recurrence as it is written, one position of all rows at a time, backwards."""
    dtype = checks.compute_dtype(rewards)
    advantages = torch.zeros(rewards.shape, dtype=dtype, device=rewards.device)
    returns = torch.zeros_like(advantages)
    next_advantage = next_value = advantages.new_zeros(rewards.shape[0])
    for t in range(rewards.shape[1] - 1, -1, -1):
        here, value = mask[:, t], values[:, t].to(dtype)
        advantage = (
            rewards[:, t].to(dtype) + gamma * next_value - value + gamma * lam * next_advantage
        )
        advantages[:, t] = torch.where(here, advantage, 0.0)
        returns[:, t] = torch.where(here, advantage + value, 0.0)
        next_advantage = torch.where(here, advantage, next_advantage)
        next_value = torch.where(here, value, next_value)
    return advantages, returns


def _shaped_gae_torch(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, values: Tensor, mask: Tensor, kl_coef: Tensor,
    estimator: str, clip: float | None, gamma: float, lam: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(rewards, kl, advantages, returns) [B, T]; moments [B, 3]: count, mean and squared deviations of A by row."""
    rewards, kl = shaped_rewards(scores, logprobs, ref_logprobs, mask, kl_coef, estimator, clip)
    advantages, returns = _gae_torch(rewards, values, mask, gamma, lam)
    count = mask.sum(1).to(advantages.dtype)
    mean = advantages.sum(1) / count.clamp(min=1)
    spread = torch.where(mask, advantages - mean[:, None], 0.0).square().sum(1)
    return rewards, kl, advantages, returns, torch.stack([count, mean, spread], 1)


KERNEL = Kernel("gae", _gae_torch, "fastrlhf.kernels.gae")
SHAPED = Kernel("shaped_gae", _shaped_gae_torch, "fastrlhf.kernels.gae")


@custom_op(
    "gae",
    "(Tensor rewards, Tensor values, Tensor mask, float gamma, float lam, str backend) -> (Tensor, Tensor)",
)
def _gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float, backend: str
) -> tuple[Tensor, Tensor]:
    body = KERNEL.on(rewards, backend)
    return body(rewards.contiguous(), values.contiguous(), mask.contiguous(), gamma, lam)


@register_fake(_gae)
def _(rewards, values, mask, gamma, lam, backend):  # type: ignore[no-untyped-def]
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
    """Generalised advantage estimation (Schulman et al. 2016, equation 16): (advantages, returns), fp32 [B, T].

        A_t = r_t + gamma v_next - v_t + gamma lam A_next,   R_t = A_t + v_t

    rewards, values [B, T]; mask [B, T] bool. False positions, interior ones too, are skipped: "next" is the next True
    position of the row, and v_next = A_next = 0 after the last. They hold 0 in both outputs, which carry no gradient.
    """
    checks.floating("rewards", rewards)
    checks.require(rewards.dim() == 2, "rewards", rewards, "shape [B, T]")
    checks.like("values", values, rewards.shape, rewards.device)
    checks.like("mask", mask, rewards.shape, rewards.device, "bool")
    for name, x in (("gamma", gamma), ("lam", lam)):
        checks.fraction(name, x)
    checks.choice("backend", backend, BACKENDS)
    return _gae(rewards.detach(), values.detach(), mask, float(gamma), float(lam), backend)


@custom_op(
    "shaped_gae",
    "(Tensor scores, Tensor logprobs, Tensor ref_logprobs, Tensor values, Tensor mask, Tensor kl_coef, str estimator,"
    " float? clip, float gamma, float lam, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _shaped_gae(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, values: Tensor, mask: Tensor, kl_coef: Tensor,
    estimator: str, clip: float | None, gamma: float, lam: float, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    tensors = [t.contiguous() for t in (scores, logprobs, ref_logprobs, values, mask)]
    return SHAPED.on(logprobs, backend)(*tensors, kl_coef, estimator, clip, gamma, lam)


@register_fake(_shaped_gae)
def _(scores, logprobs, *_):  # type: ignore[no-untyped-def]
    dtype = checks.compute_dtype(logprobs)
    per_token = (logprobs.new_empty(logprobs.shape, dtype=dtype) for _ in range(4))
    return *per_token, logprobs.new_empty((logprobs.shape[0], 3), dtype=dtype)


def _whiten(
    advantages: Tensor, mask: Tensor, moments: Tensor, eps: float, group: ProcessGroup | None
) -> Tensor:
    """(A - mean) / sqrt(var + eps) from each row's count, mean and squared deviations (Chan et al. 1979)."""
    count, mean, spread = moments.unbind(1)
    total, weighted = all_reduce_sum(
        torch.stack([count.sum(), (count * mean).sum()]), group
    ).unbind()
    centre = weighted / total.clamp(min=1)
    deviations = all_reduce_sum((spread + count * (mean - centre).square()).sum(), group)
    return torch.where(
        mask, (advantages - centre) * torch.rsqrt(deviations / total.clamp(min=1) + eps), 0.0
    )


def rollout_targets(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, values: Tensor, mask: Tensor, *,
    kl_coef: float | Tensor, estimator: str = "k1", clip: float | None = None, gamma: float = 1.0, lam: float = 0.95,
    whiten: bool = True, group: ProcessGroup | None = None, backend: str = "auto",
) -> RolloutTargets:  # fmt: skip
    """`shaped_rewards`, then `gae`, then (`whiten`) `masked_whiten` of the advantages over `group`, in one pass.

    Arguments as of those three; the same results to rounding. For recipes that whiten the rewards, call the three.
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
    if isinstance(kl_coef, Tensor):  # a controller's may lie on the host
        kl_coef = kl_coef.detach().to(logprobs.device, dtype, non_blocking=True)
    else:
        kl_coef = torch.full((), float(kl_coef), dtype=dtype, device=logprobs.device)
    constants = [t.detach() for t in (scores, logprobs, ref_logprobs, values)]
    rewards, kl, advantages, returns, moments = _shaped_gae(
        *constants, mask, kl_coef, estimator, clip, float(gamma), float(lam), backend
    )
    if whiten:
        advantages = _whiten(advantages, mask, moments, 1e-8, group)
    return RolloutTargets(rewards, kl, advantages, returns)
