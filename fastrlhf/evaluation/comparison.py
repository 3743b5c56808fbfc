"""Comparison of two policies on the same prompts, and of the checkpoints of one run, with pages.

Scores come from any judge; higher is better. Only numpy is needed: no model, no tokenizer.

Not supported: a win rate corrected for length by a fitted model. The page shows instead how the
rate differs between responses that are longer and shorter than the baseline's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastrlhf.data.tokenize import prompt_text
from fastrlhf.evaluation.charts import Bar, Series, bar_chart, line_chart, scatter_chart
from fastrlhf.evaluation.page import Answer, Headline, Report, chart_figure
from fastrlhf.evaluation.winrate import WinRateDict, interval_text, mean_interval, win_rate

Scores = NDArray[np.float64]
_SHOWN_PAIRS = 8  # on the page; pairs.jsonl has all


@dataclass(frozen=True)
class JudgedResponses:
    """The R responses of a policy to each of G prompts, with the judge's scores."""

    name: str
    """Path of the weights."""
    responses: Sequence[Sequence[str]]
    """[G][R]."""
    tokens: NDArray[np.int64]
    """[G, R], lengths of the responses."""
    stopped: NDArray[np.bool_]
    """[G, R], True if the response ended with a stop token, False if at the length limit."""
    scores: Scores
    """[G, R]."""

    def summary(self) -> dict[str, Any]:
        """Return means over all responses; the score's 95 % interval is from resampling prompts.

        The interval is None if there are too few prompts (`winrate.MIN_PROMPTS`).
        """
        prompts = np.repeat(np.arange(len(self.scores)), self.scores.shape[1])
        mean, low, high = mean_interval(self.scores.ravel(), prompts)
        return {
            "model": self.name,
            "score": mean,
            "score_ci95": None if low is None else [low, high],
            "prompts": len(self.scores),
            "tokens": float(self.tokens.mean()),
            "cut_off": float(1 - self.stopped.mean()),
        }


def judge_pairs(policy: Scores, baseline: Scores, tie_margin: float = 0.0) -> Scores:
    """Return 1 where the policy wins, 0 where the baseline wins, 0.5 for a tie.

    Scores that differ by `tie_margin` or less are a tie.
    """
    difference = policy - baseline
    return np.where(np.abs(difference) <= tie_margin, 0.5, (difference > 0).astype(np.float64))


def compare(
    policy: JudgedResponses, baseline: JudgedResponses, tie_margin: float = 0.0
) -> dict[str, Any]:
    """Return the win rate of `policy` against `baseline`, with a 95 % interval over prompts.

    A tie counts half. "by_length" has the rate by whether the policy's response is longer than the
    baseline's, as long, or shorter, in tokens.
    """
    wins = judge_pairs(policy.scores, baseline.scores, tie_margin)
    prompts = np.broadcast_to(np.arange(len(wins))[:, None], wins.shape)
    longer = np.sign(policy.tokens - baseline.tokens)
    groups = {"longer": longer > 0, "as long": longer == 0, "shorter": longer < 0}
    return {
        "win_rate": win_rate(wins.ravel(), prompts.ravel()).as_dict(),
        "won": int((wins == 1).sum()),
        "tied": int((wins == 0.5).sum()),
        "lost": int((wins == 0).sum()),
        "tie_margin": tie_margin,
        "by_length": {
            name: win_rate(wins[chosen], prompts[chosen]).as_dict()
            for name, chosen in groups.items()
            if chosen.any()
        },
        "policy": policy.summary(),
        "baseline": baseline.summary(),
    }


def pair_records(
    prompts: Sequence[Any], policy: JudgedResponses, baseline: JudgedResponses
) -> list[dict[str, Any]]:
    """Return the lines of pairs.jsonl: every prompt with both responses and both scores."""
    records = []
    for g, prompt in enumerate(prompts):
        for r in range(policy.scores.shape[1]):
            pair = {"policy": policy.responses[g][r], "baseline": baseline.responses[g][r]}
            scores = {
                "policy_score": float(policy.scores[g, r]),
                "baseline_score": float(baseline.scores[g, r]),
            }
            records.append({"prompt": prompt, **pair, **scores})
    return records


