"""Generalized advantage estimation as one associative scan per row, interior masks included.

With B_t = lam A_t + v_t the recurrence of fastrlhf/ops/advantage.py is first-order in one number,
    A_t = r_t - v_t + gamma B_next,   B_t = gamma lam B_next + lam r_t + (1 - lam) v_t,
and a False position is the identity map. One launch each; functions with the signatures of
`_gae_torch` and `_shaped_gae_torch` there. The second also computes the KL-shaped rewards and the
moments that whitening needs: each row's count, mean and squared deviations, which combine without
cancellation, as sums of squares would not.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrlhf.kernels.rows import index, jit, masked_load
from fastrlhf.ops.advantage import Rollout, ShapedGAE, TargetOptions
from fastrlhf.ops.layouts import Moment

COUNT = index(Moment.COUNT)
MEAN = index(Moment.MEAN)
SQUARED_DEVIATIONS = index(Moment.SQUARED_DEVIATIONS)
MOMENTS = tl.constexpr(len(Moment))


def scan_options(length: int) -> dict[str, int]:
    """Return the launch options: four positions per thread, more would spill."""
    return {"BLOCK": 128, "num_warps": 1} if length <= 128 else {"BLOCK": 1024, "num_warps": 8}


@triton.jit
def _compose(slope_later, offset_later, slope, offset):
    """Compose two maps x -> slope * x + offset, the later position's first."""
    return slope * slope_later, slope * offset_later + offset


@triton.jit
def _scan(r, v, keep, carry, gamma, lam):
    """Return B at each lane, given B after the last one."""
    slope = tl.where(keep, gamma * lam, 1.0)
    slope, offset = tl.associative_scan(
        (slope, lam * r + (1.0 - lam) * v), 0, _compose, reverse=True
    )
    return slope * carry + offset


@triton.jit
def _store_advantages(advantages_ptr, returns_ptr, at, inside, keep, r, v, after, gamma):
    advantage = tl.where(keep, r - v + gamma * after, 0.0)
    tl.store(advantages_ptr + at, advantage, mask=inside)
    tl.store(returns_ptr + at, tl.where(keep, advantage + v, 0.0), mask=inside)
    return advantage


