"""Names for the rows of the small tensors that kernels return, for every backend.

This is the source: the Triton kernels take their indices from here, csrc/layouts.h repeats them for
C++ and CUDA, and tests/csrc/test_layouts.py compares the two. Members index a tensor, `len(Layout)`
is its size.
"""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor


class SoftmaxStatistic(IntEnum):
    """Rows of the statistics [4, N] of N rows x of logits, with e_j = exp((x_j - max x) / T).

    With a softcap, x are the capped logits.
    """

    ROW_MAX = 0
    """max_j x_j, of the raw logits"""
    ROW_SUM = 1
    """sum_j e_j"""
    WEIGHTED = 2
    """sum_j e_j (x_j - max x) / T"""
    TARGET = 3
    """x[label], -inf on a shard that does not hold the label"""


class KLStatistic(IntEnum):
    """Rows of the statistics [5, N] of N pairs of rows x (policy) and y (reference)."""

    ROW_MAX = 0
    """max_j x_j"""
    ROW_SUM = 1
    """sum_j e_j, e_j = exp((x_j - max x) / T)"""
    REF_MAX = 2
    """max_j y_j"""
    REF_SUM = 3
    """sum_j f_j, f_j = exp((y_j - max y) / T)"""
    CROSS = 4
    """sum_j e_j (x_j - y_j) / T"""


class Moment(IntEnum):
    """Columns of the moments [B, 3] of each row's advantages over its True positions."""

    COUNT = 0
    MEAN = 1
    SQUARED_DEVIATIONS = 2
    """sum of (A - mean)^2"""


class PPOMetric(IntEnum):
    """Elements of the PPO loss's metrics [11]: the fields of PPOLoss, then the gradient's scale."""

    LOSS = 0
    POLICY_LOSS = 1
    VALUE_LOSS = 2
    ENTROPY = 3
    CLIP_FRACTION = 4
    VALUE_CLIP_FRACTION = 5
    APPROX_KL = 6
    RATIO_MEAN = 7
    RATIO_MAX = 8
    KL = 9
    GRAD_SCALE = 10
    """factor that the returned gradients still lack, besides the upstream"""


class RankingMetric(IntEnum):
    """Elements of the ranking loss's metrics [5]: those of RankingLoss, then the grad scale."""

    LOSS = 0
    ACCURACY = 1
    PAIRS = 2
    MARGIN = 3
    GRAD_SCALE = 4
    """1 / denominator: the factor that the returned gradient still lacks, besides the upstream"""


LAYOUTS = (SoftmaxStatistic, KLStatistic, Moment, PPOMetric, RankingMetric)


def stack(layout: type[IntEnum], dim: int = 0, **parts: Tensor) -> Tensor:
    """Stack one tensor per member of `layout`, given by its name in lower case."""
    assert len(parts) == len(layout), (layout.__name__, sorted(parts))
    return torch.stack([parts[member.name.lower()] for member in layout], dim)
