"""Masked mean and whitening, optionally over a data-parallel process group; the places that a mask marks.

Left out on purpose: a `dim` argument. PPO whitens over the whole batch.
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
    """`x` in the compute dtype with exactly 0 at False positions, whatever they held (0 * NaN would be NaN)."""
    return torch.where(mask, x.to(checks.compute_dtype(x)), 0.0)


def _check(x: Tensor, mask: Tensor) -> None:
    checks.floating("x", x)
    checks.like("mask", mask, x.shape, x.device, "bool")


def masked_mean(x: Tensor, mask: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """Mean of `x` [...] over the True positions of `mask` [...] (bool), fp32 0-dim; 0 when there are none.

    With `group`, the mean is over the True positions of every rank of it, and each rank's gradient is that of the
    global mean in its own elements, `grad * mask / global_count`: no gradient is communicated. A data-parallel trainer
    that averages gradients over R ranks must therefore multiply the loss by R, or sum gradients instead.
    """
    _check(x, mask)
    sums = torch.stack([_zero_where_false(x, mask).sum(), mask.sum().to(checks.compute_dtype(x))])
    total, count = all_reduce_sum(sums, group).unbind()
    return total / count.detach().clamp(min=1)


def masked_whiten(
    x: Tensor,
    mask: Tensor,
    shift_mean: bool = True,
    eps: float = 1e-8,
    group: ProcessGroup | None = None,
) -> Tensor:
    """(x - mean) / sqrt(var + eps) over the True positions, 0 elsewhere; fp32, shape of `x` [...].

    `var` is the biased variance, in two passes (sum of squared deviations, not of squares). `shift_mean=False` adds the
    mean back, as the classic recipes do for rewards. With `group` both moments are over every rank's True positions;
    the gradient is then that of each rank's own terms, as for `masked_mean`.
    """
    _check(x, mask)
    mean = masked_mean(x, mask, group)
    x = x.to(
        mean.dtype
    )  # or half-precision elements less a 0-dim mean would be formed in half precision
    centred = _zero_where_false(x - mean, mask)
    var = masked_mean(centred.square(), mask, group)
    white = centred * torch.rsqrt(var + eps)
    return white if shift_mean else torch.where(mask, white + mean, 0.0)


def true_places(mask_N: Tensor, count: int | None) -> Tensor:
    """int64 [n]: where the mask is True, in order. Given their `count`, nothing waits for a GPU to say it; of a larger
    one the last places are others.
    """
    if count is None:
        return mask_N.nonzero().squeeze(1)
    return (~mask_N).to(torch.uint8).argsort(stable=True)[:count]
