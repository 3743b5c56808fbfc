"""Generalised advantage estimation as one associative scan a row, interior masks included, in one launch.

With B_t = lam A_t + v_t the recurrence of fastrlhf/ops/advantage.py becomes first-order in one number,
    A_t = r_t - v_t + gamma B_next,   B_t = gamma lam B_next + lam r_t + (1 - lam) v_t,
and a False position is the identity map. Raw functions with the signatures of `_gae_torch` and `_shaped_gae_torch`
there; the second also forms the KL-shaped rewards and what whitening needs (each row's count, mean and squared
deviations, which combine without cancellation, as sums of squares would not).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrlhf.kernels.rows import jit, load_where

ESTIMATORS = {"k1": 0, "abs": 1, "k2": 2, "k3": 3}


def scan_options(length: int) -> dict[str, int]:
    """Positions a round, four a thread; more would spill."""
    return {"BLOCK": 128, "num_warps": 1} if length <= 128 else {"BLOCK": 1024, "num_warps": 8}


@triton.jit
def _compose(slope_later, offset_later, slope, offset):
    """B = slope * (slope_later * x + offset_later) + offset, x being what comes after both."""
    return slope * slope_later, slope * offset_later + offset


@triton.jit
def _scan(r, v, keep, carry, gamma, lam):
    """B at each lane, given B after the last one."""
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
    rewards_ptr, values_ptr,  # [B, T]
    mask_ptr,  # [B, T] bool
    advantages_ptr, returns_ptr,  # [B, T] fp32 out
    length, gamma, lam,
    BLOCK: tl.constexpr,
):  # fmt: skip
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
        r = load_where(rewards_ptr + at, inside, keep)
        v = load_where(values_ptr + at, inside, keep)
        after = _scan(r, v, keep, carry, gamma, lam)
        carry = tl.sum(tl.where(lanes == 0, after, 0.0), 0)
        at = start + lanes
        inside = (at >= 0) & (at < length)
        keep = inside & (tl.load(mask_ptr + at, mask=inside, other=0) != 0)
        r = load_where(rewards_ptr + at, inside, keep)
        v = load_where(values_ptr + at, inside, keep)
        _store_advantages(advantages_ptr, returns_ptr, at, inside, keep, r, v, after, gamma)


@triton.jit
def k3(d):
    """exp(-d) - 1 + d, by its series near 0, where it would cancel."""
    return tl.where(
        tl.abs(d) < 0.03, d * d * (0.5 - d * (1.0 / 6 - d * (1.0 / 24))), tl.exp(-d) - 1.0 + d
    )


@triton.jit
def _shaped(
    logprobs_ptr, ref_ptr, mask_ptr, at, inside, last, score, kl_coef, clip,
    ESTIMATOR: tl.constexpr, CLIPPED: tl.constexpr,
):  # fmt: skip
    """(reward, kl, keep) at `at`: -kl_coef * clipped kl, plus the score at the row's last True position."""
    keep = inside & (tl.load(mask_ptr + at, mask=inside, other=0) != 0)
    d = load_where(logprobs_ptr + at, inside, keep) - load_where(ref_ptr + at, inside, keep)
    kl = d
    if ESTIMATOR == 1:
        kl = tl.abs(d)
    if ESTIMATOR == 2:
        kl = 0.5 * d * d
    if ESTIMATOR == 3:
        kl = k3(d)
    penalty = kl
    if CLIPPED:
        penalty = tl.minimum(tl.maximum(kl, -clip), clip)
    reward = tl.where(at == last, score, 0.0) - kl_coef * penalty
    return tl.where(keep, reward, 0.0), kl, keep


@jit("length")
def _shaped_gae_kernel(
    scores_ptr,  # [B]
    logprobs_ptr, ref_ptr, values_ptr,  # [B, T]
    mask_ptr,  # [B, T] bool
    kl_coef_ptr,  # 0-dim fp32
    rewards_ptr, kl_ptr, advantages_ptr, returns_ptr,  # [B, T] fp32 out
    moments_ptr,  # [B, 3] fp32 out: count, mean and sum of squared deviations of the advantages
    length, clip, gamma, lam,
    ESTIMATOR: tl.constexpr, CLIPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
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
    carry, count, mean, spread = 0.0, 0.0, 0.0, 0.0
    for k in range(blocks):
        start = length - (k + 1) * BLOCK
        at = start + 1 + lanes
        inside = (at >= 0) & (at < length)
        r, kl, keep = _shaped(
            logprobs_ptr,
            ref_ptr,
            mask_ptr,
            at,
            inside,
            last,
            score,
            kl_coef,
            clip,
            ESTIMATOR,
            CLIPPED,
        )
        v = load_where(values_ptr + at, inside, keep)
        after = _scan(r, v, keep, carry, gamma, lam)
        carry = tl.sum(tl.where(lanes == 0, after, 0.0), 0)
        at = start + lanes
        inside = (at >= 0) & (at < length)
        r, kl, keep = _shaped(
            logprobs_ptr,
            ref_ptr,
            mask_ptr,
            at,
            inside,
            last,
            score,
            kl_coef,
            clip,
            ESTIMATOR,
            CLIPPED,
        )
        v = load_where(values_ptr + at, inside, keep)
        tl.store(rewards_ptr + at, r, mask=inside)
        tl.store(kl_ptr + at, kl, mask=inside)
        advantage = _store_advantages(
            advantages_ptr, returns_ptr, at, inside, keep, r, v, after, gamma
        )
        # Chan et al. 1979: combine two groups' (count, mean, sum of squared deviations)
        here = tl.sum(tl.where(keep, 1.0, 0.0), 0)
        mean_here = tl.sum(advantage, 0) / tl.maximum(here, 1.0)
        off = tl.where(keep, advantage - mean_here, 0.0)
        both = tl.maximum(count + here, 1.0)
        apart = mean_here - mean
        spread += tl.sum(off * off, 0) + apart * apart * count * here / both
        mean += apart * here / both
        count += here
    tl.store(moments_ptr + 3 * tl.program_id(0), count)
    tl.store(moments_ptr + 3 * tl.program_id(0) + 1, mean)
    tl.store(moments_ptr + 3 * tl.program_id(0) + 2, spread)


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """All [B, T] contiguous; (advantages, returns) fp32."""
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


def shaped_gae(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, values: Tensor, mask: Tensor, kl_coef: Tensor,
    estimator: str, clip: float | None, gamma: float, lam: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(rewards, kl, advantages, returns) [B, T] and moments [B, 3] of the advantages, all fp32."""
    rows, length = logprobs.shape
    rewards, kl, advantages, returns = (
        torch.empty(rows, length, dtype=torch.float32, device=logprobs.device) for _ in range(4)
    )
    moments = torch.empty(rows, 3, dtype=torch.float32, device=logprobs.device)
    if rows:
        _shaped_gae_kernel[(rows,)](
            scores, logprobs, ref_logprobs, values, mask, kl_coef, rewards, kl, advantages, returns, moments, length,
            0.0 if clip is None else clip, gamma, lam, ESTIMATOR=ESTIMATORS[estimator], CLIPPED=clip is not None,
            **scan_options(length),
        )  # fmt: skip
    return rewards, kl, advantages, returns, moments
