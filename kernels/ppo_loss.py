"""The PPO policy and value losses, all their metrics and their gradients in one launch.

Raw function with the signature of `_ppo_loss_torch` in fastrlhf/ops/ppo.py. Gradients are of sums: the denominator
may be the mask's count, which is known only when the last block is done.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrlhf.kernels.gae import k3
from fastrlhf.kernels.last_block import add_up, arrivals, arrive, element
from fastrlhf.kernels.rows import jit, load_where

BLOCK = 512  # nine running sums: more elements a thread would leave room for two blocks a multiprocessor
MAX_BLOCKS = 512  # about four of 4 warps on each of an H200's 132 multiprocessors, and one lane each in the last block


@triton.jit
def _join(p, v, e, c, w, k, r, n, top, p2, v2, e2, c2, w2, k2, r2, n2, top2):  # fmt: skip
    return p + p2, v + v2, e + e2, c + c2, w + w2, k + k2, r + r2, n + n2, tl.maximum(top, top2)


@triton.jit
def _finish(
    partials_ptr,
    denominator_ptr,
    metrics_ptr,
    value_coef,
    entropy_coef,
    GIVEN: tl.constexpr,
    MOST: tl.constexpr,
):
    """partials [9, blocks] -> metrics [10], in the order of PPOLoss; rows as `_kernel` stores them."""
    blocks = tl.num_programs(0)
    lanes = tl.arange(0, MOST)
    ratios = tl.load(
        partials_ptr + 8 * blocks + lanes, mask=lanes < blocks, other=0.0, cache_modifier=".cg"
    )
    sums = add_up(partials_ptr, blocks, 8, MOST)
    scale = 1.0 / tl.maximum(element(sums, 7), 1.0)
    if GIVEN:
        scale = 1.0 / tl.load(denominator_ptr).to(tl.float32)
    means = sums * scale
    policy, value, entropy = element(means, 0), element(means, 1), element(means, 2)
    tl.store(metrics_ptr, policy + value_coef * value - entropy_coef * entropy)
    k = tl.arange(0, 8)
    tl.store(metrics_ptr + 1 + k, means, mask=k < 7)
    tl.store(metrics_ptr + 8, tl.max(ratios, 0))
    tl.store(metrics_ptr + 9, scale)


@jit("tokens")
def _kernel(
    logprobs_ptr, old_ptr, advantages_ptr,  # [N]
    mask_ptr,  # [N] bool
    values_ptr, old_values_ptr, returns_ptr, entropy_ptr,  # [N], or unused
    denominator_ptr,  # 0-dim, or unused
    metrics_ptr,  # [10] fp32 out
    grad_logprobs_ptr, grad_values_ptr,  # [N] fp32 out
    partials_ptr,  # [9, blocks] fp32: policy, value, entropy, clipped, value clipped, kl, ratio, count; max ratio
    counter_ptr,
    tokens, clip, value_clip, value_coef, entropy_coef,
    VALUES: tl.constexpr, ENTROPY: tl.constexpr, GIVEN: tl.constexpr, BLOCK: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    zeros = tl.zeros([BLOCK], dtype=tl.float32)
    policy, clipped_count, approx_kl, ratio_sum, ratio_max, count = (
        zeros,
        zeros,
        zeros,
        zeros,
        zeros,
        zeros,
    )
    value, value_clipped, entropy = zeros, zeros, zeros
    blocks = tl.num_programs(0)
    for start in range(tl.program_id(0) * BLOCK, tokens, blocks * BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < tokens
        keep = tl.load(mask_ptr + at, mask=inside, other=0) != 0
        live = tl.where(keep, 1.0, 0.0)
        log_ratio = load_where(logprobs_ptr + at, inside, keep)
        log_ratio -= load_where(old_ptr + at, inside, keep)
        advantage = load_where(advantages_ptr + at, inside, keep)
        ratio = tl.exp(log_ratio)
        plain = -advantage * ratio
        clipped = -advantage * tl.minimum(tl.maximum(ratio, 1.0 - clip), 1.0 + clip)
        cut = clipped > plain
        tl.store(grad_logprobs_ptr + at, tl.where(cut, 0.0, plain), mask=inside)
        policy += tl.maximum(plain, clipped)
        clipped_count += tl.where(cut, 1.0, 0.0)
        approx_kl += k3(-log_ratio)
        ratio_sum += live * ratio
        ratio_max = tl.maximum(ratio_max, tl.where(keep, ratio, 0.0))
        count += live
        if VALUES:
            v = load_where(values_ptr + at, inside, keep)
            old = load_where(old_values_ptr + at, inside, keep)
            target = load_where(returns_ptr + at, inside, keep)
            off = v - target
            step = v - old
            bounded = tl.minimum(tl.maximum(step, -value_clip), value_clip)
            off_clipped = old + bounded - target
            # a step inside the bound is never cut: old + (v - old) may round past v, which would lose its gradient
            cut = (step != bounded) & (off_clipped * off_clipped > off * off)
            tl.store(grad_values_ptr + at, tl.where(cut, 0.0, value_coef * off), mask=inside)
            off = tl.where(cut, off_clipped, off)
            value += 0.5 * off * off
            value_clipped += tl.where(cut, 1.0, 0.0)
        if ENTROPY:
            entropy += load_where(entropy_ptr + at, inside, keep)
    policy, value, entropy, clipped_count, value_clipped, approx_kl, ratio_sum, count, ratio_max = (
        tl.reduce(
            (
                policy,
                value,
                entropy,
                clipped_count,
                value_clipped,
                approx_kl,
                ratio_sum,
                count,
                ratio_max,
            ),
            0,
            _join,
        )
    )
    mine = partials_ptr + tl.program_id(0)
    tl.store(mine, policy)
    tl.store(mine + blocks, value)
    tl.store(mine + 2 * blocks, entropy)
    tl.store(mine + 3 * blocks, clipped_count)
    tl.store(mine + 4 * blocks, value_clipped)
    tl.store(mine + 5 * blocks, approx_kl)
    tl.store(mine + 6 * blocks, ratio_sum)
    tl.store(mine + 7 * blocks, count)
    tl.store(mine + 8 * blocks, ratio_max)
    if arrive(counter_ptr, blocks):
        _finish(partials_ptr, denominator_ptr, metrics_ptr, value_coef, entropy_coef, GIVEN, MOST)


def ppo_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, values: Tensor | None,
    old_values: Tensor | None, returns: Tensor | None, entropy: Tensor | None, denominator: Tensor | None, clip: float,
    value_clip: float, value_coef: float, entropy_coef: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """All [N]; (metrics [10], gradient of the policy sum [N], value_coef * gradient of the value sum [N] or [0])."""
    tokens = logprobs.numel()

    def out(size: int) -> Tensor:
        return torch.empty(size, dtype=torch.float32, device=logprobs.device)

    blocks = max(1, min(MAX_BLOCKS, triton.cdiv(tokens, BLOCK)))
    results = out(10), out(tokens), out(0 if values is None else tokens)
    optional = (values, old_values, returns, entropy, denominator)
    _kernel[(blocks,)](
        logprobs, old_logprobs, advantages, mask, *(logprobs if t is None else t for t in optional), *results,
        out(9 * blocks), arrivals(logprobs), tokens, clip, value_clip, value_coef, entropy_coef,
        VALUES=values is not None, ENTROPY=entropy is not None, GIVEN=denominator is not None, BLOCK=BLOCK,
        MOST=MAX_BLOCKS,
    )  # fmt: skip
    return results
