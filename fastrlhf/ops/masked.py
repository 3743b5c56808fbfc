"""Masked mean, variance and whitening, optionally over a data-parallel group; places of a mask.

Not supported: whitening along a dimension. PPO whitens over the complete batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastrlhf.ops import checks
from fastrlhf.ops.collectives import all_reduce_sum

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def _zero_where_false(x: Tensor, mask: Tensor) -> Tensor:
    """Return `x` in the compute dtype with exactly 0 at False positions (0 * NaN would be NaN)."""
    return torch.where(mask, x.to(checks.compute_dtype(x)), 0.0)


def _check(x: Tensor, mask: Tensor) -> None:
    checks.floating("x", x)
    checks.like("mask", mask, x.shape, x.device, "bool")


def masked_mean(
    x: Tensor, mask: Tensor, group: ProcessGroup | None = None, dim: int | None = None
) -> Tensor:
    """Return the mean of `x` [...] over the True positions of `mask` [...] (bool), fp32.

    0-dim, or along `dim` alone, which the result lacks. 0 if there is no True position. With
    `group`, the mean is over the True positions of all its ranks (the same shapes on each), and
    each rank's gradient is that of the global mean in its own elements, `grad * mask /
    global_count`: no gradient is communicated. A data-parallel trainer that averages gradients over
    R ranks must therefore multiply the loss by R, or sum gradients instead.
    """
    _check(x, mask)
    return _mean(_zero_where_false(x, mask), mask, group, dim)


def _mean(
    zeroed: Tensor, mask: Tensor, group: ProcessGroup | None, dim: int | None = None
) -> Tensor:
    """Return the mean of x, which is 0 where the mask is False."""
    if dim is None:
        sums = torch.stack([zeroed.sum(), mask.sum().to(zeroed.dtype)])
    else:
        sums = torch.stack([zeroed.sum(dim), mask.sum(dim).to(zeroed.dtype)])
    total, count = all_reduce_sum(sums, group).unbind()
    return total / count.detach().clamp(min=1)


def masked_var(
    x: Tensor, mask: Tensor, group: ProcessGroup | None = None, dim: int | None = None
) -> Tensor:
    """Return the biased variance of `x` over the True positions of `mask`, fp32.

    Two passes (the mean of squared deviations, not of squares); shapes, `group` and its gradient
    as in `masked_mean`. 0 if there is no True position.
    """
    mean = masked_mean(x, mask, group, dim)
    if dim is not None:
        mean = mean.unsqueeze(dim)
    centered = _zero_where_false(x.to(mean.dtype) - mean, mask)
    return _mean(centered.square(), mask, group, dim)


def masked_whiten(
    x: Tensor,
    mask: Tensor,
    shift_mean: bool = True,
    eps: float = 1e-8,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Return (x - mean) / sqrt(var + eps) at the True positions, 0 elsewhere; fp32, shape of `x`.

    `var` is the biased variance, in two passes (sum of squared deviations, not of squares).
    `shift_mean=False` adds the mean back, as the classic recipes do for rewards. With `group` both
    moments are over the True positions of all ranks; the gradient is then that of each rank's own
    terms, as for `masked_mean`.
    """
    _check(x, mask)
    mean = masked_mean(x, mask, group)
    # half-precision elements less a 0-dim mean would be computed in half precision
    x = x.to(mean.dtype)
    centered = _zero_where_false(x - mean, mask)
    var = masked_mean(centered.square(), mask, group)
    white = centered * torch.rsqrt(var + eps)
    return white if shift_mean else torch.where(mask, white + mean, 0.0)


def true_places(mask_N: Tensor, count: int | None) -> Tensor:
    """Return the True positions of the mask in order, int64 [n].

    With their `count`, nothing waits for a GPU. A larger count appends False positions.
    """
    if count is None:
        return mask_N.nonzero().squeeze(1)
    return (~mask_N).to(torch.uint8).argsort(stable=True)[:count]
