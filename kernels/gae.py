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

from fastrlhf.kernels.rows import index, jit, masked_load, on_device, scalar
from fastrlhf.ops.advantage import Rollout, ShapedGAE, TargetOptions
from fastrlhf.ops.layouts import Moment
from fastrlhf.ops.scalars import Number

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
    bootstrap_ptr,  # [B], or unused
    advantages_ptr,  # [B, T] fp32 out
    returns_ptr,  # [B, T] fp32 out
    length,
    gamma,
    lam,
    BOOTSTRAP: tl.constexpr,
    ON_DEVICE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    gamma = scalar(gamma, ON_DEVICE)
    lam = scalar(lam, ON_DEVICE)
    row = tl.program_id(0).to(tl.int64) * length
    rewards_ptr += row
    values_ptr += row
    mask_ptr += row
    advantages_ptr += row
    returns_ptr += row
    lanes = tl.arange(0, BLOCK)
    carry = 0.0  # B of the first True position after this block's; at the end, the value there
    if BOOTSTRAP:
        carry = tl.load(bootstrap_ptr + tl.program_id(0)).to(tl.float32)
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
def estimate_kl(d, ESTIMATOR: tl.constexpr):
    """Return the estimate of KL(pi || ref) of log-ratios d, as `token_kl`."""
    kl = d
    if ESTIMATOR == "abs":
        kl = tl.abs(d)
    if ESTIMATOR == "k2":
        kl = 0.5 * d * d
    if ESTIMATOR == "k3":
        kl = k3(d)
    return kl


@triton.jit
def _log_ratio(logprobs_ptr, ref_ptr, mask_ptr, at, inside):
    """Return (logprobs - ref_logprobs, keep) at positions `at`."""
    keep = inside & (tl.load(mask_ptr + at, mask=inside, other=0) != 0)
    logprobs = masked_load(logprobs_ptr + at, inside, keep)
    return logprobs - masked_load(ref_ptr + at, inside, keep), keep


@triton.jit
def _shaped(d, keep, is_last, score, kl_coef, clip, ESTIMATOR: tl.constexpr, CLIPPED: tl.constexpr):
    """Return (-kl_coef * clipped kl plus the score at the last position, kl) of log-ratios d."""
    kl = estimate_kl(d, ESTIMATOR)
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
    bootstrap_ptr,  # [B], or unused
    rewards_ptr,  # [B, T] fp32 out
    kl_ptr,  # [B, T] fp32 out
    advantages_ptr,  # [B, T] fp32 out
    returns_ptr,  # [B, T] fp32 out
    moments_ptr,  # [B, 3] fp32 out, of the advantages, columns as Moment
    length,
    kl_coef,
    clip,
    gamma,
    lam,
    ESTIMATOR: tl.constexpr,
    CLIPPED: tl.constexpr,
    BOOTSTRAP: tl.constexpr,
    ON_DEVICE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    kl_coef = scalar(kl_coef, ON_DEVICE)
    gamma = scalar(gamma, ON_DEVICE)
    lam = scalar(lam, ON_DEVICE)
    if CLIPPED:
        clip = scalar(clip, ON_DEVICE)
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
    blocks = tl.cdiv(length, BLOCK)
    last = -1
    for k in range(blocks):
        at = k * BLOCK + lanes
        keep = tl.load(mask_ptr + at, mask=at < length, other=0) != 0
        last = tl.maximum(last, tl.max(tl.where(keep, at, -1), 0).to(tl.int32))
    carry, count, mean, squares = 0.0, 0.0, 0.0, 0.0
    if BOOTSTRAP:
        carry = tl.load(bootstrap_ptr + tl.program_id(0)).to(tl.float32)
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
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    gamma: Number,
    lam: Number,
    bootstrap: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (advantages, returns) fp32; all tensors [B, T], contiguous."""
    advantages = torch.empty(rewards.shape, dtype=torch.float32, device=rewards.device)
    returns = torch.empty_like(advantages)
    if rewards.numel():
        _gae_kernel[(rewards.shape[0],)](
            rewards,
            values,
            mask,
            rewards if bootstrap is None else bootstrap,
            advantages,
            returns,
            rewards.shape[1],
            gamma,
            lam,
            BOOTSTRAP=bootstrap is not None,
            ON_DEVICE=on_device(gamma),
            **scan_options(rewards.shape[1]),
        )
    return advantages, returns


def shaped_gae(rollout: Rollout, options: TargetOptions) -> ShapedGAE:
    """Return the targets [B, T] and the advantages' moments [B, 3], fp32; inputs contiguous."""
    rows, length = rollout.logprobs.shape

    def out(columns: int) -> Tensor:
        return torch.empty(rows, columns, dtype=torch.float32, device=rollout.logprobs.device)

    per_token = (out(length), out(length), out(length), out(length))
    results = ShapedGAE(*per_token, out(len(Moment)))
    if rows:
        _shaped_gae_kernel[(rows,)](
            *(rollout.logprobs if t is None else t for t in rollout),
            *results,
            length,
            options.kl_coef,
            0.0 if options.clip is None else options.clip,
            options.gamma,
            options.lam,
            ESTIMATOR=options.estimator,
            CLIPPED=options.clip is not None,
            BOOTSTRAP=rollout.bootstrap is not None,
            ON_DEVICE=on_device(options.gamma),
            **scan_options(length),
        )
    return results
