"""Generalised advantage estimation as one associative scan a row, interior masks included, in one launch.

With B_t = lam A_t + v_t the recurrence of fastrlhf/ops/advantage.py becomes first-order in one number,
    A_t = r_t - v_t + gamma B_next,   B_t = gamma lam B_next + lam r_t + (1 - lam) v_t,
and a False position is the identity map. Raw function with the signature of `_gae_torch` there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _compose(slope_later, offset_later, slope, offset):
    """B = slope * (slope_later * x + offset_later) + offset, x being what comes after both."""
    return slope * slope_later, slope * offset_later + offset


@triton.jit(do_not_specialize=["length"])
def _gae_kernel(
    rewards_ptr, values_ptr,  # [B, T]
    mask_ptr,  # [B, T] bool
    advantages_ptr, returns_ptr,  # [B, T] fp32 out
    length, gamma, lam,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * length
    lanes = tl.arange(0, BLOCK)
    carry = 0.0  # B of the first True position after this block's
    for k in range(tl.cdiv(length, BLOCK)):
        start = length - (k + 1) * BLOCK  # negative in the last round
        # the scan runs over the positions one later, so that each lane ends with B_next, not B
        at = start + 1 + lanes
        keep = (at >= 0) & (at < length)
        keep = keep & (tl.load(mask_ptr + row + at, mask=keep, other=0) != 0)
        r = tl.load(rewards_ptr + row + at, mask=keep, other=0.0).to(tl.float32)
        v = tl.load(values_ptr + row + at, mask=keep, other=0.0).to(tl.float32)
        slope = tl.where(keep, gamma * lam, 1.0)
        slope, offset = tl.associative_scan((slope, lam * r + (1.0 - lam) * v), 0, _compose, reverse=True)
        after = slope * carry + offset
        carry = tl.sum(tl.where(lanes == 0, after, 0.0), 0)
        at = start + lanes
        inside = (at >= 0) & (at < length)
        keep = inside & (tl.load(mask_ptr + row + at, mask=inside, other=0) != 0)
        r = tl.load(rewards_ptr + row + at, mask=keep, other=0.0).to(tl.float32)
        v = tl.load(values_ptr + row + at, mask=keep, other=0.0).to(tl.float32)
        advantage = r - v + gamma * after
        tl.store(advantages_ptr + row + at, tl.where(keep, advantage, 0.0), mask=inside)
        tl.store(returns_ptr + row + at, tl.where(keep, advantage + v, 0.0), mask=inside)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """All [B, T] contiguous; (advantages, returns) fp32."""
    advantages = torch.empty(rewards.shape, dtype=torch.float32, device=rewards.device)
    returns = torch.empty_like(advantages)
    if rewards.numel():
        _gae_kernel[(rewards.shape[0],)](
            rewards, values, mask, advantages, returns, rewards.shape[1], gamma, lam, BLOCK=BLOCK, num_warps=4
        )
    return advantages, returns
