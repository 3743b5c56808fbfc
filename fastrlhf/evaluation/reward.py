"""Agreement of a reward model's scores with the labelers who ranked the responses.

The unit is a strictly ranked pair of responses to one prompt. The pairs of a prompt are not
independent, so intervals are bootstraps over prompts (winrate.py). The model is compared with the
rule "the longer response wins", which a useful model must beat, and with the labelers' agreement
with each other, which bounds what it can reach. Only numpy is needed.

Out of scope: scoring (algorithms/rm.py) and charts (reward_report.py).
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastrlhf.data.batches import TokenizedRanking
from fastrlhf.evaluation.winrate import (
    WinRate,
    WinRateDict,
    mean_interval,
    pair_agreement,
    win_rate,
)

BINS = 10


@dataclass(frozen=True)
class Pairs:
    """P strictly ranked pairs of responses, the labeler's better one first; all arrays are [P]."""

    prompt: NDArray[np.int64]
    """Number of the prompt. Rankings of one prompt by several labelers have the same number."""
    k: NDArray[np.int64]
    """Number of responses that were ranked together."""
    distance: NDArray[np.int64]
    """Difference of the two ranks in steps: 1 if the prompt has no rank between them."""
    margin: NDArray[np.float64]
    """Score of the better response - score of the worse."""
    length: NDArray[np.int64]
    """Tokens of the better response - tokens of the worse."""

    @property
    def wins(self) -> NDArray[np.float64]:
        """Agreement of the scores with the labeler: 1, 0.5 where the scores are equal, or 0."""
        return pair_agreement(self.margin)

    @property
    def longer_wins(self) -> NDArray[np.float64]:
        """Agreement of the rule "the response with more tokens is better" with the labeler."""
        return pair_agreement(self.length.astype(np.float64))


def ranked_pairs(rankings: Sequence[TokenizedRanking], scores: Sequence[ArrayLike]) -> Pairs:
    """Return all strictly ranked pairs of `rankings`.

    scores[g] are the K scores of ranking g, in its order. Raises ValueError if their number is not
    K, a score is not finite, or there is no pair.
    """
    prompts: dict[tuple[int, ...], int] = {}
    columns: list[tuple[int, int, int, float, int]] = []
    for number, (ranking, ranking_scores) in enumerate(zip(rankings, scores, strict=True)):
        prompt = prompts.setdefault(tuple(ranking.prompt_tokens), len(prompts))
        scores_K, K = np.asarray(ranking_scores, dtype=np.float64), len(ranking.responses)
        if scores_K.shape != (K,) or not np.isfinite(scores_K).all():
            raise ValueError(
                f"ranking {number} has {K} responses; "
                f"expected as many finite scores, got {scores_K}"
            )
        levels = np.unique(np.asarray(ranking.ranks, dtype=np.float64), return_inverse=True)[1]
        lengths = [len(response) for response in ranking.responses]
        for i, j in itertools.permutations(range(K), 2):
            if levels[i] < levels[j]:
                gap = int(levels[j] - levels[i])
                columns.append(
                    (prompt, K, gap, float(scores_K[i] - scores_K[j]), lengths[i] - lengths[j])
                )
    if not columns:
        raise ValueError("no pair to evaluate: no two responses of a prompt have different ranks")
    prompt_P, k_P, distance_P, margin_P, length_P = zip(*columns, strict=True)
    ints = [np.array(column, dtype=np.int64) for column in (prompt_P, k_P, distance_P, length_P)]
    return Pairs(ints[0], ints[1], ints[2], np.array(margin_P), ints[3])


def evaluate(pairs: Pairs) -> dict[str, Any]:
    """Return all statistics of a model on `pairs`, as JSON values."""
    accuracy, longer = win_rate(pairs.wins, pairs.prompt), win_rate(pairs.longer_wins, pairs.prompt)
    return {
        "prompts": accuracy.clusters,
        "pairs": accuracy.n,
        "accuracy": accuracy.as_dict(),
        "length_rule": longer.as_dict(),
        "above_length_rule": _difference(pairs.wins, pairs.longer_wins, pairs.prompt),
        "accuracy_by_k": _accuracy_by(pairs, pairs.k),
        "accuracy_by_distance": _accuracy_by(pairs, pairs.distance),
        "loss": float(np.logaddexp(0.0, -pairs.margin).mean()),
        "margin": float(pairs.margin.mean()),
        "calibration": calibration(pairs),
    }


class GroupAccuracy(WinRateDict):
    """Accuracy of the model on a group of pairs, and that of the length rule."""

    length_rule: float


def _accuracy_by(pairs: Pairs, groups: NDArray[np.int64]) -> dict[str, GroupAccuracy]:
    """Return the accuracy of the model and of the length rule in each group."""
    table = {}
    for value in np.unique(groups):
        which = groups == value
        accuracy = win_rate(pairs.wins[which], pairs.prompt[which])
        longer = win_rate(pairs.longer_wins[which], pairs.prompt[which])
        table[str(value)] = GroupAccuracy(**accuracy.as_dict(), length_rule=longer.rate)
    return table


def _difference(
    ours: NDArray[np.float64], theirs: NDArray[np.float64], clusters: ArrayLike
) -> dict[str, float | None]:
    """Return the mean of ours - theirs over pairs, with its interval over prompts."""
    difference, low, high = mean_interval(ours - theirs, clusters)
    return {"difference": difference, "low": low, "high": high}


