"""Medians with their spread, and the order in which candidates take turns."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Spread(NamedTuple):
    median: float
    p20: float
    p80: float
    samples: int


def quantile(values: Sequence[float], q: float) -> float:
    """Return a quantile by linear interpolation between order statistics.

    Type 7 of Hyndman and Fan 1996, numpy's default.
    """
    if not values or not 0 <= q <= 1:
        raise ValueError(
            f"quantile: got {len(values)} values and q = {q}, expected one or more and 0 <= q <= 1"
        )
    ordered = sorted(values)
    at = q * (len(ordered) - 1)
    low, high = math.floor(at), math.ceil(at)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def spread(values: Sequence[float]) -> Spread:
    return Spread(quantile(values, 0.5), quantile(values, 0.2), quantile(values, 0.8), len(values))


def turns(candidates: int, rounds: int) -> Iterator[int]:
    """Yield A B C, C B A, A B C, ...: each candidate once a round, with changing neighbours."""
    for r in range(rounds):
        order = range(candidates)
        yield from order if r % 2 == 0 else reversed(order)
