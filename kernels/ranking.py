"""The pairwise ranking loss over all pairs of ragged prompts, with its gradient, in one launch.

The signature is that of `_ranking_loss_torch` in fastrlhf/ops/ranking.py. One program per prompt,
tiles of 16 x 16 pairs, so that K = 9 is one tile and K = 64 sixteen; K itself is read on the device
and has no limit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrlhf.kernels.last_block import (
    arrivals,
    extract,
    last_block_arrives,
    reduce_partials,
)
from fastrlhf.kernels.rows import index, jit, on_device, scalar
from fastrlhf.ops.layouts import RankingMetric
from fastrlhf.ops.scalars import Number

TILE = 16
LOSS = index(RankingMetric.LOSS)
ACCURACY = index(RankingMetric.ACCURACY)
PAIRS = index(RankingMetric.PAIRS)
MARGIN = index(RankingMetric.MARGIN)
GRAD_SCALE = index(RankingMetric.GRAD_SCALE)
# Rows of the partial sums [5, G]: four by the name of their metric, and
PROMPTS = GRAD_SCALE  # 1 for each prompt that has a strict pair
SUMS = tl.constexpr(len(RankingMetric))


@triton.jit
def _tile(scores_ptr, ranks_ptr, i, j, end):
    """Return s_i - s_j and s_i + s_j [TILE, TILE], where i and where j is strictly better.

    Neither is outside the prompt.
    """
    s_i = tl.load(scores_ptr + i, mask=i < end, other=0.0).to(tl.float32)
    s_j = tl.load(scores_ptr + j, mask=j < end, other=0.0).to(tl.float32)
    r_i = tl.load(ranks_ptr + i, mask=i < end, other=0)
    r_j = tl.load(ranks_ptr + j, mask=j < end, other=0)
    both = (i < end)[:, None] & (j < end)[None, :]
    return (
        s_i[:, None] - s_j[None, :],
        s_i[:, None] + s_j[None, :],
        both & (r_i[:, None] < r_j[None, :]),
        both & (r_j[None, :] < r_i[:, None]),
    )


@triton.jit
def _bounds(offsets_ptr, prompt, prompts, responses):
    """Return a prompt's first response, the end of its last, and 1.0, or NaN for bad offsets.

    Clamped: no offset, whatever it holds, leads outside the scores. Sound offsets rise from 0 to
    `responses`; then each prompt has its own responses, and together they have all of them.
    """
    first = tl.load(offsets_ptr + prompt)
    last = tl.load(offsets_ptr + prompt + 1)
    begin = tl.minimum(tl.maximum(first, 0), responses)
    end = tl.minimum(tl.maximum(last, begin), responses)
    kept = (begin == first) & (end == last)
    kept = kept & ((prompt > 0) | (first == 0)) & ((prompt < prompts - 1) | (last == responses))
    return begin, end, tl.where(kept, 1.0, float("nan"))


@jit("responses")
def _kernel(
    scores_ptr,  # [N]
    ranks_ptr,  # [N]
    offsets_ptr,  # [G + 1]
    metrics_ptr,  # [5] fp32 out, as RankingMetric
    grad_ptr,  # [N] fp32 out
    partials_ptr,  # [5, G] fp32
    counter_ptr,
    margins_ptr,  # [N], or unused
    responses,
    center_coef,
    MARGINS: tl.constexpr,
    CENTERED: tl.constexpr,
    ON_DEVICE: tl.constexpr,
    PER_PROMPT: tl.constexpr,
    TILE: tl.constexpr,
):
    prompt = tl.program_id(0)
    prompts = tl.num_programs(0)
    begin, end, sound = _bounds(offsets_ptr, prompt, prompts, responses)
    lanes = tl.arange(0, TILE)
    pairs = 0.0
    for i0 in range(begin, end, TILE):
        for j0 in range(begin, end, TILE):
            _, _, better, _ = _tile(scores_ptr, ranks_ptr, i0 + lanes, j0 + lanes, end)
            pairs += tl.sum(tl.sum(tl.where(better, 1.0, 0.0), 1), 0)
    weight = 1.0
    if PER_PROMPT:
        weight = 1.0 / tl.maximum(pairs, 1.0)
    loss, right, margins = 0.0, 0.0, 0.0
    if CENTERED:
        center_coef = scalar(center_coef, ON_DEVICE)
    for i0 in range(begin, end, TILE):
        i = i0 + lanes
        grad = tl.zeros([TILE], dtype=tl.float32)
        for j0 in range(begin, end, TILE):
            j = j0 + lanes
            margin, total, better, worse = _tile(scores_ptr, ranks_ptr, i, j, end)
            above = margin
            if MARGINS:
                m_i = tl.load(margins_ptr + i, mask=i < end, other=0.0).to(tl.float32)
                m_j = tl.load(margins_ptr + j, mask=j < end, other=0.0).to(tl.float32)
                above = margin - (m_i[:, None] - m_j[None, :])
            # log sigmoid(m) without overflow: min(m, 0) - log(1 + e^-|m|)
            small = tl.exp(-tl.abs(above))
            losses = tl.log(1.0 + small) - tl.minimum(above, 0.0)
            if CENTERED:
                losses += center_coef * total * total
            loss += tl.sum(tl.sum(tl.where(better, losses, 0.0), 1), 0)
            right += tl.sum(tl.sum(tl.where(better & (margin > 0.0), 1.0, 0.0), 1), 0)
            margins += tl.sum(tl.sum(tl.where(better, margin, 0.0), 1), 0)
            unlikely = tl.where(above > 0.0, small, 1.0) / (1.0 + small)  # sigmoid(-above)
            likely = tl.where(above > 0.0, 1.0, small) / (1.0 + small)
            if CENTERED:
                pull = 2.0 * center_coef * total
                likely += pull
                unlikely -= pull
            grad += tl.sum(tl.where(worse, likely, 0.0) - tl.where(better, unlikely, 0.0), 1)
        tl.store(grad_ptr + i, grad * weight, mask=i < end)
    mine = partials_ptr + prompt
    tl.store(mine + prompts * LOSS, loss * weight)
    tl.store(mine + prompts * ACCURACY, right)
    tl.store(mine + prompts * MARGIN, margins)
    # the number that all metrics and the gradient are divided by: NaN reaches each of them
    tl.store(mine + prompts * PAIRS, pairs * sound)
    tl.store(mine + prompts * PROMPTS, tl.minimum(pairs, 1.0) * sound)
    if last_block_arrives(counter_ptr, prompts):
        sums = reduce_partials(partials_ptr, prompts, SUMS, 128)
        all_pairs = extract(sums, PAIRS)
        per_pair = 1.0 / tl.maximum(all_pairs, 1.0, propagate_nan=tl.PropagateNan.ALL)
        scale = per_pair
        if PER_PROMPT:
            counted = extract(sums, PROMPTS)
            scale = 1.0 / tl.maximum(counted, 1.0, propagate_nan=tl.PropagateNan.ALL)
        tl.store(metrics_ptr + LOSS, extract(sums, LOSS) * scale)
        tl.store(metrics_ptr + ACCURACY, extract(sums, ACCURACY) * per_pair)
        tl.store(metrics_ptr + PAIRS, all_pairs)
        tl.store(metrics_ptr + MARGIN, extract(sums, MARGIN) * per_pair)
        tl.store(metrics_ptr + GRAD_SCALE, scale)


def ranking_loss(
    scores: Tensor,
    ranks: Tensor,
    prompt_offsets: Tensor,
    per_prompt: bool,
    margins: Tensor | None = None,
    center_coef: Number = 0.0,
) -> tuple[Tensor, Tensor]:
    """Return (metrics [5], gradient [N] not yet divided by the denominator).

    With offsets that do not rise from 0 to N all metrics are NaN, the scale of the gradient among
    them, and so is every gradient.
    """
    prompts = prompt_offsets.numel() - 1
    metrics, partials = (
        torch.empty(n, dtype=torch.float32, device=scores.device)
        for n in (len(RankingMetric), len(RankingMetric) * prompts)
    )
    grad = torch.empty(scores.shape, dtype=torch.float32, device=scores.device)
    _kernel[(prompts,)](
        scores,
        ranks,
        prompt_offsets,
        metrics,
        grad,
        partials,
        arrivals(scores),
        scores if margins is None else margins,
        scores.numel(),
        center_coef,
        MARGINS=margins is not None,
        CENTERED=on_device(center_coef) or center_coef != 0,
        ON_DEVICE=on_device(center_coef),
        PER_PROMPT=per_prompt,
        TILE=TILE,
        num_warps=2,
    )
    return metrics, grad