def calibration(pairs: Pairs) -> dict[str, Any]:
    """Return the calibration of the model's predicted probabilities.

    sigmoid(s_i - s_j) is the predicted probability that the response with the higher score is the
    labeler's better one. It is compared with the observed frequency, in bins of equal width from
    0.5 to 1. `ece` is the expected calibration error: the mean over pairs of |observed - predicted|
    of their bin (Guo et al. 2017, eq. 3; arXiv 1706.04599).
    """
    predicted_P = 1 / (1 + np.exp(-np.abs(pairs.margin)))
    bin_P = np.minimum(((predicted_P - 0.5) * 2 * BINS).astype(np.int64), BINS - 1)
    bins, gap = [], 0.0
    for index in np.unique(bin_P):
        which = bin_P == index
        observed = win_rate(pairs.wins[which], pairs.prompt[which])
        predicted = float(predicted_P[which].mean())
        bins.append(
            {"predicted": predicted, "observed": observed.rate}
            | _interval(observed)
            | {"pairs": observed.n}
        )
        gap += observed.n * abs(observed.rate - predicted)
    return {"ece": gap / len(predicted_P), "bins": bins}


def _interval(rate: WinRate) -> dict[str, float | None]:
    return {"low": rate.low, "high": rate.high}


def labeler_agreement(rankings: Sequence[TokenizedRanking]) -> dict[str, Any] | None:
    """Return how often two labelers put the same pair of responses in the same order.

    Pairs that either of them tied are counted in `tied_pairs` only. Returns None if no two labelers
    ranked a pair in common.
    """
    rows: list[tuple[int, float, str, str]] = []
    tied = 0
    for cluster, group in enumerate(_by_prompt(rankings)):
        for one, other in itertools.combinations(group, 2):
            if one.labeler_id == other.labeler_id:
                continue
            first, second = _rank_of(one), _rank_of(other)
            common = [response for response in first if response in second]
            for a, b in itertools.combinations(common, 2):
                orders = np.sign(first[a] - first[b]) * np.sign(second[a] - second[b])
                if orders == 0:
                    tied += 1
                else:
                    rows.append(
                        (cluster, float(orders > 0), str(one.labeler_id), str(other.labeler_id))
                    )
    if not rows:
        return None
    clusters, agreed, firsts, seconds = (np.array(column) for column in zip(*rows, strict=True))
    table = {}
    for labeler in sorted({*firsts, *seconds}):
        which = (firsts == labeler) | (seconds == labeler)
        table[str(labeler)] = win_rate(agreed[which], clusters[which]).as_dict()
    return {**win_rate(agreed, clusters).as_dict(), "tied_pairs": tied, "by_labeler": table}


def _by_prompt(rankings: Sequence[TokenizedRanking]) -> Iterable[list[TokenizedRanking]]:
    """Return the rankings with a known labeler, grouped by prompt."""
    groups: dict[tuple[int, ...], list[TokenizedRanking]] = defaultdict(list)
    for ranking in rankings:
        if ranking.labeler_id is not None:
            groups[tuple(ranking.prompt_tokens)].append(ranking)
    return groups.values()


def _rank_of(ranking: TokenizedRanking) -> dict[tuple[int, ...], float]:
    """Return the rank of each response that occurs only once."""
    responses = [tuple(response) for response in ranking.responses]
    pairs = zip(responses, ranking.ranks, strict=True)
    return {response: float(rank) for response, rank in pairs if responses.count(response) == 1}


def split_groups(counts: Mapping[str, int], folds: int) -> list[list[str]]:
    """Split labelers into `folds` groups with about equal numbers of rankings.

    Each labeler, most rankings first, goes to the smallest group; ties are broken by name. The
    result is the same in every process.
    """
    groups: list[list[str]] = [[] for _ in range(folds)]
    sizes = [0] * folds
    for name in sorted(counts, key=lambda name: (-counts[name], name)):
        smallest = sizes.index(min(sizes))
        groups[smallest].append(name)
        sizes[smallest] += counts[name]
    return groups


def hold_out(
    rankings: Sequence[TokenizedRanking],
    group: Sequence[str],
    key: Callable[[TokenizedRanking], str | None],
) -> tuple[list[TokenizedRanking], list[TokenizedRanking]]:
    """Return (rankings to train on, rankings to evaluate on): `group` is held out.

    `key` returns a ranking's labeler. Rankings of held-out prompts by other labelers are in
    neither, since they would give the answer away.
    """
    members = set(group)
    held_out = [ranking for ranking in rankings if key(ranking) in members]
    prompts = {tuple(ranking.prompt_tokens) for ranking in held_out}
    others = (ranking for ranking in rankings if key(ranking) not in members)
    return [ranking for ranking in others if tuple(ranking.prompt_tokens) not in prompts], held_out


def summarize(rates: Sequence[float]) -> dict[str, float]:
    """Return the mean over folds, the standard deviation (n - 1) and the standard error."""
    values = np.asarray(rates, dtype=np.float64)
    std = float(values.std(ddof=1)) if len(values) > 1 else 0.0
    return {
        "mean": float(values.mean()),
        "std": std,
        "standard_error": std / float(np.sqrt(len(values))),
    }
