"""Win rates and pair accuracies: hand-computed values, interval coverage, and what is rejected."""

from __future__ import annotations

import numpy as np
import pytest

from fastrlhf.evaluation import winrate
from fastrlhf.evaluation.winrate import (
    NO_INTERVAL,
    between,
    describe_interval,
    mean_interval,
    pair_accuracy,
    win_rate,
)


def test_win_rate_counts_a_tie_as_half():
    result = win_rate([1, 1, 0.5, 0])
    assert result.rate == pytest.approx(2.5 / 4)
    assert (result.n, result.ties, result.clusters) == (4, 1, 4)


def test_certain_wins_have_no_uncertainty():
    result = win_rate(np.ones(50))
    assert (result.rate, result.low, result.high) == (1.0, 1.0, 1.0)


def test_interval_is_near_the_normal_approximation():
    wins = np.repeat([1.0, 0.0], [300, 200])
    result = win_rate(wins)
    half = 1.96 * np.sqrt(0.6 * 0.4 / 500)
    assert result.low == pytest.approx(0.6 - half, abs=0.005)
    assert result.high == pytest.approx(0.6 + half, abs=0.005)


def test_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(3)
    results = [win_rate(rng.random(80) < 0.6, resamples=400, seed=i) for i in range(200)]
    covered = np.mean([result.low <= 0.6 <= result.high for result in results])
    assert 0.88 <= covered <= 0.99


def test_answers_of_one_prompt_do_not_narrow_the_interval():
    wins = np.repeat([1.0, 0.0], [12, 8])
    one_each = win_rate(wins)
    copies = win_rate(np.repeat(wins, 10), clusters=np.repeat(np.arange(20), 10))
    assert copies.clusters == 20
    assert copies.high - copies.low == pytest.approx(one_each.high - one_each.low, abs=1e-12)
    unclustered = win_rate(np.repeat(wins, 10))
    assert unclustered.high - unclustered.low < 0.5 * (copies.high - copies.low)


def test_clusters_may_be_strings_in_any_order():
    assert win_rate([1, 0, 1, 1], clusters=["b", "a", "b", "a"]).clusters == 2


def test_same_seed_same_interval():
    wins = np.repeat([1.0, 0.0], [30, 20])
    assert win_rate(wins, seed=5) == win_rate(wins, seed=5)
    assert win_rate(wins, level=0.8).low > win_rate(wins, level=0.99).low


@pytest.mark.parametrize("wins", [[], [[1.0]], [1.5], [-0.1], [float("nan")]])
def test_win_rate_rejects(wins):
    with pytest.raises(ValueError, match="wins must"):
        win_rate(wins)


def test_win_rate_rejects_clusters_of_another_length():
    with pytest.raises(ValueError, match="clusters must have the shape"):
        win_rate([1, 0], clusters=[1])


def test_pair_accuracy_by_hand():
    # prompt 1: ranks 1, 2, 3 scored 3, 1, 2: pairs (1,2) and (1,3) right, (2,3) wrong. prompt 2: a tie, no pair.
    # prompt 3: equal scores of a strict pair count one half.
    result = pair_accuracy([3, 1, 2, 5, 6, 7, 7], [1, 2, 3, 1, 1, 2, 1], [0, 3, 5, 7])
    assert result.rate == pytest.approx(2.5 / 4)
    assert (result.n, result.ties, result.clusters) == (4, 1, 2)


def test_pair_accuracy_of_the_order_itself_and_of_its_reverse():
    ranks = np.array([2, 1, 3, 4, 1, 2])
    offsets = [0, 4, 6]
    assert pair_accuracy(-ranks, ranks, offsets).rate == 1.0
    assert pair_accuracy(ranks, ranks, offsets).rate == 0.0


def test_ranks_of_halves_are_no_ties():
    assert pair_accuracy([2.0, 1.0, 0.0], [1, 1.5, 2], [0, 3]).n == 3


def test_pieces_of_the_bootstrap_change_no_interval(monkeypatch):
    wins = np.random.default_rng(0).random(300)
    whole = win_rate(wins)
    monkeypatch.setattr(winrate, "_DRAWN", 1000)
    assert win_rate(wins) == whole


def test_unsigned_ranks_do_not_wrap_around():
    ranks = np.array([2, 1, 3], dtype=np.uint8)
    assert pair_accuracy([2.0, 3.0, 1.0], ranks, [0, 3]).rate == 1.0


@pytest.mark.parametrize(
    ("scores", "ranks", "offsets", "message"),
    [
        ([1, 2], [1], [0, 2], "one length"),
        ([1, 2], [1, 2], [0, 1], "offsets must run"),
        ([1, float("nan")], [1, 2], [0, 2], "NaN"),
        ([1, 2], [1, float("nan")], [0, 2], "NaN"),
        ([1, 2], [1, 1], [0, 2], "no two responses"),
    ],
)
def test_pair_accuracy_rejects(scores, ranks, offsets, message):
    with pytest.raises(ValueError, match=message):
        pair_accuracy(scores, ranks, offsets)


@pytest.mark.parametrize("prompts", [1, 2, 9])
def test_few_prompts_have_no_interval(prompts):
    """Of one prompt every resample is the same: [1.000, 1.000] would claim certainty."""
    rate = win_rate(np.ones(30), clusters=np.arange(30) % prompts)
    assert (rate.rate, rate.low, rate.high, rate.clusters) == (1.0, None, None, prompts)
    assert str(rate) == "1.000 [no interval: fewer than 10 prompts] (n=30, ties=0)"
    mean = mean_interval(np.arange(30.0), np.arange(30) % prompts)
    assert mean == (14.5, None, None)
    assert between(None, None) == describe_interval(None, None) == NO_INTERVAL


def test_ten_prompts_have_an_interval():
    rate = win_rate([1, 0] * 5)
    assert 0 < rate.low < 0.5 < rate.high < 1
    assert describe_interval(0.25, 0.75, "{:.1%}") == "95 % interval 25.0% to 75.0%"