def write_comparison(
    path: Path, results: Mapping[str, Any], pairs: Sequence[Mapping[str, Any]]
) -> Path:
    """Write the page of `compare`'s results with "judge" and "prompts", and of `pair_records`."""
    rate, policy, baseline = results["win_rate"], results["policy"], results["baseline"]
    report = Report(
        "Win rate of a policy",
        f"{policy['model']} against {baseline['model']} on {results['prompts']}, "
        f"judged by {results['judge']}.",
    )
    report.headlines(
        [
            Headline(
                "Win rate",
                f"{rate['rate']:.1%}",
                interval_text(rate["low"], rate["high"], rate["clusters"], ".1%"),
            ),
            Headline(
                "Won, tied, lost",
                f"{results['won']}, {results['tied']}, {results['lost']}",
                "a tie counts half",
            ),
            _against_baseline("Mean score", policy["score"], baseline["score"], "{:.3f}"),
            _against_baseline("Mean length", policy["tokens"], baseline["tokens"], "{:.1f} tokens"),
            _against_baseline(
                "Cut off at the limit", policy["cut_off"], baseline["cut_off"], "{:.1%}"
            ),
        ]
    )
    report.section(
        "Comparison",
        f"The judge scored both responses to each of {rate['clusters']} prompts; the higher score "
        "wins. A win rate of 50 % is as good as the baseline. The 95 % intervals are from "
        "resampling prompts.",
    )
    groups = {"all": rate, **results["by_length"]}
    report.charts(_comparison_charts(groups, pairs))
    header = ("pairs", "win rate", "low", "high", "number of pairs", "ties")
    rows = [(name, w["rate"], w["low"], w["high"], w["n"], w["ties"]) for name, w in groups.items()]
    report.table(header, rows)
    report.section(
        "Responses",
        f"The first {min(_SHOWN_PAIRS, len(pairs))} pairs; pairs.jsonl in the same folder has all.",
    )
    for pair in pairs[:_SHOWN_PAIRS]:
        answers = [
            Answer(side, pair[side], pair[f"{side}_score"]) for side in ("policy", "baseline")
        ]
        report.sample(prompt_text(pair["prompt"]), answers)
    return report.write(path)


def _comparison_charts(
    groups: Mapping[str, WinRateDict], pairs: Sequence[Mapping[str, Any]]
) -> list[str]:
    bars = [
        Bar(f"{name} ({rate['n']})", rate["rate"], rate["low"], rate["high"])
        for name, rate in groups.items()
    ]
    x, y = ([pair[f"{side}_score"] for pair in pairs] for side in ("baseline", "policy"))
    return [
        chart_figure(
            "Win rate",
            bar_chart(bars, reference=(0.5, "as good as the baseline")),
            "Over all pairs, and by whether the policy's response is longer, as long or shorter. "
            "A rate that is high only for longer responses shows that the judge prefers them.",
        ),
        chart_figure(
            "Scores of each pair",
            scatter_chart(
                [Series("prompts", x, y, 0)],
                "score of the baseline's response",
                "score of the policy's response",
                diagonal=True,
            ),
            "The policy won the pairs above the diagonal.",
        ),
    ]


def write_selection(path: Path, results: Mapping[str, Any]) -> Path:
    """Write the page of a run's checkpoints.

    `results` is {"run", "judge", "prompts", "best", "checkpoints": [row]}. A row is a
    `JudgedResponses.summary` with "step" and, if it was recorded, "valid_loss".
    """
    rows = results["checkpoints"]
    best = next(row for row in rows if row["step"] == results["best"])
    report = Report(
        "Checkpoints of a run",
        f"{results['run']}: responses to {results['prompts']}, judged by {results['judge']}.",
    )
    low, high = best["score_ci95"] or (None, None)
    report.headlines(
        [
            Headline("Best checkpoint", f"step {best['step']:,}", "named in checkpoints/best"),
            Headline(
                "Mean score of the best",
                f"{best['score']:.3f}",
                interval_text(low, high, best["prompts"]),
            ),
            Headline("Checkpoints", str(len(rows))),
        ]
    )
    report.section(
        "Scores and losses",
        "InstructGPT chose its SFT models by the reward model's score on the validation set, "
        "because the validation loss rises after the first epoch while people still prefer the "
        "later models.",
    )
    report.charts(_selection_charts(rows))
    report.table(
        ("step", "score", "low", "high", "valid loss", "tokens", "cut off"),
        [
            (
                row["step"],
                row["score"],
                *(row["score_ci95"] or (None, None)),
                row.get("valid_loss", "-"),
                row["tokens"],
                row["cut_off"],
            )
            for row in rows
        ],
    )
    return report.write(path)


def _selection_charts(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    steps = [float(row["step"]) for row in rows]
    score = [
        Series("mean", steps, [row["score"] for row in rows], 0),
    ]
    bounds = [row["score_ci95"] for row in rows if row["score_ci95"] is not None]
    if len(bounds) == len(rows):  # the checkpoints have the same prompts
        score += [
            Series("95 % interval", steps, list(ends), 5) for ends in zip(*bounds, strict=True)
        ]
    loss = Series("held out", steps, [row.get("valid_loss", float("nan")) for row in rows], 1)
    length = Series("tokens", steps, [row["tokens"] for row in rows], 2)
    return [
        chart_figure(
            "Mean score of the responses",
            line_chart(score, "step", "score", smooth=False),
            "Higher is better. A difference between steps whose intervals overlap may be noise.",
            {"mean": 0, "95 % interval": 5},
        ),
        chart_figure(
            "Validation loss",
            line_chart([loss], "step", "loss", smooth=False),
            "In nats per token.",
        ),
        chart_figure(
            "Mean length",
            line_chart([length], "step", "tokens"),
            "If the score grows only with the length, the judge may prefer long responses.",
        ),
    ]


def _against_baseline(label: str, policy: float, baseline: float, form: str) -> Headline:
    return Headline(label, form.format(policy), f"baseline {form.format(baseline)}")
