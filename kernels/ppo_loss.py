"""The policy-loss family and the value loss with their gradients and metrics, in one launch.

The signature is that of `_ppo_loss_torch` in fastrlhf/ops/ppo_kernels.py. The gradients are those of sums:
the denominator may be the mask's count, which is known only when the last block finishes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrlhf.kernels.gae import estimate_kl, k3
from fastrlhf.kernels.last_block import (
    arrivals,
    extract,
    last_block_arrives,
    reduce_partials,
)
from fastrlhf.kernels.rows import index, jit, masked_load, on_device, scalar
from fastrlhf.ops.layouts import PPOMetric
from fastrlhf.ops.policy import PolicyForm, PPOOptions
from fastrlhf.ops.ppo_kernels import PLAIN, PPOTokens

# Ten running sums: more elements per thread would leave room for two blocks per multiprocessor.
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
KL = index(PPOMetric.KL)
GRAD_SCALE = index(PPOMetric.GRAD_SCALE)

# Rows of the partial results [10, blocks]: the sums of the metrics that are means, at their index
# less that of the first, then the number of tokens, the KL and the largest ratio.
FIRST = index(PPOMetric.POLICY_LOSS)
COUNT = tl.constexpr(PPOMetric.RATIO_MEAN + 1 - PPOMetric.POLICY_LOSS)
KL_SUM = tl.constexpr(COUNT.value + 1)
MAXIMUM = tl.constexpr(COUNT.value + 2)
PARTIALS = COUNT.value + 3


@triton.jit
def _join(p, v, e, c, w, k, r, n, d, top, p2, v2, e2, c2, w2, k2, r2, n2, d2, top2):
    top = tl.maximum(top, top2)
    return p + p2, v + v2, e + e2, c + c2, w + w2, k + k2, r + r2, n + n2, d + d2, top


@triton.jit
def _partials(partials_ptr, row, lanes, blocks):
    at = partials_ptr + blocks * row + lanes
    return tl.load(at, mask=lanes < blocks, other=0.0, cache_modifier=".cg")


@triton.jit
def _finish(
    partials_ptr,
    denominator_ptr,
    metrics_ptr,
    value_coef,
    entropy_coef,
    kl_coef,
    GIVEN: tl.constexpr,
    HAS_REF: tl.constexpr,
    MOST: tl.constexpr,
):
    """Reduce the partial results [10, blocks] to the metrics [11]."""
    blocks = tl.num_programs(0)
    lanes = tl.arange(0, MOST)
    ratios = _partials(partials_ptr, MAXIMUM, lanes, blocks)
    sums = reduce_partials(partials_ptr, blocks, COUNT + 1, MOST)
    scale = 1.0 / tl.maximum(extract(sums, COUNT), 1.0)
    if GIVEN:
        scale = 1.0 / tl.load(denominator_ptr).to(tl.float32)
    means = sums * scale
    policy = extract(means, POLICY_LOSS - FIRST)
    value = extract(means, VALUE_LOSS - FIRST)
    entropy = extract(means, ENTROPY - FIRST)
    loss = policy + value_coef * value - entropy_coef * entropy
    kl = 0.0
    if HAS_REF:
        kl = tl.sum(_partials(partials_ptr, KL_SUM, lanes, blocks), 0) * scale
        loss += kl_coef * kl
    tl.store(metrics_ptr + LOSS, loss)
    k = tl.arange(0, 8)
    tl.store(metrics_ptr + FIRST + k, means, mask=k < COUNT)
    tl.store(metrics_ptr + RATIO_MAX, tl.max(ratios, 0))
    tl.store(metrics_ptr + KL, kl)
    tl.store(metrics_ptr + GRAD_SCALE, scale)


@triton.jit
def _kl_slope(d, ESTIMATOR: tl.constexpr):
    """Return the derivative of `estimate_kl` in d."""
    slope = d * 0.0 + 1.0
    if ESTIMATOR == "abs":
        slope = tl.where(d > 0.0, 1.0, tl.where(d < 0.0, -1.0, d * 0.0))
    if ESTIMATOR == "k2":
        slope = d
    if ESTIMATOR == "k3":  # 1 - exp(-d), by its series near 0, where it would cancel
        series = d * (1.0 - d * (0.5 - d * (1.0 / 6 - d * (1.0 / 24))))
        slope = tl.where(tl.abs(d) < 0.03, series, 1.0 - tl.exp(-d))
    return slope


@triton.jit
def _policy(log_ratio, logprob, advantage, bounds, CISPO: tl.constexpr):
    """Return (ratio, loss, slope, cut) of tokens; `bounds` of the ratio, then the dual clip."""
    low, high, dual_clip = bounds
    ratio = tl.exp(log_ratio)
    bounded = tl.minimum(tl.maximum(ratio, low), high)
    if CISPO:
        slope = -advantage * bounded
        loss = slope * logprob
        cut = ratio != bounded
    else:
        plain = -advantage * ratio
        clipped = -advantage * bounded
        cut = clipped > plain
        loss = tl.maximum(plain, clipped)
        ceiling = -advantage * dual_clip
        high_loss = (advantage < 0.0) & (loss > ceiling)
        loss = tl.where(high_loss, ceiling, loss)
        cut = cut | high_loss
        slope = tl.where(cut, 0.0, plain)
    return ratio, loss, slope, cut


@triton.jit
def _add_tokens(
    sums,
    at,
    inside,
    keep,
    logprob,
    log_ratio,
    pointers,
    options,
    CISPO: tl.constexpr,
    ESTIMATOR: tl.constexpr,
    HAS_VALUES: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_REF: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
):
    """Add the tokens' terms to the sums; return them, the policy's slopes and the KL's."""
    policy, value, entropy, clipped, value_clipped, approx_kl, ratios, count, kls, top = sums
    advantages_ptr, values_ptr, old_values_ptr, returns_ptr, entropy_ptr, ref_ptr = pointers[:6]
    weights_ptr, grad_values_ptr = pointers[6:]
    bounds, value_clip, value_coef, kl_coef = options
    live = tl.where(keep, 1.0, 0.0)
    advantage = masked_load(advantages_ptr + at, inside, keep)
    ratio, loss, slope, cut = _policy(log_ratio, logprob, advantage, bounds, CISPO)
    weight = live
    if HAS_WEIGHTS:
        weight = masked_load(weights_ptr + at, inside, keep)
        loss *= weight
        slope *= weight
    policy += loss
    clipped += tl.where(cut & keep, 1.0, 0.0)
    approx_kl += k3(-log_ratio)
    ratios += live * ratio
    top = tl.maximum(top, tl.where(keep, ratio, 0.0))
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
        grad = tl.where(cut, 0.0, value_coef * off)
        off = tl.where(cut, off_clipped, off)
        if HAS_WEIGHTS:
            grad *= weight
            off *= tl.sqrt(tl.abs(weight))
            value += tl.where(weight < 0.0, -0.5, 0.5) * off * off
        else:
            value += 0.5 * off * off
        tl.store(grad_values_ptr + at, grad, mask=inside)
        value_clipped += tl.where(cut, 1.0, 0.0)
    if HAS_ENTROPY:
        each = masked_load(entropy_ptr + at, inside, keep)
        if HAS_WEIGHTS:
            each *= weight
        entropy += each
    kl_slope = live * 0.0
    if HAS_REF:
        d = logprob - masked_load(ref_ptr + at, inside, keep)
        kls += estimate_kl(d, ESTIMATOR) * weight
        kl_slope = kl_coef * _kl_slope(d, ESTIMATOR) * weight
    sums = (policy, value, entropy, clipped, value_clipped, approx_kl, ratios, count, kls, top)
    return sums, slope, kl_slope


