"""The clipped PPO policy and value losses with their gradients and metrics, in one launch.

The signature is that of `_ppo_loss_torch` in fastrlhf/ops/ppo.py. The gradients are those of sums:
the denominator may be the mask's count, which is known only when the last block finishes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrlhf.kernels.gae import k3
from fastrlhf.kernels.last_block import (
    arrivals,
    extract,
    last_block_arrives,
    reduce_partials,
)
from fastrlhf.kernels.rows import index, jit, masked_load
from fastrlhf.ops.layouts import PPOMetric
from fastrlhf.ops.ppo import PPOOptions, PPOTokens

# Nine running sums: more elements per thread would leave room for two blocks per multiprocessor.
BLOCK = 512
# About four blocks of 4 warps on each of an H200's 132 multiprocessors; one lane each in the last
# block.
MAX_BLOCKS = 512

LOSS = index(PPOMetric.LOSS)
POLICY_LOSS = index(PPOMetric.POLICY_LOSS)
VALUE_LOSS = index(PPOMetric.VALUE_LOSS)
ENTROPY = index(PPOMetric.ENTROPY)
CLIP_FRACTION = index(PPOMetric.CLIP_FRACTION)
VALUE_CLIP_FRACTION = index(PPOMetric.VALUE_CLIP_FRACTION)
APPROX_KL = index(PPOMetric.APPROX_KL)
RATIO_MEAN = index(PPOMetric.RATIO_MEAN)
RATIO_MAX = index(PPOMetric.RATIO_MAX)
GRAD_SCALE = index(PPOMetric.GRAD_SCALE)

# Rows of the partial results [9, blocks]: the sums of the metrics that are means, at their index
# less that of the first, then the number of tokens and the largest ratio.
FIRST = index(PPOMetric.POLICY_LOSS)
COUNT = tl.constexpr(PPOMetric.RATIO_MEAN + 1 - PPOMetric.POLICY_LOSS)
MAXIMUM = tl.constexpr(COUNT.value + 1)
PARTIALS = COUNT.value + 2


@triton.jit
def _join(p, v, e, c, w, k, r, n, top, p2, v2, e2, c2, w2, k2, r2, n2, top2):
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
    """Reduce the partial results [9, blocks] to the metrics [10]."""
    blocks = tl.num_programs(0)
    lanes = tl.arange(0, MOST)
    ratios = tl.load(
        partials_ptr + blocks * MAXIMUM + lanes,
        mask=lanes < blocks,
        other=0.0,
        cache_modifier=".cg",
    )
    sums = reduce_partials(partials_ptr, blocks, COUNT + 1, MOST)
    scale = 1.0 / tl.maximum(extract(sums, COUNT), 1.0)
    if GIVEN:
        scale = 1.0 / tl.load(denominator_ptr).to(tl.float32)
    means = sums * scale
    policy = extract(means, POLICY_LOSS - FIRST)
    value = extract(means, VALUE_LOSS - FIRST)
    entropy = extract(means, ENTROPY - FIRST)
    tl.store(metrics_ptr + LOSS, policy + value_coef * value - entropy_coef * entropy)
    k = tl.arange(0, 8)
    tl.store(metrics_ptr + FIRST + k, means, mask=k < COUNT)
    tl.store(metrics_ptr + RATIO_MAX, tl.max(ratios, 0))
    tl.store(metrics_ptr + GRAD_SCALE, scale)


@jit("tokens")
def _kernel(
    logprobs_ptr,  # [N]
    old_ptr,  # [N]
    advantages_ptr,  # [N]
    mask_ptr,  # [N] bool
    values_ptr,  # [N], or unused
    old_values_ptr,  # [N], or unused
    returns_ptr,  # [N], or unused
    entropy_ptr,  # [N], or unused
    denominator_ptr,  # 0-dim, or unused
    metrics_ptr,  # [10] fp32 out, as PPOMetric
    grad_logprobs_ptr,  # [N] fp32 out
    grad_values_ptr,  # [N] fp32 out
    partials_ptr,  # [9, blocks] fp32
    counter_ptr,
    tokens,
    clip,
    value_clip,
    value_coef,
    entropy_coef,
    HAS_VALUES: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    GIVEN: tl.constexpr,
    BLOCK: tl.constexpr,
    MOST: tl.constexpr,
):
    zeros = tl.zeros([BLOCK], dtype=tl.float32)
    policy, clipped_count, approx_kl = zeros, zeros, zeros
    ratio_sum, ratio_max, count = zeros, zeros, zeros
    value, value_clipped, entropy = zeros, zeros, zeros
    blocks = tl.num_programs(0)
    for start in range(tl.program_id(0) * BLOCK, tokens, blocks * BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < tokens
        keep = tl.load(mask_ptr + at, mask=inside, other=0) != 0
        live = tl.where(keep, 1.0, 0.0)
        log_ratio = masked_load(logprobs_ptr + at, inside, keep)
        log_ratio -= masked_load(old_ptr + at, inside, keep)
        advantage = masked_load(advantages_ptr + at, inside, keep)
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
        if HAS_VALUES:
            v = masked_load(values_ptr + at, inside, keep)
            old = masked_load(old_values_ptr + at, inside, keep)
            target = masked_load(returns_ptr + at, inside, keep)
            off = v - target
            step = v - old
            bounded = tl.minimum(tl.maximum(step, -value_clip), value_clip)
            off_clipped = old + bounded - target
            # A step inside the bound is never cut: old + (v - old) may round past v, which would
            # lose its gradient.
            cut = (step != bounded) & (off_clipped * off_clipped > off * off)
            tl.store(grad_values_ptr + at, tl.where(cut, 0.0, value_coef * off), mask=inside)
            off = tl.where(cut, off_clipped, off)
            value += 0.5 * off * off
            value_clipped += tl.where(cut, 1.0, 0.0)
        if HAS_ENTROPY:
            entropy += masked_load(entropy_ptr + at, inside, keep)
    sums = (policy, value, entropy, clipped_count, value_clipped, approx_kl, ratio_sum, count)
    totals = tl.reduce(sums + (ratio_max,), 0, _join)  # noqa: RUF005  (no unpacking in a kernel)
    policy, value, entropy, clipped_count, value_clipped, approx_kl, ratio_sum, count, top = totals
    mine = partials_ptr + tl.program_id(0)
    tl.store(mine + blocks * (POLICY_LOSS - FIRST), policy)
    tl.store(mine + blocks * (VALUE_LOSS - FIRST), value)
    tl.store(mine + blocks * (ENTROPY - FIRST), entropy)
    tl.store(mine + blocks * (CLIP_FRACTION - FIRST), clipped_count)
    tl.store(mine + blocks * (VALUE_CLIP_FRACTION - FIRST), value_clipped)
    tl.store(mine + blocks * (APPROX_KL - FIRST), approx_kl)
    tl.store(mine + blocks * (RATIO_MEAN - FIRST), ratio_sum)
    tl.store(mine + blocks * COUNT, count)
    tl.store(mine + blocks * MAXIMUM, top)
    if last_block_arrives(counter_ptr, blocks):
        _finish(partials_ptr, denominator_ptr, metrics_ptr, value_coef, entropy_coef, GIVEN, MOST)


def ppo_loss(
    tokens: PPOTokens, denominator: Tensor | None, options: PPOOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (metrics [10], gradient of the policy sum [N], that of the value sum [N] or [0])."""
    count, unused = tokens.logprobs.numel(), tokens.logprobs

    def out(size: int) -> Tensor:
        return torch.empty(size, dtype=torch.float32, device=unused.device)

    blocks = max(1, min(MAX_BLOCKS, triton.cdiv(count, BLOCK)))
    results = out(len(PPOMetric)), out(count), out(0 if tokens.values is None else count)
    _kernel[(blocks,)](
        *(unused if t is None else t for t in (*tokens, denominator)),
        *results,
        out(PARTIALS * blocks),
        arrivals(unused),
        count,
        *options,
        HAS_VALUES=tokens.values is not None,
        HAS_ENTROPY=tokens.entropy is not None,
        GIVEN=denominator is not None,
        BLOCK=BLOCK,
        MOST=MAX_BLOCKS,
    )
    return results
