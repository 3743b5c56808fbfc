"""How well a reward model's scores agree with the labelers who ranked the responses, with intervals.

What is counted are the strictly ranked pairs of a prompt. They are not independent, so intervals are bootstraps over
prompts (winrate.py). Beside the model stands the rule "the longer response wins", which a useful model must beat, and
the labelers' agreement with each other, which bounds what it can reach. numpy alone; left out on purpose: scoring
(algorithms/rm.py) and drawing (reward_report.py).
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
from fastrlhf.evaluation.winrate import WinRate, win_rate

BINS = 10


@dataclass(frozen=True)
class Pairs:
    """The P strictly ranked pairs of some rankings, the labeler's better response first; arrays [P]."""

    prompt: NDArray[np.int64]
    """Which prompt, by its tokens: rankings of one prompt by several labelers are one cluster."""
    k: NDArray[np.int64]
    """Responses that were ranked together."""
    distance: NDArray[np.int64]
    """Steps between the two ranks: 1 when no other rank of the prompt lies between them."""
    margin: NDArray[np.float64]
    """Score of the better response - score of the worse."""
    length: NDArray[np.int64]
    """Tokens of the better response - tokens of the worse."""

    @property
    def wins(self) -> NDArray[np.float64]:
        """1 where the scores agree with the labeler, 0.5 where they are equal, else 0."""
        return (1 + np.sign(self.margin)) / 2

    @property
    def longer_wins(self) -> NDArray[np.float64]:
        """The same of the rule that the response of more tokens is better."""
        return (1 + np.sign(self.length)) / 2