@jit("length")
def _gae_kernel(
    rewards_ptr,  # [B, T]
    values_ptr,  # [B, T]
    mask_ptr,  # [B, T] bool
    advantages_ptr,  # [B, T] fp32 out
    returns_ptr,  # [B, T] fp32 out
    length,
    gamma,
    lam,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * length
    rewards_ptr += row
    values_ptr += row
    mask_ptr += row
    advantages_ptr += row
    returns_ptr += row
    lanes = tl.arange(0, BLOCK)
    carry = 0.0  # B of the first True position after this block's
    for k in range(tl.cdiv(length, BLOCK)):
        start = length - (k + 1) * BLOCK  # negative in the last round
        # the scan runs over the positions one later, so that each lane ends with B_next, not B
        at = start + 1 + lanes
        inside = (at >= 0) & (at < length)
        keep = inside & (tl.load(mask_ptr + at, mask=inside, other=0) != 0)
        r = masked_load(rewards_ptr + at, inside, keep)
        v = masked_load(values_ptr + at, inside, keep)
        after = _scan(r, v, keep, carry, gamma, lam)
        carry = tl.sum(tl.where(lanes == 0, after, 0.0), 0)
        at = start + lanes
        inside = (at >= 0) & (at < length)
        keep = inside & (tl.load(mask_ptr + at, mask=inside, other=0) != 0)
        r = masked_load(rewards_ptr + at, inside, keep)
        v = masked_load(values_ptr + at, inside, keep)
        _store_advantages(advantages_ptr, returns_ptr, at, inside, keep, r, v, after, gamma)


@triton.jit
def k3(d):
    """Return exp(-d) - 1 + d, by its series near 0, where it would cancel."""
    return tl.where(
        tl.abs(d) < 0.03, d * d * (0.5 - d * (1.0 / 6 - d * (1.0 / 24))), tl.exp(-d) - 1.0 + d
    )


@triton.jit
def _log_ratio(logprobs_ptr, ref_ptr, mask_ptr, at, inside):
    """Return (logprobs - ref_logprobs, keep) at positions `at`."""
    keep = inside & (tl.load(mask_ptr + at, mask=inside, other=0) != 0)
    logprobs = masked_load(logprobs_ptr + at, inside, keep)
    return logprobs - masked_load(ref_ptr + at, inside, keep), keep


@triton.jit
def _shaped(d, keep, is_last, score, kl_coef, clip, ESTIMATOR: tl.constexpr, CLIPPED: tl.constexpr):
    """Return (-kl_coef * clipped kl plus the score at the last position, kl) of log-ratios d."""
    kl = d
    if ESTIMATOR == "abs":
        kl = tl.abs(d)
    if ESTIMATOR == "k2":
        kl = 0.5 * d * d
    if ESTIMATOR == "k3":
        kl = k3(d)
    penalty = kl
    if CLIPPED:
        penalty = tl.minimum(tl.maximum(kl, -clip), clip)
    reward = tl.where(is_last, score, 0.0) - kl_coef * penalty
    return tl.where(keep, reward, 0.0), kl


@jit("length")
def _shaped_gae_kernel(
    scores_ptr,  # [B]
    logprobs_ptr,  # [B, T]
    ref_ptr,  # [B, T]
    values_ptr,  # [B, T]
    mask_ptr,  # [B, T] bool
    kl_coef_ptr,  # 0-dim fp32
    rewards_ptr,  # [B, T] fp32 out
    kl_ptr,  # [B, T] fp32 out
    advantages_ptr,  # [B, T] fp32 out
    returns_ptr,  # [B, T] fp32 out
    moments_ptr,  # [B, 3] fp32 out, of the advantages, columns as Moment
    length,
    clip,
    gamma,
    lam,
    ESTIMATOR: tl.constexpr,
    CLIPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * length
    logprobs_ptr += row
    ref_ptr += row
    values_ptr += row
    mask_ptr += row
    rewards_ptr += row
    kl_ptr += row
    advantages_ptr += row
    returns_ptr += row
    lanes = tl.arange(0, BLOCK)
    score = tl.load(scores_ptr + tl.program_id(0)).to(tl.float32)
    kl_coef = tl.load(kl_coef_ptr)
    blocks = tl.cdiv(length, BLOCK)
    last = -1
    for k in range(blocks):
        at = k * BLOCK + lanes
        keep = tl.load(mask_ptr + at, mask=at < length, other=0) != 0
        last = tl.maximum(last, tl.max(tl.where(keep, at, -1), 0).to(tl.int32))
    carry, count, mean, squares = 0.0, 0.0, 0.0, 0.0
    for k in range(blocks):
        start = length - (k + 1) * BLOCK
        at = start + 1 + lanes
        inside = (at >= 0) & (at < length)
        d, keep = _log_ratio(logprobs_ptr, ref_ptr, mask_ptr, at, inside)
        r, kl = _shaped(d, keep, at == last, score, kl_coef, clip, ESTIMATOR, CLIPPED)
        v = masked_load(values_ptr + at, inside, keep)
        after = _scan(r, v, keep, carry, gamma, lam)
        carry = tl.sum(tl.where(lanes == 0, after, 0.0), 0)
        at = start + lanes
        inside = (at >= 0) & (at < length)
        d, keep = _log_ratio(logprobs_ptr, ref_ptr, mask_ptr, at, inside)
        r, kl = _shaped(d, keep, at == last, score, kl_coef, clip, ESTIMATOR, CLIPPED)
        v = masked_load(values_ptr + at, inside, keep)
        tl.store(rewards_ptr + at, r, mask=inside)
        tl.store(kl_ptr + at, kl, mask=inside)
        advantage = _store_advantages(
            advantages_ptr, returns_ptr, at, inside, keep, r, v, after, gamma
        )
        # Chan et al. 1979: combine two groups' (count, mean, sum of squared deviations)
        here = tl.sum(tl.where(keep, 1.0, 0.0), 0)
        mean_here = tl.sum(advantage, 0) / tl.maximum(here, 1.0)
        deviation = tl.where(keep, advantage - mean_here, 0.0)
        total = tl.maximum(count + here, 1.0)
        gap = mean_here - mean
        squares += tl.sum(deviation * deviation, 0) + gap * gap * count * here / total
        mean += gap * here / total
        count += here
    moments_ptr += tl.program_id(0) * MOMENTS
    tl.store(moments_ptr + COUNT, count)
    tl.store(moments_ptr + MEAN, mean)
    tl.store(moments_ptr + SQUARED_DEVIATIONS, squares)


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Return (advantages, returns) fp32; all tensors [B, T], contiguous."""
    advantages = torch.empty(rewards.shape, dtype=torch.float32, device=rewards.device)
    returns = torch.empty_like(advantages)
    if rewards.numel():
        _gae_kernel[(rewards.shape[0],)](
            rewards,
            values,
            mask,
            advantages,
            returns,
            rewards.shape[1],
            gamma,
            lam,
            **scan_options(rewards.shape[1]),
        )
    return advantages, returns


def shaped_gae(rollout: Rollout, kl_coef: Tensor, options: TargetOptions) -> ShapedGAE:
    """Return the targets [B, T] and the advantages' moments [B, 3], fp32; inputs contiguous."""
    rows, length = rollout.logprobs.shape

    def out(columns: int) -> Tensor:
        return torch.empty(rows, columns, dtype=torch.float32, device=rollout.logprobs.device)

    per_token = (out(length), out(length), out(length), out(length))
    results = ShapedGAE(*per_token, out(len(Moment)))
    if rows:
        _shaped_gae_kernel[(rows,)](
            *rollout,
            kl_coef,
            *results,
            length,
            0.0 if options.clip is None else options.clip,
            options.gamma,
            options.lam,
            ESTIMATOR=options.estimator,
            CLIPPED=options.clip is not None,
            **scan_options(length),
        )
    return results
