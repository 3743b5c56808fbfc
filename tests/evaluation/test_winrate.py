"""Win rates and pair accuracies: hand-computed values, interval coverage, rejected input."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from fastrlhf.evaluation import winrate
from fastrlhf.evaluation.winrate import mean_interval, pair_accuracy, win_rate


def test_win_rate_counts_a_tie_as_half() -> None:
    result = win_rate([1, 1, 0.5, 0])
    assert result.rate == pytest.approx(2.5 / 4)
    assert (result.n, result.ties, result.clusters) == (4, 1, 4)


def test_certain_wins_have_no_uncertainty() -> None:
    result = win_rate(np.ones(50))
    assert (result.rate, result.low, result.high) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(("prompts", "has_one"), [(1, False), (9, False), (10, True)])
def test_few_prompts_have_no_interval(prompts: int, has_one: bool) -> None:
    """However many judgements they have, the interval of one prompt would have the width 0."""
    clusters = np.repeat(np.arange(prompts), 30)
    wins = np.tile([1.0, 0.0, 1.0], 10 * prompts)
    results = [
        win_rate(wins, clusters),
        pair_accuracy(np.tile([2.0, 1.0], prompts), [1, 2] * prompts, range(0, 2 * prompts + 1, 2)),
    ]
    for result in results:
        assert result.clusters == prompts
        assert (result.low is not None, result.high is not None) == (has_one, has_one)
        assert ("95 % interval" in str(result)) == has_one
        assert json.loads(json.dumps(result.as_dict()))["low"] == result.low
    ends = mean_interval(wins, clusters)[1:]
    assert ends == (None, None) if not has_one else None not in ends
    expected = f"no interval: {prompts} prompt{'s' * (prompts > 1)}, fewer than 10"
    assert (expected in str(results[0])) != has_one


def test_interval_is_near_the_normal_approximation() -> None:
    wins = np.repeat([1.0, 0.0], [300, 200])
    result = win_rate(wins)
    half = 1.96 * np.sqrt(0.6 * 0.4 / 500)
    assert result.low == pytest.approx(0.6 - half, abs=0.005)
    assert result.high == pytest.approx(0.6 + half, abs=0.005)


def test_interval_has_about_its_nominal_coverage() -> None:
    rng = np.random.default_rng(3)
    results = [win_rate(rng.random(80) < 0.6, resamples=400, seed=i) for i in range(200)]
    covered = np.mean([result.low <= 0.6 <= result.high for result in results])
    assert 0.88 <= covered <= 0.99


def test_answers_of_one_prompt_do_not_narrow_the_interval() -> None:
    wins = np.repeat([1.0, 0.0], [12, 8])
    one_each = win_rate(wins)
    copies = win_rate(np.repeat(wins, 10), clusters=np.repeat(np.arange(20), 10))
    assert copies.clusters == 20
    assert copies.high - copies.low == pytest.approx(one_each.high - one_each.low, abs=1e-12)
    unclustered = win_rate(np.repeat(wins, 10))
    assert unclustered.high - unclustered.low < 0.5 * (copies.high - copies.low)


def test_clusters_may_be_strings_in_any_order() -> None:
    assert win_rate([1, 0, 1, 1], clusters=["b", "a", "b", "a"]).clusters == 2


def test_same_seed_same_interval() -> None:
    wins = np.repeat([1.0, 0.0], [30, 20])
    assert win_rate(wins, seed=5) == win_rate(wins, seed=5)
    assert win_rate(wins, level=0.8).low > win_rate(wins, level=0.99).low


@pytest.mark.parametrize("wins", [[], [[1.0]], [1.5], [-0.1], [float("nan")]])
def test_win_rate_rejects(wins: Any) -> None:
    with pytest.raises(ValueError, match="wins must"):
        win_rate(wins)


def test_win_rate_rejects_clusters_of_another_length() -> None:
    with pytest.raises(ValueError, match="clusters must have the shape"):
        win_rate([1, 0], clusters=[1])


def test_pair_accuracy_by_hand() -> None:
    # Prompt 1: ranks 1, 2, 3 have scores 3, 1, 2, so (1,2) and (1,3) are right, (2,3) is wrong.
    # Prompt 2: a tie, no pair. Prompt 3: equal scores of a strict pair count one half.
    result = pair_accuracy([3, 1, 2, 5, 6, 7, 7], [1, 2, 3, 1, 1, 2, 1], [0, 3, 5, 7])
    assert result.rate == pytest.approx(2.5 / 4)
    assert (result.n, result.ties, result.clusters) == (4, 1, 2)


def test_pair_accuracy_of_the_order_itself_and_of_its_reverse() -> None:
    ranks = np.array([2, 1, 3, 4, 1, 2])
    offsets = [0, 4, 6]
    assert pair_accuracy(-ranks, ranks, offsets).rate == 1.0
    assert pair_accuracy(ranks, ranks, offsets).rate == 0.0


def test_half_ranks_are_not_ties() -> None:
    assert pair_accuracy([2.0, 1.0, 0.0], [1, 1.5, 2], [0, 3]).n == 3


def test_the_chunk_size_of_the_bootstrap_does_not_change_the_interval(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wins = np.random.default_rng(0).random(300)
    expected = win_rate(wins)
    monkeypatch.setattr(winrate, "_MAX_COUNTS", 1000)
    assert win_rate(wins) == expected


def test_unsigned_ranks_do_not_wrap_around() -> None:
    ranks = np.array([2, 1, 3], dtype=np.uint8)
    assert pair_accuracy([2.0, 3.0, 1.0], ranks, [0, 3]).rate == 1.0


@pytest.mark.parametrize(
    ("scores", "ranks", "offsets", "message"),
    [
        ([1, 2], [1], [0, 2], "one length"),
        ([1, 2], [1, 2], [0, 1], "offsets must go"),
        ([1, float("nan")], [1, 2], [0, 2], "NaN"),
        ([1, 2], [1, float("nan")], [0, 2], "NaN"),
        ([1, 2], [1, 1], [0, 2], "no two responses"),
    ],
)
def test_pair_accuracy_rejects(scores: Any, ranks: Any, offsets: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pair_accuracy(scores, ranks, offsets)
