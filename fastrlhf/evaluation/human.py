"""Figures of human judgements: win rates, Likert means, flags, and agreement of labelers."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from fastrlhf.evaluation.page import Report
from fastrlhf.evaluation.winrate import mean_interval, win_rate

Judgement = Mapping[str, Any]
Interval = tuple[float, float | None, float | None]


def squared(a: float, b: float) -> float:
    """Return the difference of the interval metric of Krippendorff's alpha."""
    return (a - b) ** 2


def unequal(a: float, b: float) -> float:
    """Return the difference of the nominal metric of Krippendorff's alpha."""
    return float(a != b)


def krippendorff_alpha(
    units: Iterable[Sequence[float]], difference: Callable[[float, float], float]
) -> float | None:
    """Return 1 - observed / expected disagreement of the values that labelers gave to units.

    Units with one value do not count. None if no unit has two values, or all values are equal.
    Source: Krippendorff, Computing Krippendorff's Alpha-Reliability (2011).
    """
    shared = [unit for unit in units if len(unit) > 1]
    counts: dict[float, int] = defaultdict(int)
    observed = 0.0
    for unit in shared:
        # Each of the m (m - 1) ordered pairs of a unit weighs 1 / (m - 1).
        pairs = sum(difference(a, b) for a, b in combinations(unit, 2))
        observed += 2 * pairs / (len(unit) - 1)
        for value in unit:
            counts[value] += 1
    total = sum(counts.values())
    expected = sum(2 * counts[a] * counts[b] * difference(a, b) for a, b in combinations(counts, 2))
    return 1 - (total - 1) * observed / expected if expected else None


def human_figures(judgements: Sequence[Judgement], baseline: str | None = None) -> dict[str, Any]:
    """Return the figures of judgements as the labeling export has them.

    Win rates are of each model in the column "model" against `baseline`, ties counted as half. All
    intervals are 95 % bootstrap intervals over prompts.
    """
    wins: dict[str, list[tuple[float, str]]] = defaultdict(list)
    ratings: dict[str, list[tuple[float, str]]] = defaultdict(list)
    flags: dict[str, dict[str, list[tuple[float, str]]]] = defaultdict(lambda: defaultdict(list))
    names = sorted({name for row in judgements for given in row.get("flags", []) for name in given})
    for row in judgements:
        prompt = json.dumps(row["prompt"], sort_keys=True)
        models = row.get("model") or ["all"] * len(row.get("responses", []))
        for model, rating in zip(models, row.get("ratings", []), strict=False):
            ratings[model].append((rating, prompt))
        for model, given in zip(models, row.get("flags", []), strict=False):
            for name in names:
                flags[model][name].append((float(name in given), prompt))
        ranked = list(zip(models, row.get("ranks", []), strict=False))
        for (a, rank_a), (b, rank_b) in [(x, y) for x in ranked for y in ranked]:
            if b == baseline and a != baseline:
                wins[a].append((_win(rank_a, rank_b), prompt))
    return {
        "judgements": len(judgements),
        "labelers": len({row["labeler_id"] for row in judgements}),
        "baseline": baseline,
        "win_rates": {m: win_rate(*zip(*v, strict=True)).as_dict() for m, v in wins.items()},
        "ratings": {model: _mean(values) for model, values in ratings.items()},
        "flags": {m: {n: _mean(v) for n, v in found.items()} for m, found in flags.items()},
        "agreement": agreement(judgements),
    }


def agreement(judgements: Sequence[Judgement]) -> dict[str, Any]:
    """Return how often labelers order the same pair alike, and alpha of pairs and ratings."""
    orders: dict[tuple[str, int, int], list[float]] = defaultdict(list)
    ratings: dict[tuple[str, int], list[float]] = defaultdict(list)
    for row in judgements:
        item, ranks = row["item_id"], row.get("ranks", [])
        for i, j in combinations(range(len(ranks)), 2):
            orders[item, i, j].append(_win(ranks[i], ranks[j]))
        for i, rating in enumerate(row.get("ratings", [])):
            ratings[item, i].append(rating)
    equal = [
        (float(a == b), item)
        for (item, *_), found in orders.items()
        for a, b in combinations(found, 2)
    ]
    return {
        "pairs": _mean(equal) if equal else None,
        "alpha_pairs": krippendorff_alpha(orders.values(), unequal),
        "alpha_ratings": krippendorff_alpha(ratings.values(), squared),
    }


def write_human(path: Path, figures: Mapping[str, Any]) -> Path:
    """Write the page of `human_figures`."""
    report = Report(
        "Human judgements",
        f"{figures['judgements']} judgements of {figures['labelers']} labelers.",
    )
    report.section("Models", "The 95 % intervals are from resampling prompts.")
    header = ("model", "figure", "value", "low", "high")
    rows: list[tuple[object, ...]] = []
    for model, rate in figures["win_rates"].items():
        against = f"win rate against {figures['baseline']}"
        rows.append((model, against, *_cells((rate["rate"], rate["low"], rate["high"]))))
    rows += [(m, "overall quality", *_cells(value)) for m, value in figures["ratings"].items()]
    rows += [
        (model, f"flag {name}", *_cells(value))
        for model, found in figures["flags"].items()
        for name, value in found.items()
    ]
    report.table(header, rows)
    report.section("Agreement", "An alpha of 1 is full agreement, 0 is that of chance.")
    found = figures["agreement"]
    report.table(
        ("figure", "value", "low", "high"),
        [
            ("pairs ordered alike", *_cells(found["pairs"] or (None, None, None))),
            ("alpha of pairs (nominal)", *_cells((found["alpha_pairs"], None, None))),
            ("alpha of ratings (interval)", *_cells((found["alpha_ratings"], None, None))),
        ],
    )
    return report.write(path)


def _win(rank_a: float, rank_b: float) -> float:
    return 0.5 if rank_a == rank_b else float(rank_a < rank_b)


def _mean(values: Sequence[tuple[float, str]]) -> Interval:
    numbers, prompts = zip(*values, strict=True)
    return mean_interval(numbers, prompts)


def _cells(values: Sequence[float | None]) -> list[str]:
    return ["" if value is None else f"{value:.3f}" for value in values]
