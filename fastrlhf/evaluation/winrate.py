"""Win rates and pair accuracies with bootstrap intervals.

Judgements of one prompt are not independent, so prompts are resampled, not judgements. Only numpy
is needed: no model, no tokenizer, no judge.

Not supported: Bradley-Terry or Elo ratings of several policies. The paper compares each policy with
one fixed baseline.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    import torch

Margin = TypeVar("Margin", "NDArray[np.float64]", "torch.Tensor")

MIN_PROMPTS = 10
"""Fewest prompts for which an interval is computed.

The bootstrap takes the prompts for the population: the interval of a single prompt would have the
width 0. With n of them it is too narrow by about sqrt((n - 1) / n), which is 5 % for 10, and the
percentiles of few distinct resamples are coarse.
"""
_MAX_COUNTS = 2**20
"""Bootstrap counts held in memory at a time."""


class WinRateDict(TypedDict):
    """A `WinRate` as a JSON object."""

    rate: float
    low: float | None
    high: float | None
    n: int
    ties: int
    clusters: int


@dataclass(frozen=True)
class WinRate:
    """A share of judgements with its confidence interval."""

    rate: float
    """(Wins + ties / 2) / n. For `pair_accuracy`: the share of pairs in the right order."""
    low: float | None
    """Lower end of the interval; None below MIN_PROMPTS prompts."""
    high: float | None
    """Upper end of the interval; None below MIN_PROMPTS prompts."""
    n: int
    """Number of judgements, or of strictly ranked pairs."""
    ties: int
    """Number of judgements of 0.5, or of pairs with equal scores."""
    clusters: int
    """Number of prompts, which are resampled."""

    def as_dict(self) -> WinRateDict:
        """Return the fields as a dictionary, for a JSON file."""
        return WinRateDict(
            rate=self.rate,
            low=self.low,
            high=self.high,
            n=self.n,
            ties=self.ties,
            clusters=self.clusters,
        )

    def __str__(self) -> str:
        interval = interval_text(self.low, self.high, self.clusters)
        return f"{self.rate:.3f} ({interval}; n={self.n}, ties={self.ties})"


def interval_text(low: float | None, high: float | None, prompts: int, form: str = ".3f") -> str:
    """Return a 95 % interval in words, or why there is none; `form` formats the ends."""
    if low is None or high is None:
        noun = "prompt" if prompts == 1 else "prompts"
        return f"no interval: {prompts} {noun}, fewer than {MIN_PROMPTS}"
    return f"95 % interval {low:{form}} to {high:{form}}"


def pair_agreement(margin: Margin) -> Margin:
    """Return the agreement of scores with the order of pairs: 1, 0.5 for equal scores, or 0.

    `margin` is the score of the better response - the score of the worse, an array or a tensor. Its
    mean is the accuracy of a reward model, in training and in `eval rm`: equal scores count as the
    flip of a coin. NaN counts 0.
    """
    return 1.0 * (margin > 0) + 0.5 * (margin == 0)


def win_rate(
    wins: ArrayLike,
    clusters: ArrayLike | None = None,
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> WinRate:
    """Return the share of comparisons won, with a percentile bootstrap interval.

    - wins [N]: numbers from 0 (lost) to 1 (won), 0.5 for a tie; may be averages of several votes.
    - clusters [N]: the prompt of each comparison (integers or strings). None: all are different.
    - level: coverage of the interval, which is None below MIN_PROMPTS prompts.

    Raises ValueError if wins is empty, not a vector or outside [0, 1], or the shapes differ.
    """
    wins_N = np.asarray(wins, dtype=np.float64)
    if wins_N.ndim != 1 or wins_N.size == 0:
        raise ValueError(f"wins must be a non-empty vector, got shape {wins_N.shape}")
    if not ((wins_N >= 0) & (wins_N <= 1)).all():  # written so that NaN fails too
        raise ValueError("wins must be between 0 (lost) and 1 (won)")
    members_N: NDArray[np.intp] = np.arange(wins_N.size)
    if clusters is not None:
        clusters_N = np.asarray(clusters)
        if clusters_N.shape != wins_N.shape:
            raise ValueError(
                f"clusters must have the shape of wins {wins_N.shape}, got {clusters_N.shape}"
            )
        members_N = np.unique(clusters_N, return_inverse=True)[1]
    sums_G = np.bincount(members_N, weights=wins_N).astype(np.float64)
    counts_G = np.bincount(members_N).astype(np.float64)
    return _with_interval(sums_G, counts_G, int((wins_N == 0.5).sum()), level, resamples, seed)


def pair_accuracy(
    scores: ArrayLike,
    ranks: ArrayLike,
    offsets: ArrayLike,
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> WinRate:
    """Return the share of strictly ranked pairs that the scores put in the labeler's order.

    - scores [N]: a reward model's scores of all responses, prompt after prompt.
    - ranks [N]: the labeler's ranks, 1 for the best; pairs with equal ranks are not counted.
    - offsets [G+1]: prompt g has the responses [offsets[g], offsets[g+1]).

    A pair with equal scores counts one half. The interval is a percentile bootstrap over prompts.
    Raises ValueError if the shapes differ, a value is NaN or no pair is ranked strictly.
    """
    scores_N, offsets_G = np.asarray(scores, dtype=np.float64), np.asarray(offsets)
    # Converted to a signed type for the differences; labelers may use half ranks.
    ranks_N = np.asarray(ranks, dtype=np.float64)
    _check_ranked(scores_N, ranks_N, offsets_G)
    right, pairs, ties = [], [], 0
    for start, stop in itertools.pairwise(offsets_G):
        i, j = np.triu_indices(stop - start, 1)
        # 1 where the first response of the pair is the better one.
        order = np.sign(ranks_N[start:stop][j] - ranks_N[start:stop][i])
        predicted = np.sign(scores_N[start:stop][i] - scores_N[start:stop][j])
        strict = order != 0
        right.append(pair_agreement(order * predicted)[strict].sum())
        pairs.append(strict.sum())
        ties += int((strict & (predicted == 0)).sum())
    sums_G, counts_G = np.array(right), np.array(pairs, dtype=np.float64)
    if counts_G.sum() == 0:
        raise ValueError("no pair to evaluate: no two responses of a prompt have different ranks")
    kept = counts_G > 0
    return _with_interval(sums_G[kept], counts_G[kept], ties, level, resamples, seed)


def _check_ranked(
    scores_N: NDArray[np.float64], ranks_N: NDArray[np.float64], offsets_G: NDArray[np.int64]
) -> None:
    if scores_N.ndim != 1 or scores_N.shape != ranks_N.shape:
        raise ValueError(
            "scores and ranks must be vectors of one length, "
            f"got {scores_N.shape} and {ranks_N.shape}"
        )
    N = scores_N.size
    if offsets_G.ndim != 1 or offsets_G.size < 2 or offsets_G[0] != 0 or offsets_G[-1] != N:
        raise ValueError(f"offsets must go from 0 to the number of scores ({N}), got {offsets_G}")
    if np.isnan(scores_N).any() or np.isnan(ranks_N).any():
        raise ValueError("scores and ranks must not be NaN")


def mean_interval(
    values: ArrayLike,
    clusters: ArrayLike,
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float | None, float | None]:
    """Return the mean of values [N] and the ends of its percentile bootstrap interval.

    The interval is over prompts: `clusters` [N] names the prompt of each value. The ends are None
    if there are fewer than MIN_PROMPTS prompts. Raises ValueError
    if the two are empty or not vectors of one length.
    """
    values_N, clusters_N = np.asarray(values, dtype=np.float64), np.asarray(clusters)
    if values_N.ndim != 1 or values_N.size == 0 or values_N.shape != clusters_N.shape:
        raise ValueError(
            "expected two vectors of one length, "
            f"got shapes {values_N.shape} and {clusters_N.shape}"
        )
    members_N = np.unique(clusters_N, return_inverse=True)[1]
    sums_G = np.bincount(members_N, weights=values_N).astype(np.float64)
    counts_G = np.bincount(members_N).astype(np.float64)
    low, high = _bootstrap(sums_G, counts_G, level, resamples, seed)
    return float(values_N.mean()), low, high


def _bootstrap(
    sums_G: NDArray[np.float64],
    counts_G: NDArray[np.float64],
    level: float,
    resamples: int,
    seed: int,
) -> tuple[float, float] | tuple[None, None]:
    """Return the ends of the percentile bootstrap interval of sum / count over prompts.

    Every interval of the package is computed here. Below MIN_PROMPTS prompts there is none.
    """
    prompts = sums_G.size
    if prompts < MIN_PROMPTS:
        return None, None
    generator, shares_G = np.random.default_rng(seed), np.full(prompts, 1 / prompts)
    rates = []
    # In chunks, which gives the same draws, since all at once are resamples * prompts numbers.
    chunk = max(1, _MAX_COUNTS // prompts)
    for start in range(0, resamples, chunk):
        drawn = generator.multinomial(prompts, shares_G, size=min(chunk, resamples - start))
        rates.append((drawn @ sums_G) / (drawn @ counts_G))
    low, high = np.quantile(np.concatenate(rates), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _with_interval(
    sums_G: NDArray[np.float64],
    counts_G: NDArray[np.float64],
    ties: int,
    level: float,
    resamples: int,
    seed: int,
) -> WinRate:
    """Return sum / count with the percentile bootstrap interval of that ratio over prompts."""
    low, high = _bootstrap(sums_G, counts_G, level, resamples, seed)
    rate = float(sums_G.sum() / counts_G.sum())
    return WinRate(rate, low, high, int(counts_G.sum()), ties, clusters=int(sums_G.size))
