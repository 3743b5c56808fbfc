"""The pages that `fastrlhf eval rm` leaves: a reward model on held-out rankings, and its cross-validation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastrlhf.evaluation.charts import Bar, Series, bar_chart, line_chart
from fastrlhf.evaluation.report import Figure, Report, framed
from fastrlhf.evaluation.winrate import MIN_PROMPTS, describe_interval

Rate = Mapping[str, Any]
"""A WinRate as a dictionary: rate, low, high, n, clusters."""

_GUESS = (0.5, "guessing")


def write_reward_report(results: Mapping[str, Any], path: Path) -> Path:
    """The page of `reward.evaluate`'s results (with "model", "agreement" and "statistics" beside them)."""
    report = Report(
        "Reward model on held-out rankings", f"{results['model']}, on {results['files']}."
    )
    report.figures(_headline(results))
    report.section(
        "Where it is right",
        "Share of the strictly ranked pairs in which the response the labeler preferred has the higher score. The "
        "intervals are 95 %, from resampling prompts: the pairs of a prompt are not independent. Fewer than "
        f"{MIN_PROMPTS} prompts have none.",
    )
    report.charts(
        [
            framed(
                "By responses ranked together",
                _bars(results["accuracy_by_k"], "K = {}"),
                "Pairs of prompts of each K.",
            ),
            framed(
                "By distance of the ranks",
                _bars(results["accuracy_by_distance"], "{} apart"),
                "Neighbours are hard to tell apart, the best from the worst is easy.",
            ),
            framed(
                "Calibration",
                _reliability(results["calibration"]["bins"]),
                "How often the response it prefers was the labeler's, over the probability it predicts. Below the "
                "diagonal it is too sure of itself.",
                {"observed": 0, "as predicted": 5},
            ),
        ]
    )
    for name, key in (("K", "accuracy_by_k"), ("Rank distance", "accuracy_by_distance")):
        report.table(
            (name, "accuracy", "low", "high", "longer wins", "pairs", "prompts"),
            _rows(results[key]),
        )
    if results.get("agreement") is not None:
        _agreement(report, results["agreement"])
    if results.get("statistics"):
        report.section(
            "Scores of demonstrations", "Written into the checkpoint when the head's bias was set."
        )
        report.table(
            ("statistic", "value"),
            [(name, float(value)) for name, value in results["statistics"].items()],
        )
    return report.write(path)


def write_folds_report(results: Mapping[str, Any], path: Path) -> Path:
    """The page of a cross-validation over groups of labelers."""
    held_out = results["held_out"]
    report = Report(
        f"Reward model, {len(results['folds'])}-fold cross-validation by {results['by']}",
        "Each model is trained on the rankings of all groups but one and judged by those of the group left out.",
    )
    figures = [
        Figure(
            "Accuracy, groups left out",
            _plus_minus(held_out),
            "mean over folds ± standard error of the mean",
        ),
        Figure("Spread between folds", f"{held_out['std']:.3f}", "standard deviation"),
        Figure(
            "Longer wins",
            f"{results['length_rule']['mean']:.3f}",
            "the rule's accuracy, mean over folds",
        ),
    ]
    if results["seen"] is not None:
        detail = "validation prompts ranked by labelers it was trained on"
        figures.insert(
            1, Figure("Accuracy, groups trained on", _plus_minus(results["seen"]), detail)
        )
    report.figures(figures)
    bars = [_bar(f"fold {fold['fold']}", fold["held_out"]["accuracy"]) for fold in results["folds"]]
    report.charts(
        [
            framed(
                "Accuracy on the group left out",
                bar_chart(bars, reference=_GUESS),
                "95 % intervals.",
            )
        ]
    )
    rows = [
        (
            fold["fold"],
            fold["held_out"]["accuracy"]["rate"],
            fold["held_out"]["length_rule"]["rate"],
            fold["held_out"]["pairs"],
            fold["held_out"]["prompts"],
            fold["trained_on"],
            ", ".join(fold["labelers"]),
        )
        for fold in results["folds"]
    ]
    report.table(
        ("fold", "accuracy", "longer wins", "pairs", "prompts", "trained on", "labelers left out"),
        rows,
    )
    return report.write(path)


def _headline(results: Mapping[str, Any]) -> list[Figure]:
    accuracy, above = results["accuracy"], results["above_length_rule"]
    figures = [
        Figure("Pair accuracy", f"{accuracy['rate']:.3f}", _interval(accuracy)),
        Figure(
            "Longer wins",
            f"{results['length_rule']['rate']:.3f}",
            _interval(results["length_rule"]),
        ),
        Figure(
            "Above that rule",
            f"{above['difference']:+.3f}",
            _interval(above),
            passed=None if above["low"] is None else above["low"] > 0,
        ),
        Figure(
            "Calibration error", f"{results['calibration']['ece']:.3f}", "expected, 0 is perfect"
        ),
        Figure("Pairs", f"{results['pairs']:,}", f"of {results['prompts']:,} prompts"),
    ]
    if results.get("agreement") is not None:
        figures.append(
            Figure(
                "Labelers agree",
                f"{results['agreement']['rate']:.3f}",
                _interval(results["agreement"]),
            )
        )
    return figures


def _agreement(report: Report, agreement: Mapping[str, Any]) -> None:
    report.section(
        "Agreement between labelers",
        f"Of {agreement['n']:,} pairs ranked strictly by two labelers, {agreement['rate']:.3f} are in the same order "
        f"({_interval(agreement)}); {agreement['tied_pairs']:,} more were a tie for one of them. A model trained on "
        "one labeler's order cannot be expected to match another's more often.",
    )
    rows = [
        (name, row["rate"], row["low"], row["high"], row["n"])
        for name, row in agreement["by_labeler"].items()
    ]
    report.table(("labeler", "agrees with others", "low", "high", "pairs"), rows)


def _reliability(bins: list[dict[str, float]]) -> str:
    predicted = [row["predicted"] for row in bins]
    series = [
        Series("as predicted", [0.5, 1.0], [0.5, 1.0], 5),
        Series("observed", predicted, [row["observed"] for row in bins], 0),
    ]
    return line_chart(series, "predicted probability", "observed share", smooth=False)


def _bars(table: Mapping[str, Rate], label: str) -> str:
    return bar_chart(
        [_bar(label.format(name), rate) for name, rate in table.items()], reference=_GUESS
    )


def _bar(label: str, rate: Rate) -> Bar:
    return Bar(label, rate["rate"], rate["low"], rate["high"])


def _rows(table: Mapping[str, Rate]) -> list[tuple[object, ...]]:
    return [
        (
            int(name),
            row["rate"],
            row["low"],
            row["high"],
            row["length_rule"],
            row["n"],
            row["clusters"],
        )
        for name, row in table.items()
    ]


def _interval(rate: Mapping[str, Any]) -> str:
    return describe_interval(rate["low"], rate["high"])


def _plus_minus(summary: Mapping[str, float]) -> str:
    return f"{summary['mean']:.3f} ± {summary['standard_error']:.3f}"
