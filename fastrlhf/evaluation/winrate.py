"""Win rates and pair accuracies with bootstrap intervals.

Judgements of one prompt are not independent, so prompts are resampled, not judgements. numpy alone: no model, no
tokenizer, no judge. Left out on purpose: Bradley-Terry or Elo ratings over several policies; the paper compares each
with one fixed baseline.
"""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

_DRAWN = 2**20
"""Counts of the bootstrap that are in memory at a time."""
MIN_PROMPTS = 10
"""Fewest prompts that have an interval.

Resampling few prompts says little: of one prompt every resample is the same, and the interval would
be a point.
"""
NO_INTERVAL = f"no interval: fewer than {MIN_PROMPTS} prompts"


@dataclass(frozen=True)
class WinRate:
    """A share of judgements with its interval."""

    rate: float
    """Wins plus half the ties, over n. For `pair_accuracy`: the share of pairs in the right order."""
    low: float | None
    """Lower end of the interval; None below `MIN_PROMPTS` prompts."""
    high: float | None
    """Upper end of the interval; None below `MIN_PROMPTS` prompts."""
    n: int
    """Judgements, or strictly ranked pairs."""
    ties: int
    """Judgements of 0.5, or pairs that got equal scores."""
    clusters: int
    """Prompts the judgements came from: what was resampled."""

    def as_dict(self) -> dict[str, float | int | None]:
        """For a JSON file."""
        return asdict(self)

    def __str__(self) -> str:
        interval = NO_INTERVAL
        if self.low is not None and self.high is not None:
            interval = f"{self.low:.3f}, {self.high:.3f}"
        return f"{self.rate:.3f} [{interval}] (n={self.n}, ties={self.ties})"


def between(low: float | None, high: float | None, form: str = "{:.3f}") -> str:
    """Return the ends of an interval in words, or that there is none; `form` formats an end."""
    if low is None or high is None:
        return NO_INTERVAL
    return f"{form.format(low)} to {form.format(high)}"


def describe_interval(low: float | None, high: float | None, form: str = "{:.3f}") -> str:
    """Return what `between` does, with the coverage of an interval."""
    return ("" if low is None else "95 % interval ") + between(low, high, form)


def win_rate(
    wins: ArrayLike,
    clusters: ArrayLike | None = None,
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> WinRate:
    """The share of comparisons won against a baseline, with a percentile bootstrap interval.

    wins      [N] numbers from 0 (lost) to 1 (won); 0.5 is a tie. Several judges' votes may be averaged before.
    clusters  [N] the prompt each comparison belongs to (integers or strings); None: each has a prompt of its own
    level     the interval's coverage
    Raises ValueError for an empty array, another shape, or numbers outside [0, 1].
    """
    wins_N = np.asarray(wins, dtype=np.float64)
    if wins_N.ndim != 1 or wins_N.size == 0:
        raise ValueError(f"wins must be a non-empty vector, got shape {wins_N.shape}")
    if not ((wins_N >= 0) & (wins_N <= 1)).all():  # written so that NaN fails too
        raise ValueError("wins must lie from 0 (lost) to 1 (won)")
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
    """The share of strictly ranked pairs that the scores put in the labeler's order, with a bootstrap interval over
    prompts.

    scores   [N] a reward model's scores of all responses, prompt after prompt
    ranks    [N] the labeler's ranks, 1 for the best; equal ranks of one prompt are a tie, and such pairs are left out
    offsets  [G+1] where each prompt's responses begin: those of prompt g are offsets[g] to offsets[g+1] - 1
    A pair with equal scores counts one half. Raises ValueError for shapes that disagree, NaN, no strict pair.
    """
    scores_N, offsets_G = np.asarray(scores, dtype=np.float64), np.asarray(offsets)
    ranks_N = np.asarray(
        ranks, dtype=np.float64
    )  # signed: differences are taken; labelers may use halves
    if scores_N.ndim != 1 or scores_N.shape != ranks_N.shape:
        raise ValueError(
            f"scores and ranks must be vectors of one length, got {scores_N.shape} and {ranks_N.shape}"
        )
    if (
        offsets_G.ndim != 1
        or offsets_G.size < 2
        or offsets_G[0] != 0
        or offsets_G[-1] != scores_N.size
    ):
        raise ValueError(
            f"offsets must run from 0 to the number of scores ({scores_N.size}), got {offsets_G}"
        )
    if np.isnan(scores_N).any() or np.isnan(ranks_N).any():
        raise ValueError("scores and ranks must not hold NaN")
    right, pairs, ties = [], [], 0
    for start, stop in itertools.pairwise(offsets_G):
        i, j = np.triu_indices(stop - start, 1)
        order = np.sign(
            ranks_N[start:stop][j] - ranks_N[start:stop][i]
        )  # 1: the first of the pair is the better one
        predicted = np.sign(scores_N[start:stop][i] - scores_N[start:stop][j])
        strict = order != 0
        right.append(((1 + order * predicted) / 2)[strict].sum())
        pairs.append(strict.sum())
        ties += int((strict & (predicted == 0)).sum())
    sums_G, counts_G = np.array(right), np.array(pairs, dtype=np.float64)
    if counts_G.sum() == 0:
        raise ValueError(
            "no two responses of a prompt have different ranks: there is no pair to be right about"
        )
    kept = counts_G > 0
    return _with_interval(sums_G[kept], counts_G[kept], ties, level, resamples, seed)


def mean_interval(
    values: ArrayLike,
    clusters: ArrayLike,
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float | None, float | None]:
    """The mean of values [N], and the ends of its percentile bootstrap interval over the prompts `clusters` [N] names.

    Raises ValueError where the two are not vectors of one length, or are empty.
    """
    values_N, clusters_N = np.asarray(values, dtype=np.float64), np.asarray(clusters)
    if values_N.ndim != 1 or values_N.size == 0 or values_N.shape != clusters_N.shape:
        raise ValueError(
            f"expected two vectors of one length, got shapes {values_N.shape} and {clusters_N.shape}"
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
) -> tuple[float | None, float | None]:
    """The ends of the percentile bootstrap interval of sum / count over resampled prompts.

    None for fewer than `MIN_PROMPTS` prompts.
    """
    prompts = sums_G.size
    if prompts < MIN_PROMPTS:
        return None, None
    generator, shares_G = np.random.default_rng(seed), np.full(prompts, 1 / prompts)
    rates = []
    # Piece by piece, which draws the same: all at once would be resamples * prompts numbers.
    piece = max(1, _DRAWN // prompts)
    for start in range(0, resamples, piece):
        drawn = generator.multinomial(prompts, shares_G, size=min(piece, resamples - start))
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
    """sum / count with the percentile bootstrap interval of that ratio over resampled prompts."""
    low, high = _bootstrap(sums_G, counts_G, level, resamples, seed)
    rate = float(sums_G.sum() / counts_G.sum())
    return WinRate(rate, low, high, int(counts_G.sum()), ties, clusters=int(sums_G.size))
