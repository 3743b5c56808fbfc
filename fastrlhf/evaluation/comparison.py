"""Two policies side by side on the same prompts, and the checkpoints of one run: figures and pages.

Scores come from any judge, higher for better; numpy alone: no model, no tokenizer. Left out on purpose: a win rate
corrected for length by a fitted model; the page shows instead how the rate differs between responses that are longer
and that are shorter than the baseline's.
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
from fastrlhf.evaluation.report import Answer, Figure, Report, framed
from fastrlhf.evaluation.winrate import MIN_PROMPTS, describe_interval, mean_interval, win_rate

Scores = NDArray[np.float64]
_SHOWN = 8  # prompts on the page; pairs.jsonl holds all


@dataclass(frozen=True)
class Judged:
    """The responses of one policy to G prompts, R each, and what the judge gave them."""

    name: str
    """Where the weights are."""
    responses: Sequence[Sequence[str]]
    """[G][R]."""
    tokens: NDArray[np.int64]
    """[G, R], lengths of the responses."""
    stopped: NDArray[np.bool_]
    """[G, R]: ended by themselves, not by the length limit."""
    scores: Scores
    """[G, R]."""

    def summary(self) -> dict[str, Any]:
        """Means over all responses; the score's 95 % interval is from resampling prompts."""
        prompts = np.repeat(np.arange(len(self.scores)), self.scores.shape[1])
        mean, low, high = mean_interval(self.scores.ravel(), prompts)
        return {
            "model": self.name,
            "score": mean,
            "score_ci95": [low, high],
            "tokens": float(self.tokens.mean()),
            "cut_off": float(1 - self.stopped.mean()),
        }


def judge_pairs(policy: Scores, baseline: Scores, tie_margin: float = 0.0) -> Scores:
    """1 where the policy's score is above the baseline's by more than `tie_margin`, 0 where below, else 0.5."""
    difference = policy - baseline
    return np.where(np.abs(difference) <= tie_margin, 0.5, (difference > 0).astype(np.float64))