@triton.jit
def _load_ratio(logprobs_ptr, old_ptr, mask_ptr, at, inside):
    """Return (keep, log-prob, log-ratio) at `at`."""
    keep = tl.load(mask_ptr + at, mask=inside, other=0) != 0
    logprob = masked_load(logprobs_ptr + at, inside, keep)
    return keep, logprob, logprob - masked_load(old_ptr + at, inside, keep)


@jit("tokens", "length")
def _kernel(
    logprobs_ptr,  # [N]
    old_ptr,  # [N]
    advantages_ptr,  # [N]
    mask_ptr,  # [N] bool
    values_ptr,  # [N], or unused
    old_values_ptr,  # [N], or unused
    returns_ptr,  # [N], or unused
    entropy_ptr,  # [N], or unused
    ref_ptr,  # [N], or unused
    weights_ptr,  # [N], or unused
    denominator_ptr,  # 0-dim, or unused
    metrics_ptr,  # [11] fp32 out, as PPOMetric
    grad_logprobs_ptr,  # [N] fp32 out
    grad_values_ptr,  # [N] fp32 out
    partials_ptr,  # [10, blocks] fp32
    counter_ptr,
    tokens,
    length,  # tokens of a sequence
    clip_low,
    clip_high,
    value_clip,
    value_coef,
    entropy_coef,
    dual_clip,
    kl_coef,
    SEQUENCE: tl.constexpr,
    CISPO: tl.constexpr,
    ESTIMATOR: tl.constexpr,
    HAS_VALUES: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_REF: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    GIVEN: tl.constexpr,
    ON_DEVICE: tl.constexpr,
    BLOCK: tl.constexpr,
    MOST: tl.constexpr,
):
    bounds = (
        1.0 - scalar(clip_low, ON_DEVICE),
        1.0 + scalar(clip_high, ON_DEVICE),
        scalar(dual_clip, ON_DEVICE),
    )
    value_coef = scalar(value_coef, ON_DEVICE)
    kl_coef = scalar(kl_coef, ON_DEVICE)
    options = (bounds, scalar(value_clip, ON_DEVICE), value_coef, kl_coef)
    pointers = (
        advantages_ptr,
        values_ptr,
        old_values_ptr,
        returns_ptr,
        entropy_ptr,
        ref_ptr,
        weights_ptr,
        grad_values_ptr,
    )
    zeros = tl.zeros([BLOCK], dtype=tl.float32)
    sums = (zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros)
    blocks = tl.num_programs(0)
    lanes = tl.arange(0, BLOCK)
    if SEQUENCE:
        for row in range(tl.program_id(0), tokens // length, blocks):
            total, count = zeros, zeros
            for start in range(0, length, BLOCK):
                inside = start + lanes < length
                at = row * length + start + lanes
                keep, _, log_ratio = _load_ratio(logprobs_ptr, old_ptr, mask_ptr, at, inside)
                total += log_ratio
                count += tl.where(keep, 1.0, 0.0)
            share = 1.0 / tl.maximum(tl.sum(count, 0), 1.0)
            mean = tl.sum(total, 0) * share
            slopes = zeros
            for start in range(0, length, BLOCK):
                inside = start + lanes < length
                at = row * length + start + lanes
                keep, logprob, _ = _load_ratio(logprobs_ptr, old_ptr, mask_ptr, at, inside)
                log_ratio = tl.where(keep, mean, 0.0)
                sums, slope, grad = _add_tokens(
                    sums,
                    at,
                    inside,
                    keep,
                    logprob,
                    log_ratio,
                    pointers,
                    options,
                    CISPO,
                    ESTIMATOR,
                    HAS_VALUES,
                    HAS_ENTROPY,
                    HAS_REF,
                    HAS_WEIGHTS,
                )
                slopes += slope
                if CISPO:
                    grad += slope
                tl.store(grad_logprobs_ptr + at, grad, mask=inside)
            if not CISPO:
                # every token of a sequence moves its ratio by 1 / n, and with it all terms
                tl.debug_barrier()
                each = tl.sum(slopes, 0) * share
                for start in range(0, length, BLOCK):
                    inside = start + lanes < length
                    at = row * length + start + lanes
                    keep = tl.load(mask_ptr + at, mask=inside, other=0) != 0
                    grad = tl.load(grad_logprobs_ptr + at, mask=inside, other=0.0)
                    grad += tl.where(keep, each, 0.0)
                    tl.store(grad_logprobs_ptr + at, grad, mask=inside)
    else:
        for start in range(tl.program_id(0) * BLOCK, tokens, blocks * BLOCK):
            at = start + lanes
            inside = at < tokens
            keep, logprob, log_ratio = _load_ratio(logprobs_ptr, old_ptr, mask_ptr, at, inside)
            sums, slope, grad = _add_tokens(
                sums,
                at,
                inside,
                keep,
                logprob,
                log_ratio,
                pointers,
                options,
                CISPO,
                ESTIMATOR,
                HAS_VALUES,
                HAS_ENTROPY,
                HAS_REF,
                HAS_WEIGHTS,
            )
            tl.store(grad_logprobs_ptr + at, grad + slope, mask=inside)
    totals = tl.reduce(sums, 0, _join)
    policy, value, entropy, clipped, value_clipped, approx_kl, ratio, count, kl, top = totals
    mine = partials_ptr + tl.program_id(0)
    tl.store(mine + blocks * (POLICY_LOSS - FIRST), policy)
    tl.store(mine + blocks * (VALUE_LOSS - FIRST), value)
    tl.store(mine + blocks * (ENTROPY - FIRST), entropy)
    tl.store(mine + blocks * (CLIP_FRACTION - FIRST), clipped)
    tl.store(mine + blocks * (VALUE_CLIP_FRACTION - FIRST), value_clipped)
    tl.store(mine + blocks * (APPROX_KL - FIRST), approx_kl)
    tl.store(mine + blocks * (RATIO_MEAN - FIRST), ratio)
    tl.store(mine + blocks * COUNT, count)
    tl.store(mine + blocks * KL_SUM, kl)
    tl.store(mine + blocks * MAXIMUM, top)
    if last_block_arrives(counter_ptr, blocks):
        _finish(
            partials_ptr,
            denominator_ptr,
            metrics_ptr,
            value_coef,
            scalar(entropy_coef, ON_DEVICE),
            kl_coef,
            GIVEN,
            HAS_REF,
            MOST,
        )


def ppo_loss(
    tokens: PPOTokens, denominator: Tensor | None, options: PPOOptions, form: PolicyForm = PLAIN
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (metrics [11], gradient of the policy sum [N], that of the value sum [N] or [0])."""
    count, unused = tokens.logprobs.numel(), tokens.logprobs
    by_sequence = form.ratio == "sequence"

    def out(size: int) -> Tensor:
        return torch.empty(size, dtype=torch.float32, device=unused.device)

    pieces = count // max(form.length, 1) if by_sequence else triton.cdiv(count, BLOCK)
    blocks = max(1, min(MAX_BLOCKS, pieces))
    results = out(len(PPOMetric)), out(count), out(0 if tokens.values is None else count)
    _kernel[(blocks,)](
        *(unused if t is None else t for t in (*tokens, denominator)),
        *results,
        out(PARTIALS * blocks),
        arrivals(unused),
        count,
        max(form.length, 1),
        *options,
        SEQUENCE=by_sequence,
        CISPO=form.objective == "cispo",
        ESTIMATOR=form.kl_estimator,
        HAS_VALUES=tokens.values is not None,
        HAS_ENTROPY=tokens.entropy is not None,
        HAS_REF=tokens.ref_logprobs is not None,
        HAS_WEIGHTS=tokens.weights is not None,
        GIVEN=denominator is not None,
        ON_DEVICE=on_device(*options),
        BLOCK=BLOCK,
        MOST=MAX_BLOCKS,
    )
    return results