def ranked_pairs(rankings: Sequence[TokenizedRanking], scores: Sequence[ArrayLike]) -> Pairs:
    """All strictly ranked pairs of `rankings`; scores[g] are the K scores of ranking g, in its order.

    Raises ValueError for a number of scores that is not K, for scores that are not finite, and without any pair.
    """
    prompts: dict[tuple[int, ...], int] = {}
    columns: list[tuple[int, int, int, float, int]] = []
    for number, (ranking, own) in enumerate(zip(rankings, scores, strict=True)):
        prompt = prompts.setdefault(tuple(ranking.prompt_tokens), len(prompts))
        scores_K, K = np.asarray(own, dtype=np.float64), len(ranking.responses)
        if scores_K.shape != (K,) or not np.isfinite(scores_K).all():
            raise ValueError(
                f"ranking {number} has {K} responses; expected as many finite scores, got {scores_K}"
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
        raise ValueError(
            "no two responses of a prompt have different ranks: there is no pair to be right about"
        )
    prompt_P, k_P, distance_P, margin_P, length_P = zip(*columns, strict=True)
    ints = [np.array(column, dtype=np.int64) for column in (prompt_P, k_P, distance_P, length_P)]
    return Pairs(ints[0], ints[1], ints[2], np.array(margin_P), ints[3])


def evaluate(pairs: Pairs) -> dict[str, Any]:
    """Everything that is said of a model on `pairs`, ready for JSON."""
    accuracy, longer = win_rate(pairs.wins, pairs.prompt), win_rate(pairs.longer_wins, pairs.prompt)
    return {
        "prompts": accuracy.clusters,
        "pairs": accuracy.n,
        "accuracy": accuracy.as_dict(),
        "length_rule": longer.as_dict(),
        "above_length_rule": _difference(pairs.wins, pairs.longer_wins, pairs.prompt),
        "accuracy_by_k": _by(pairs, pairs.k),
        "accuracy_by_distance": _by(pairs, pairs.distance),
        "loss": float(np.logaddexp(0.0, -pairs.margin).mean()),
        "margin": float(pairs.margin.mean()),
        "calibration": calibration(pairs),
    }


def _by(pairs: Pairs, groups: NDArray[np.int64]) -> dict[str, dict[str, Any]]:
    """Accuracy in each group, and beside it the length rule's."""
    table = {}
    for value in np.unique(groups):
        which = groups == value
        accuracy = win_rate(pairs.wins[which], pairs.prompt[which])
        longer = win_rate(pairs.longer_wins[which], pairs.prompt[which])
        table[str(value)] = accuracy.as_dict() | {"length_rule": longer.rate}
    return table


def _difference(
    ours: NDArray[np.float64], theirs: NDArray[np.float64], clusters: ArrayLike
) -> dict[str, float | None]:
    """Mean of ours - theirs, pair by pair, with its interval over prompts."""
    shifted = win_rate(
        (1 + ours - theirs) / 2, clusters
    )  # a difference in [-1, 1] as a rate in [0, 1]
    return {
        "difference": 2 * shifted.rate - 1,
        "low": None if shifted.low is None else 2 * shifted.low - 1,
        "high": None if shifted.high is None else 2 * shifted.high - 1,
    }


def calibration(pairs: Pairs) -> dict[str, Any]:
    """Predicted probability sigmoid(s_i - s_j) that the response with the higher score is the labeler's better one,
    against how often it was, in bins of equal width from 0.5 to 1.

    ece is the expected calibration error: the mean over pairs of |observed - predicted| of their bin (Guo et al. 2017,
    eq. 3; arXiv 1706.04599).
    """
    predicted_P = 1 / (1 + np.exp(-np.abs(pairs.margin)))
    bin_P = np.minimum(((predicted_P - 0.5) * 2 * BINS).astype(np.int64), BINS - 1)
    bins: list[dict[str, Any]] = []
    for index in np.unique(bin_P):
        which = bin_P == index
        observed = win_rate(pairs.wins[which], pairs.prompt[which])
        predicted = float(predicted_P[which].mean())
        bins.append(
            {"predicted": predicted, "observed": observed.rate}
            | _interval(observed)
            | {"pairs": observed.n}
        )
    ece = sum(row["pairs"] * abs(row["observed"] - row["predicted"]) for row in bins) / len(
        predicted_P
    )
    return {"ece": ece, "bins": bins}


def _interval(rate: WinRate) -> dict[str, float | None]:
    return {"low": rate.low, "high": rate.high}


def labeler_agreement(rankings: Sequence[TokenizedRanking]) -> dict[str, Any] | None:
    """How often two labelers who ranked the same responses to the same prompt put a pair in the same order.

    Pairs that either of them tied are left out and counted. None where no two labelers ranked a pair in common.
    """
    rows: list[tuple[int, float, str, str]] = []
    tied = 0
    for cluster, group in enumerate(_by_prompt(rankings)):
        for one, other in itertools.combinations(group, 2):
            if one.labeler_id == other.labeler_id:
                continue
            first, second = _rank_of(one), _rank_of(other)
            for a, b in itertools.combinations(
                [response for response in first if response in second], 2
            ):
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
    return win_rate(agreed, clusters).as_dict() | {"tied_pairs": tied, "by_labeler": table}


def _by_prompt(rankings: Sequence[TokenizedRanking]) -> Iterable[list[TokenizedRanking]]:
    """The rankings whose labeler is known, those of one prompt together."""
    groups: dict[tuple[int, ...], list[TokenizedRanking]] = defaultdict(list)
    for ranking in rankings:
        if ranking.labeler_id is not None:
            groups[tuple(ranking.prompt_tokens)].append(ranking)
    return groups.values()


def _rank_of(ranking: TokenizedRanking) -> dict[tuple[int, ...], float]:
    """The rank of each response; responses that stand there twice are left out."""
    responses = [tuple(response) for response in ranking.responses]
    pairs = zip(responses, ranking.ranks, strict=True)
    return {response: float(rank) for response, rank in pairs if responses.count(response) == 1}


def split_groups(counts: Mapping[str, int], folds: int) -> list[list[str]]:
    """Labelers in `folds` groups of about equal numbers of rankings: each, most rankings first, to the smallest group.

    The same for every process; ties are broken by name.
    """
    groups: list[list[str]] = [[] for _ in range(folds)]
    sizes = [0] * folds
    for name in sorted(counts, key=lambda name: (-counts[name], name)):
        smallest = sizes.index(min(sizes))
        groups[smallest].append(name)
        sizes[smallest] += counts[name]
    return groups


def leave_out(
    rankings: Sequence[TokenizedRanking],
    group: Sequence[str],
    key: Callable[[TokenizedRanking], str | None],
) -> tuple[list[TokenizedRanking], list[TokenizedRanking]]:
    """(rankings to train on, rankings to evaluate on): those of the labelers in `group` are held out.

    A prompt that is held out is not trained on either when others ranked it too: their ranking would tell the answer.
    """
    members = set(group)
    held_out = [ranking for ranking in rankings if key(ranking) in members]
    prompts = {tuple(ranking.prompt_tokens) for ranking in held_out}
    others = (ranking for ranking in rankings if key(ranking) not in members)
    return [ranking for ranking in others if tuple(ranking.prompt_tokens) not in prompts], held_out


def summarize(rates: Sequence[float]) -> dict[str, float]:
    """Mean over folds, standard deviation between them (n - 1), and standard error of the mean."""
    values = np.asarray(rates, dtype=np.float64)
    std = float(values.std(ddof=1)) if len(values) > 1 else 0.0
    return {
        "mean": float(values.mean()),
        "std": std,
        "standard_error": std / float(np.sqrt(len(values))),
    }
