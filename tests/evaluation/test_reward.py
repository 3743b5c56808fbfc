"""Evaluation of reward models on hand-made rankings, and of models with a known accuracy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from fastrlhf.data.batches import TokenizedRanking
from fastrlhf.evaluation import reward
from fastrlhf.evaluation.reward import Pairs, ranked_pairs
from fastrlhf.evaluation.reward_report import write_folds_report, write_reward_report


def ranking(
    prompt: int, lengths: list[int], ranks: list[float], labeler: str | None = None
) -> TokenizedRanking:
    """Return a ranking whose responses differ in their first token."""
    return TokenizedRanking(
        [prompt], [[i] * n for i, n in enumerate(lengths)], ranks, labeler_id=labeler
    )


def test_pairs_by_hand() -> None:
    groups = [
        ranking(1, [5, 2, 2], [1, 3, 1.5]),
        ranking(2, [1, 4], [2, 1]),
        ranking(1, [3, 3], [1, 1]),
    ]
    pairs = ranked_pairs(groups, [[0.5, 1.0, 0.0], [0.0, 0.0], [1.0, 2.0]])
    # (better, worse) of the first: 0 > 1, 0 > 2, 2 > 1; the last is tied.
    assert pairs.prompt.tolist() == [0, 0, 0, 1]
    assert pairs.k.tolist() == [3, 3, 3, 2]
    assert pairs.distance.tolist() == [2, 1, 1, 1]
    assert pairs.margin.tolist() == [-0.5, 0.5, -1.0, 0.0]
    assert pairs.length.tolist() == [3, 3, 0, 3]
    assert pairs.wins.tolist() == [0, 1, 0, 0.5]
    assert pairs.longer_wins.tolist() == [1, 1, 0.5, 1]
    results = reward.evaluate(pairs)
    assert (results["prompts"], results["pairs"]) == (2, 4)
    assert results["accuracy"]["rate"] == 1.5 / 4
    assert results["length_rule"]["rate"] == 3.5 / 4
    assert results["above_length_rule"]["difference"] == pytest.approx(-2 / 4)
    assert {
        k: (row["rate"], row["length_rule"]) for k, row in results["accuracy_by_k"].items()
    } == {
        "2": (0.5, 1.0),
        "3": (pytest.approx(1 / 3), pytest.approx(2.5 / 3)),
    }
    assert {d: row["rate"] for d, row in results["accuracy_by_distance"].items()} == {
        "1": 0.5,
        "2": 0.0,
    }
    expected = [
        math.log1p(math.exp(0.5)),
        math.log1p(math.exp(-0.5)),
        math.log1p(math.e),
        math.log(2),
    ]
    assert results["loss"] == pytest.approx(sum(expected) / 4)


def test_invalid_scores_and_rankings_are_rejected() -> None:
    with pytest.raises(
        ValueError, match="ranking 1 has 2 responses; expected as many finite scores"
    ):
        ranked_pairs([ranking(1, [1, 1], [1, 2]), ranking(1, [1, 1], [1, 2])], [[0.0, 1.0], [0.0]])
    with pytest.raises(ValueError, match="finite scores"):
        ranked_pairs([ranking(1, [1, 1], [1, 2])], [[0.0, math.nan]])
    with pytest.raises(ValueError, match="no pair to evaluate"):
        ranked_pairs([ranking(1, [1, 1], [1, 1])], [[0.0, 1.0]])


def drawn_pairs(slope: float, prompts: int = 400, seed: int = 0) -> Pairs:
    """Draw pairs where i beats j with probability sigmoid(m), scored by a model with slope * m."""
    rng = np.random.default_rng(seed)
    m = rng.normal(0, 2, (prompts, 6))
    won = rng.random(m.shape) < 1 / (1 + np.exp(-m))
    margin = np.where(won, m, -m).ravel() * slope
    ones = np.ones(margin.size, dtype=np.int64)
    return Pairs(np.repeat(np.arange(prompts), 6), 4 * ones, ones, margin, ones)


def test_a_calibrated_model_has_no_calibration_error_and_a_bold_one_does() -> None:
    right, bold = (reward.calibration(drawn_pairs(slope)) for slope in (1.0, 3.0))
    assert right["ece"] < 0.03  # 2400 pairs in 10 bins: the standard error of a bin is 0.03
    assert bold["ece"] > 0.08
    for row in right["bins"]:
        assert row["low"] - 0.03 < row["predicted"] < row["high"] + 0.03
    last = bold["bins"][-1]
    assert last["predicted"] > 0.95 and last["high"] < last["predicted"]
    assert sum(row["pairs"] for row in bold["bins"]) == 2400


def test_copies_of_the_pairs_of_a_prompt_do_not_narrow_the_interval() -> None:
    pairs = drawn_pairs(1.0, prompts=100)
    repeated = Pairs(*(np.repeat(column, 5) for column in vars(pairs).values()))
    one, many = reward.evaluate(pairs)["accuracy"], reward.evaluate(repeated)["accuracy"]
    assert many["n"] == 5 * one["n"] and many["clusters"] == one["clusters"]
    assert many["high"] - many["low"] == pytest.approx(one["high"] - one["low"], rel=0.15)


def test_labeler_agreement_by_hand() -> None:
    groups = [
        ranking(1, [1, 1, 1], [1, 2, 3], "ann"),
        ranking(1, [1, 1, 1], [2, 1, 3], "bob"),  # against ann: 0-1 differs, 0-2 and 1-2 agree
        ranking(1, [1, 1, 1], [1, 1, 2], None),  # unknown labelers are not compared
        ranking(2, [1, 1], [1, 2], "ann"),
        ranking(2, [1, 1], [1, 1], "cid"),  # a tie does not count
        ranking(3, [1, 1], [1, 2], "ann"),  # nobody else
        ranking(2, [1, 1], [1, 2], "ann"),  # ann again: not compared with herself
    ]
    agreement = reward.labeler_agreement(groups)
    assert agreement is not None
    assert agreement["rate"] == pytest.approx(2 / 3)
    assert (agreement["n"], agreement["tied_pairs"]) == (3, 2)
    assert {name: row["n"] for name, row in agreement["by_labeler"].items()} == {"ann": 3, "bob": 3}
    assert reward.labeler_agreement(groups[2:4]) is None


def test_responses_are_matched_by_their_text() -> None:
    one = TokenizedRanking([1], [[7], [8], [9]], [1, 2, 3], labeler_id="ann")
    other = TokenizedRanking([1], [[9], [5], [7], [5]], [4, 1, 2, 3], labeler_id="bob")
    agreement = reward.labeler_agreement([one, other])
    assert agreement is not None and (agreement["rate"], agreement["n"]) == (1.0, 1)


def test_groups_are_balanced_and_have_every_labeler_once() -> None:
    counts = {"a": 10, "b": 9, "c": 4, "d": 4, "e": 3, "f": 1}
    groups = reward.split_groups(counts, 3)
    assert sorted(name for group in groups for name in group) == sorted(counts)
    assert [sum(counts[name] for name in group) for group in groups] == [10, 10, 11]
    assert groups == reward.split_groups(dict(reversed(counts.items())), 3)


def test_a_held_out_prompt_is_not_trained_on() -> None:
    groups = [
        ranking(p, [1, 1], [1, 2], name) for p, name in ((1, "a"), (1, "b"), (2, "b"), (3, "c"))
    ]
    kept, held_out = reward.hold_out(groups, ["a"], lambda r: r.labeler_id)
    assert held_out == groups[:1] and kept == groups[2:]


def test_variation_over_folds() -> None:
    summary = reward.summarize([0.6, 0.7, 0.8])
    assert summary["mean"] == pytest.approx(0.7)
    assert summary["std"] == pytest.approx(0.1)
    assert summary["standard_error"] == pytest.approx(0.1 / math.sqrt(3))


def test_pages_show_the_numbers(tmp_path: Any) -> None:
    results = reward.evaluate(drawn_pairs(1.0, prompts=50)) | {
        "model": "runs/<rm>",
        "files": "held_out.jsonl",
    }
    results["agreement"] = reward.labeler_agreement(
        [ranking(1, [1, 1], [1, 2], "ann & co"), ranking(1, [1, 1], [1, 2], "bob")]
    )
    results["statistics"] = {"demonstration_std": 1.25}
    page = write_reward_report(results, tmp_path / "a.html").read_text()
    rate, ece = results["accuracy"]["rate"], results["calibration"]["ece"]
    for text in (
        f"{rate:.3f}",
        f"{ece:.3f}",
        "runs/&lt;rm&gt;",
        "ann &amp; co",
        "demonstration_std",
        "predicted probability",
    ):
        assert text in page
    fold = {"fold": 1, "labelers": ["ann"], "trained_on": 9, "held_out": results, "seen": None}
    summary = {
        "by": "labeler_id",
        "folds": [fold, {**fold, "fold": 2}],
        "seen": reward.summarize([0.5, 0.75]),
    }
    summary |= {
        "held_out": reward.summarize([0.6, 0.8]),
        "length_rule": reward.summarize([0.5, 0.5]),
    }
    page = write_folds_report(summary, tmp_path / "b.html").read_text()
    for text in ("2-fold", "0.700 ± 0.100", "0.625 ± 0.125", "fold 2"):
        assert text in page
