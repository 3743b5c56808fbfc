"""Sources drawn in proportion to weights: `data.train: {path: weight}`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

import numpy as np

from fastrlhf.data.loader import Dataset, permutation

Sample = TypeVar("Sample")


class Blended(Generic[Sample]):
    """The samples of all `sources`, one source after another, in an `order` that weighs them.

    An epoch has as many samples as the sources together. Each source gets its share of them, evenly
    spread.
    """

    def __init__(self, sources: Sequence[Dataset[Sample]], weights: Sequence[float]) -> None:
        self.sources = sources
        self.weights = weights
        self._ends = np.cumsum([len(source) for source in sources])

    def __len__(self) -> int:
        """Return the number of samples in all sources."""
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Sample:
        """Return sample `index`, counted through the sources."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        source = int(np.searchsorted(self._ends, index, side="right"))
        return self.sources[source][index - (int(self._ends[source - 1]) if source else 0)]

    def order(self, seed: int, epoch: int, shuffle: bool = True) -> np.ndarray:
        """Return the samples of one epoch, see `blend_order`."""
        return blend_order(self._ends, self.weights, seed, epoch, shuffle)


def blend_order(
    ends: np.ndarray, weights: Sequence[float], seed: int, epoch: int, shuffle: bool = True
) -> np.ndarray:
    """Return the samples of one epoch of a blend, int64 [ends[-1]]; the same on every machine.

    Source p has the samples ends[p - 1] .. ends[p] - 1 and gets its share n_p of the epoch, evenly
    spread, so that any section of the epoch has these proportions up to one sample per source. Each
    source continues in the order where the previous epoch stopped, and uses all its samples once
    before it repeats any.
    """
    drawn, positions = [], []
    for part, count in enumerate(apportion(int(ends[-1]), weights)):
        first = int(ends[part - 1]) if part else 0
        size = int(ends[part]) - first
        draws = np.arange(epoch * count, (epoch + 1) * count)
        passes = draws // size
        orders = {p: permutation(size, seed + part, p, shuffle) for p in np.unique(passes).tolist()}
        samples = [orders[p][draws[passes == p] % size] for p in orders]
        drawn.append(first + np.concatenate(samples) if samples else draws)
        positions.append((np.arange(count) + 0.5) / max(count, 1))
    return np.concatenate(drawn)[np.argsort(np.concatenate(positions), kind="stable")]


def apportion(total: int, weights: Sequence[float]) -> list[int]:
    """Split `total` into integers proportional to `weights`, by the largest-remainder method."""
    shares = [total * weight / sum(weights) for weight in weights]
    counts = [int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: (counts[i] - shares[i], i))
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts
