"""Figures of human judgements, against values computed by hand."""

from __future__ import annotations

import json

import pytest

from fastrlhf.commands.eval_human import run
from fastrlhf.errors import UserError
from fastrlhf.evaluation.human import human_figures, krippendorff_alpha, squared, unequal


def test_alpha_of_the_published_binary_example():
    # Krippendorff (2011), two observers: 4 mismatches, 14 zeros, 6 ones: 1 - 19 * 4 / (14 * 6).
    first, second = [0, 1, 0, 0, 0, 0, 0, 0, 1, 0], [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]
    alpha = krippendorff_alpha(zip(first, second, strict=True), unequal)
    assert alpha == pytest.approx(1 - 19 * 4 / 84)


def test_alpha_with_the_interval_metric_and_missing_values():
    # Units (1, 2), (3, 3): observed 2 * 1; values 1, 2, 3, 3: the ordered pairs differ by
    # 2 * (1 + 4 + 4 + 1 + 1) = 22; 1 - 3 * 2 / 22.
    assert krippendorff_alpha([(1, 2), (3, 3), (9,)], squared) == pytest.approx(1 - 6 / 22)
    assert krippendorff_alpha([(1,), (2,)], squared) is None
    assert krippendorff_alpha([(1, 1)], squared) is None


def _row(item, labeler, ranks, ratings, flags):
    return {
        "prompt": item,
        "responses": ["a", "b"],
        "model": ["new", "old"],
        "ranks": ranks,
        "ratings": ratings,
        "flags": flags,
        "labeler_id": labeler,
        "item_id": item,
    }


ROWS = [
    _row("p", "x", [1, 2], [6, 2], [[], ["opinion"]]),
    _row("p", "y", [1, 1], [5, 3], [["opinion"], ["opinion"]]),
    _row("q", "x", [2, 1], [1, 4], [[], []]),
]


def test_figures_of_three_judgements():
    figures = human_figures(ROWS, "old")
    assert figures["win_rates"]["new"]["rate"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert figures["ratings"]["new"][0] == pytest.approx(4)
    assert figures["flags"]["old"]["opinion"][0] == pytest.approx(2 / 3)
    assert figures["agreement"]["pairs"][0] == 0.0


def test_command_writes_both_reports(tmp_path):
    path = tmp_path / "judgements.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    run([path], "old", tmp_path / "out")
    assert json.loads((tmp_path / "out/human.json").read_text())["labelers"] == 2
    assert "win rate against old" in (tmp_path / "out/human.html").read_text()
    with pytest.raises(UserError, match="baseline 'none'"):
        run([path], "none", tmp_path / "out")