def compare(policy: Judged, baseline: Judged, tie_margin: float = 0.0) -> dict[str, Any]:
    """The win rate of `policy` against `baseline`, ties counted half, with a 95 % interval over prompts.

    "by_length" splits it by whether the policy's response is longer or shorter than the baseline's, in tokens.
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


def pair_records(prompts: Sequence[Any], policy: Judged, baseline: Judged) -> list[dict[str, Any]]:
    """The lines of pairs.jsonl: every prompt with both responses and both scores."""
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
    """The page of `compare`'s results (with "judge" and "prompts" beside them) and `pair_records`' pairs."""
    rate, policy, baseline = results["win_rate"], results["policy"], results["baseline"]
    report = Report(
        "One policy against another",
        f"{policy['model']} against {baseline['model']} on {results['prompts']}, judged by {results['judge']}.",
    )
    report.figures(
        [
            Figure(
                "Win rate",
                f"{rate['rate']:.1%}",
                describe_interval(rate["low"], rate["high"], "{:.1%}"),
            ),
            Figure(
                "Won, tied, lost",
                f"{results['won']}, {results['tied']}, {results['lost']}",
                "a tie counts half",
            ),
            _before_and_after("Mean score", policy["score"], baseline["score"], "{:.3f}"),
            _before_and_after("Mean length", policy["tokens"], baseline["tokens"], "{:.1f} tokens"),
            _before_and_after("Cut off", policy["cut_off"], baseline["cut_off"], "{:.1%}"),
        ]
    )
    report.section(
        "Comparison",
        f"The judge scored each of the two responses to {rate['clusters']} prompts; the higher score wins. Half of "
        "the comparisons won is no better than the baseline. The intervals are 95 %, from resampling prompts; fewer "
        f"than {MIN_PROMPTS} prompts have none.",
    )
    overall = [_rate_bar("all", rate)] + [
        _rate_bar(name, one) for name, one in results["by_length"].items()
    ]
    points = [
        Series(
            "prompts",
            [pair["baseline_score"] for pair in pairs],
            [pair["policy_score"] for pair in pairs],
            0,
        )
    ]
    report.charts(
        [
            framed(
                "Win rate",
                bar_chart(overall, reference=(0.5, "as good as the baseline")),
                "Over all pairs, and where the policy's response is longer, as long or shorter. A rate that is high "
                "for longer responses alone says that the judge likes length.",
            ),
            framed(
                "Scores, pair by pair",
                scatter_chart(
                    points,
                    "score of the baseline's response",
                    "score of the policy's",
                    diagonal=True,
                ),
                "A dot above the diagonal is a pair that the policy won.",
            ),
        ]
    )
    header = ("pairs", "win rate", "low", "high", "pairs counted", "ties")
    named = {"all": rate, **results["by_length"]}
    rows = [(name, w["rate"], w["low"], w["high"], w["n"], w["ties"]) for name, w in named.items()]
    report.table(header, rows)
    report.section(
        "Responses",
        f"The first {min(_SHOWN, len(pairs))} pairs; pairs.jsonl beside this page holds all.",
    )
    for pair in pairs[:_SHOWN]:
        answers = [
            Answer(side, pair[side], pair[f"{side}_score"]) for side in ("policy", "baseline")
        ]
        report.sample(prompt_text(pair["prompt"]), answers)
    return report.write(path)


def write_selection(path: Path, results: Mapping[str, Any]) -> Path:
    """The page of one run's checkpoints: {"run", "judge", "prompts", "best", "checkpoints": [row]} with `row` a
    `Judged.summary` beside "step" and, where it was recorded, "valid_loss".
    """
    rows = results["checkpoints"]
    best = next(row for row in rows if row["step"] == results["best"])
    report = Report(
        "The checkpoints of a run",
        f"{results['run']}: responses to {results['prompts']}, judged by {results['judge']}.",
    )
    low, high = best["score_ci95"]
    report.figures(
        [
            Figure("Best checkpoint", f"step {best['step']:,}", "named in checkpoints/best"),
            Figure("Its mean score", f"{best['score']:.3f}", describe_interval(low, high)),
            Figure("Checkpoints", str(len(rows))),
        ]
    )
    report.section(
        "Scores and losses",
        "InstructGPT chose its SFT models by the reward model's score on the validation set: the validation loss "
        "rises after the first epoch, while people go on to like the responses better.",
    )
    steps = [float(row["step"]) for row in rows]
    score = [
        Series("mean", steps, [row["score"] for row in rows], 0),
        *(
            Series("95 % interval", steps, [_or_gap(row["score_ci95"][i]) for row in rows], 5)
            for i in (0, 1)
        ),
    ]
    losses = Series("held out", steps, [row.get("valid_loss", float("nan")) for row in rows], 1)
    report.charts(
        [
            framed(
                "Mean score of the responses",
                line_chart(score, "step", "score", smooth=False),
                "Higher is better. Steps whose intervals overlap much may as well be equal.",
                {"mean": 0, "95 % interval": 5},
            ),
            framed(
                "Validation loss",
                line_chart([losses], "step", "loss", smooth=False),
                "In nats a token.",
            ),
            framed(
                "Mean length",
                line_chart(
                    [Series("tokens", steps, [row["tokens"] for row in rows], 2)], "step", "tokens"
                ),
                "A score that grows with the length alone may be the judge's taste for length.",
            ),
        ]
    )
    report.table(
        ("step", "score", "low", "high", "valid loss", "tokens", "cut off"),
        [
            (
                row["step"],
                row["score"],
                *row["score_ci95"],
                row.get("valid_loss", "-"),
                row["tokens"],
                row["cut_off"],
            )
            for row in rows
        ],
    )
    return report.write(path)


def _or_gap(value: float | None) -> float:
    """Return a value, or NaN, which a chart leaves out."""
    return float("nan") if value is None else value


def _rate_bar(name: str, rate: Mapping[str, Any]) -> Bar:
    return Bar(f"{name} ({rate['n']})", rate["rate"], rate["low"], rate["high"])


def _before_and_after(label: str, policy: float, baseline: float, form: str) -> Figure:
    return Figure(label, form.format(policy), f"baseline {form.format(baseline)}")
