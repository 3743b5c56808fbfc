"""HTML pages of `fastrlhf eval rm`: a reward model on held-out rankings, and cross-validation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastrlhf.evaluation.charts import Bar, Series, bar_chart, line_chart
from fastrlhf.evaluation.page import Headline, Report, chart_figure
from fastrlhf.evaluation.reward import GroupAccuracy
from fastrlhf.evaluation.winrate import WinRateDict, interval_text

_CHANCE = (0.5, "chance")


def write_reward_report(results: Mapping[str, Any], path: Path) -> Path:
    """Write the page of `reward.evaluate`'s results with "model", "agreement" and "statistics"."""
    report = Report(
        "Reward model on held-out rankings", f"{results['model']}, on {results['files']}."
    )
    report.headlines(_headlines(results))
    report.section(
        "Accuracy and calibration",
        "Accuracy is the share of the strictly ranked pairs in which the response that the labeler "
        "preferred has the higher score. The 95 % intervals are from resampling prompts, because "
        "the pairs of a prompt are not independent.",
    )
    report.charts(_charts(results))
    for name, key in (("K", "accuracy_by_k"), ("Rank distance", "accuracy_by_distance")):
        report.table(
            (name, "accuracy", "low", "high", "length rule", "pairs", "prompts"),
            _rows(results[key]),
        )
    if results.get("agreement") is not None:
        _agreement(report, results["agreement"])
    if results.get("statistics"):
        report.section(
            "Scores of demonstrations",
            "Stored in the checkpoint when the bias of the score head was set.",
        )
        report.table(
            ("statistic", "value"),
            [(name, float(value)) for name, value in results["statistics"].items()],
        )
    return report.write(path)


def write_folds_report(results: Mapping[str, Any], path: Path) -> Path:
    """Write the page of a cross-validation over groups of labelers."""
    report = Report(
        f"Reward model, {len(results['folds'])}-fold cross-validation by {results['by']}",
        "Each model is trained on the rankings of all groups but one and evaluated on those of the "
        "held-out group.",
    )
    report.headlines(_folds_headlines(results))
    bars = [_bar(f"fold {fold['fold']}", fold["held_out"]["accuracy"]) for fold in results["folds"]]
    report.charts(
        [
            chart_figure(
                "Accuracy on the held-out group",
                bar_chart(bars, reference=_CHANCE),
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
        (
            "fold",
            "accuracy",
            "length rule",
            "pairs",
            "prompts",
            "training rankings",
            "held-out labelers",
        ),
        rows,
    )
    return report.write(path)


def _folds_headlines(results: Mapping[str, Any]) -> list[Headline]:
    held_out, length_rule = results["held_out"], results["length_rule"]
    detail = "mean over folds ± standard error of the mean"
    headlines = [Headline("Accuracy, held-out groups", _plus_minus(held_out), detail)]
    if results["seen"] is not None:
        detail = "validation prompts ranked by labelers of the training groups"
        headlines.append(
            Headline("Accuracy, training groups", _plus_minus(results["seen"]), detail)
        )
    detail = "accuracy of “the longer response wins”, mean over folds"
    return [
        *headlines,
        Headline("Variation between folds", f"{held_out['std']:.3f}", "standard deviation"),
        Headline("Length rule", f"{length_rule['mean']:.3f}", detail),
    ]


def _headlines(results: Mapping[str, Any]) -> list[Headline]:
    accuracy, above = results["accuracy"], results["above_length_rule"]
    headlines = [
        Headline("Pair accuracy", f"{accuracy['rate']:.3f}", _interval(accuracy)),
        Headline(
            "Length rule",
            f"{results['length_rule']['rate']:.3f}",
            "accuracy of “the longer response wins”, " + _interval(results["length_rule"]),
        ),
        Headline(
            "Accuracy minus length rule",
            f"{above['difference']:+.3f}",
            interval_text(above["low"], above["high"], results["prompts"]),
            passed=None if above["low"] is None else above["low"] > 0,
        ),
        Headline(
            "Calibration error",
            f"{results['calibration']['ece']:.3f}",
            "expected calibration error, 0 is perfect",
        ),
        Headline("Pairs", f"{results['pairs']:,}", f"of {results['prompts']:,} prompts"),
    ]
    if results.get("agreement") is not None:
        headlines.append(
            Headline(
                "Labeler agreement",
                f"{results['agreement']['rate']:.3f}",
                _interval(results["agreement"]),
            )
        )
    return headlines


def _charts(results: Mapping[str, Any]) -> list[str]:
    return [
        chart_figure(
            "Accuracy by number of responses",
            _bars(results["accuracy_by_k"], "K = {}"),
            "K is the number of responses to the prompt that were ranked together.",
        ),
        chart_figure(
            "Accuracy by rank distance",
            _bars(results["accuracy_by_distance"], "distance {}"),
            "Adjacent ranks are the hardest to distinguish, the best and the worst response "
            "the easiest.",
        ),
        chart_figure(
            "Calibration",
            _reliability(results["calibration"]["bins"]),
            "How often the labeler preferred the same response as the model, over the predicted "
            "probability. Below the diagonal the model is overconfident.",
            {"observed": 0, "perfect calibration": 5},
        ),
    ]


def _agreement(report: Report, agreement: Mapping[str, Any]) -> None:
    report.section(
        "Agreement between labelers",
        f"Of the {agreement['n']:,} pairs that two labelers ranked strictly, a share of "
        f"{agreement['rate']:.3f} is in the same order ({_interval(agreement)}). "
        f"{agreement['tied_pairs']:,} more pairs were a tie for one of the two. "
        "A model trained on one labeler's rankings cannot be expected to "
        "agree with another labeler more often.",
    )
    rows = [
        (name, row["rate"], row["low"], row["high"], row["n"])
        for name, row in agreement["by_labeler"].items()
    ]
    report.table(("labeler", "agreement with others", "low", "high", "pairs"), rows)


def _reliability(bins: list[dict[str, float]]) -> str:
    predicted = [row["predicted"] for row in bins]
    series = [
        Series("perfect calibration", [0.5, 1.0], [0.5, 1.0], 5),
        Series("observed", predicted, [row["observed"] for row in bins], 0),
    ]
    return line_chart(series, "predicted probability", "observed frequency", smooth=False)


def _bars(table: Mapping[str, WinRateDict], label: str) -> str:
    return bar_chart(
        [_bar(label.format(name), rate) for name, rate in table.items()], reference=_CHANCE
    )


def _bar(label: str, rate: WinRateDict) -> Bar:
    return Bar(label, rate["rate"], rate["low"], rate["high"])


def _rows(table: Mapping[str, GroupAccuracy]) -> list[tuple[object, ...]]:
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
    return interval_text(rate["low"], rate["high"], rate["clusters"])


def _plus_minus(summary: Mapping[str, float]) -> str:
    return f"{summary['mean']:.3f} ± {summary['standard_error']:.3f}"
