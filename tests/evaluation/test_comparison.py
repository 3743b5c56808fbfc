"""Hand-computed results of a comparison, and the pages that show them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastrlhf.evaluation.comparison import (
    JudgedResponses,
    compare,
    judge_pairs,
    pair_records,
    write_comparison,
    write_selection,
)
from fastrlhf.evaluation.winrate import mean_interval, win_rate


def judged(name: str, scores: list[list[float]], tokens: list[list[int]]) -> JudgedResponses:
    shape = np.shape(scores)
    return JudgedResponses(
        name=name,
        responses=[[f"{name} {g}.{r}" for r in range(shape[1])] for g in range(shape[0])],
        tokens=np.array(tokens),
        stopped=np.array(tokens) < 9,
        scores=np.array(scores),
    )


@pytest.fixture
def sides() -> tuple[JudgedResponses, JudgedResponses]:
    policy = judged("ours", [[1.0], [0.5], [2.0], [0.0]], [[3], [5], [9], [4]])
    baseline = judged("theirs", [[0.0], [0.5], [1.9], [3.0]], [[3], [4], [4], [6]])
    return policy, baseline


def test_hand_computed_results(sides: tuple[JudgedResponses, JudgedResponses]) -> None:
    results = compare(*sides)
    assert (results["won"], results["tied"], results["lost"]) == (2, 1, 1)
    assert results["win_rate"]["rate"] == 2.5 / 4
    assert results["win_rate"] == win_rate([1, 0.5, 1, 0]).as_dict()
    rates = {name: (group["rate"], group["n"]) for name, group in results["by_length"].items()}
    assert rates == {"longer": (0.75, 2), "as long": (1.0, 1), "shorter": (0.0, 1)}
    assert results["policy"]["score"] == 0.875 and results["policy"]["tokens"] == 5.25
    assert results["policy"]["cut_off"] == 0.25 and results["baseline"]["cut_off"] == 0.0


def test_margin_makes_ties(sides: tuple[JudgedResponses, JudgedResponses]) -> None:
    assert judge_pairs(sides[0].scores, sides[1].scores, 0.2).ravel().tolist() == [
        1.0,
        0.5,
        0.5,
        0.0,
    ]
    assert compare(*sides, 0.2)["tied"] == 2


def test_a_policy_ties_with_itself(sides: tuple[JudgedResponses, JudgedResponses]) -> None:
    rate = compare(sides[0], sides[0])["win_rate"]
    assert (rate["rate"], rate["ties"]) == (0.5, 4)


def test_interval_is_over_prompts_not_responses() -> None:
    """Ten copies of each judgement do not narrow the interval."""
    draw = np.random.default_rng(0)
    values = draw.normal(size=60)
    mean, low, high = mean_interval(values, np.arange(60))
    copied = mean_interval(np.repeat(values, 10), np.repeat(np.arange(60), 10))
    assert copied == pytest.approx((mean, low, high), abs=1e-9)
    # Against the normal approximation.
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / 60**0.5, rel=0.1)
    assert mean == pytest.approx(values.mean())


@pytest.mark.parametrize(("values", "clusters"), [([], []), ([1.0], [1, 2]), ([[1.0]], [[1]])])
def test_mean_interval_rejects(values: list[Any], clusters: list[Any]) -> None:
    with pytest.raises(ValueError, match="two vectors of one length"):
        mean_interval(values, clusters)


def test_page_of_a_comparison(
    sides: tuple[JudgedResponses, JudgedResponses], tmp_path: Path
) -> None:
    prompts = ["<b>first</b>", [{"role": "user", "content": "second"}], "third", "fourth"]
    pairs = pair_records(prompts, *sides)
    assert pairs[1] == {
        "prompt": prompts[1],
        "policy": "ours 1.0",
        "baseline": "theirs 1.0",
        "policy_score": 0.5,
        "baseline_score": 0.5,
    }
    results = {"judge": "runs/rm", "prompts": "eval.jsonl", **compare(*sides)}
    html = write_comparison(tmp_path / "winrate.html", results, pairs).read_text()
    for text in (
        "62.5%",
        "no interval: 4 prompts, fewer than 10",
        "2, 1, 1",
        "runs/rm",
        "&lt;b&gt;first&lt;/b&gt;",
        "user: second",
        "ours 3.0",
        "longer (2)",
    ):
        assert text in html
    assert html.count("<svg") == 2


def test_page_of_a_selection(tmp_path: Path) -> None:
    rows = [
        {
            "step": step,
            "score": score,
            "score_ci95": [score - 0.1, score + 0.1],
            "prompts": 12,
            "tokens": 9.0,
            "cut_off": 0.0,
        }
        for step, score in ((10, 0.1), (20, 0.7), (30, 0.4))
    ]
    results = {
        "run": "runs/sft",
        "judge": "runs/rm",
        "prompts": "valid.jsonl",
        "best": 20,
        "checkpoints": rows,
    }
    html = write_selection(tmp_path / "select.html", results).read_text()
    assert "step 20" in html and "0.600 to 0.800" in html
    few = [row | {"score_ci95": None, "prompts": 1} for row in rows]
    html = write_selection(tmp_path / "few.html", results | {"checkpoints": few}).read_text()
    assert "no interval: 1 prompt, fewer than 10" in html and "0.700" in html
    assert "Validation loss" not in html  # none was recorded
    rows[0]["valid_loss"] = 3.5
    assert "Validation loss" in write_selection(tmp_path / "select.html", results).read_text()
