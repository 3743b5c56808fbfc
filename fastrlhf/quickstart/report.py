"""The quickstart's report: what each stage did, whether the loop worked, and what the models say, for a reader new to
RLHF.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastrlhf.evaluation.charts import Bar, Series, bar_chart, scatter_chart
from fastrlhf.evaluation.report import (
    Answer,
    Headline,
    Report,
    chart_figure,
    metric_charts,
    read_metrics,
)
from fastrlhf.evaluation.winrate import WinRate
from fastrlhf.quickstart.labeler import TERMS, WEIGHTS, Calibration

# One colour a model, everywhere on the page.
COLORS = {"base": 5, "SFT": 0, "PPO": 1, "PPO-ptx": 2}

STAGES = {
    "Pretraining": "A tiny GPT learns English from the documentation installed on this machine.",
    "SFT": "It learns the task from demonstrations: a function's name in, a one-line summary out.",
    "Ranking": "It writes 4 to 9 summaries for each of many functions; simulated labelers rank them.",
    "Reward model": "A second model learns from all ranked pairs to score a summary.",
    "PPO-ptx": "The policy learns to write what the reward model likes, held back by two ties to where it came from.",
}
_PRETRAINED_STAGE = (
    "A pretrained model is converted; its logits are compared with those of transformers."
)
# Run -> (heading, what happened in it, what to look for), in the order of the page.
RUNS = {
    "pretrain": (
        "Pretraining",
        "Next-token prediction on running text. A model that has seen text for a minute is no writer yet, but it "
        "knows common words and how sentences go.",
        "The loss should fall steeply, then flatten. It starts near the logarithm of the vocabulary size: guessing.",
    ),
    "sft": (
        "Supervised fine-tuning (SFT)",
        "The same training on demonstrations, with a loss on the response alone. Its result is the policy that the "
        "later stages start from and are compared with.",
        "A fast drop at first, as the model learns the form, then slow progress. Held-out loss above training loss "
        "is over-fitting.",
    ),
    "rm": (
        "Reward model",
        "A copy of the SFT model with one number as its output. For every pair of a prompt's ranked responses it "
        "should give the better one the higher score.",
        "Accuracy should climb from 0.5 towards what noisy labels allow; the loss starts near 0.693, the logarithm "
        "of 2.",
    ),
    "ppo": (
        "PPO, without pretraining gradients",
        "The policy samples summaries, the reward model scores them, and PPO makes well-scored ones likelier. A "
        "penalty on the KL divergence keeps it near the SFT model.",
        "Score and KL rise together; a score that rises while the labeler's opinion does not would be reward hacking.",
    ),
    "ppo_ptx": (
        "PPO-ptx: PPO with pretraining gradients mixed in",
        "The policy samples summaries, the reward model scores them, and PPO makes well-scored ones likelier, near "
        "the SFT model; every update also takes a step on pretraining text, so that what was learned there is not "
        "forgotten: the method of InstructGPT.",
        "The score should rise while the pretraining loss stays near that of SFT.",
    ),
}

# Metrics worth a newcomer's look; the reports of the single runs show all.
SHOWN = ("loss", "accuracy", "score", "kl", "entropy", "ptx_loss", "response_length", "value_loss")


@dataclass(frozen=True)
class Sample:
    """One held-out prompt and what each model answered."""

    prompt: str
    answers: Sequence[Answer]


@dataclass(frozen=True)
class Results:
    """What the stages found, for the report."""

    summary: Mapping[str, Any]
    """What summary.json holds."""
    runs: Mapping[str, Path]
    """Output folders of the training runs: keys of `RUNS`. Without "pretrain" the models come from a pretrained one."""
    win_rates: Mapping[str, WinRate]
    """Model -> win rate against SFT on held-out prompts; names as in `COLORS`."""
    terms: Mapping[str, Mapping[str, float]]
    """Model -> mean of each term of the labelers' rule, and of the utility, over held-out responses: see
    `labeler.mean_terms`.
    """
    calibration: Calibration
    counts: Mapping[str, int]
    """What the data amounted to, in words: {"documents": ..., "demonstrations": ...}."""
    samples: Sequence[Sample]


def outcomes(summary: Mapping[str, Any]) -> dict[str, bool]:
    """Whether the loop worked: what a healthy installation reaches, by the key of summary.json it is read from.

    What pretraining gradients are good for shows in comparison with a PPO run without them, and not otherwise.
    """
    loss = summary["pretrain_loss"]
    reached = {
        "rm_heldout_accuracy": summary["rm_heldout_accuracy"] >= 0.70,
        "winrate_ppo_ptx_vs_sft": summary["winrate_ppo_ptx_vs_sft"] >= 0.65
        and summary["winrate_ppo_ptx_vs_sft_ci95"][0] > 0.5,
    }
    if "ppo" in loss:
        reached["pretrain_loss"] = abs(loss["ppo_ptx"] - loss["sft"]) < abs(
            loss["ppo"] - loss["sft"]
        )
    return reached


def write_quickstart_report(out: str | Path, results: Results) -> Path:
    """Writes `out`/report.html. Raises UserError where a run left no metrics."""
    report = Report(
        "The InstructGPT loop on a laptop",
        f"{_subject(results)} was shown demonstrations, judged by simulated labelers and trained on their "
        "preferences with reinforcement learning, by the same code that does it at scale. This page shows what came "
        "of it.",
    )
    _headlines(report, results)
    report.section("What happened", "Five stages, each starting from the one before:")
    report.stages(
        STAGES
        if "pretrain" in results.runs
        else {"Pretrained": _PRETRAINED_STAGE, **_without_first(STAGES)}
    )
    report.table(["the data", "amount"], [[name, count] for name, count in results.counts.items()])
    _outcome(report, results)
    _samples(report, results.samples, is_tiny="pretrain" in results.runs)
    _labelers(report, results.calibration)
    for i, key in enumerate((key for key in RUNS if key in results.runs), 1):
        heading, what, look = RUNS[key]
        report.section(f"{i}. {heading}", what, f"What to look for: {look}")
        report.charts(metric_charts(read_metrics(results.runs[key] / "metrics.jsonl"), SHOWN))
        report.note(
            f"Everything this stage recorded: {results.runs[key].name}/report.html beside this page."
        )
    _timing(report, results.summary["seconds"])
    return report.write(Path(out) / "report.html")


def _subject(results: Results) -> str:
    if "pretrain" in results.runs:
        return "A tiny GPT was pretrained from random weights. It"
    return f"A pretrained model ({results.summary['model']}, trained in {results.summary['dtype']})"


def _without_first(stages: Mapping[str, str]) -> dict[str, str]:
    return dict(list(stages.items())[1:])


def _headlines(report: Report, results: Results) -> None:
    summary, reached = results.summary, outcomes(results.summary)
    low, high = summary["winrate_ppo_ptx_vs_sft_ci95"]
    loss = summary["pretrain_loss"]
    report.headlines(
        [
            Headline(
                "PPO-ptx preferred to SFT",
                f"{summary['winrate_ppo_ptx_vs_sft']:.1%}",
                f"95 % interval {low:.1%} to {high:.1%}; expected 65 % or more",
                reached["winrate_ppo_ptx_vs_sft"],
            ),
            Headline(
                "Reward model, held-out accuracy",
                f"{summary['rm_heldout_accuracy']:.1%}",
                f"expected 70 % or more; noisy labels allow {results.calibration.ceiling:.0%}",
                reached["rm_heldout_accuracy"],
            ),
            Headline(
                "Pretraining loss, PPO-ptx",
                f"{loss['ppo_ptx']:.3f}",
                f"SFT {loss['sft']:.3f}, PPO {loss['ppo']:.3f}; expected nearer to SFT than PPO is"
                if "ppo" in loss
                else f"before {loss['base']:.3f}, SFT {loss['sft']:.3f}",
                reached.get("pretrain_loss"),
            ),
            Headline(
                "KL of PPO-ptx from SFT",
                f"{summary['kl_ppo_ptx']:.2f}",
                "nats a response: how far it moved",
            ),
            Headline("Time", _minutes(summary["seconds"]["total"]), "all stages"),
        ]
    )


def _outcome(report: Report, results: Results) -> None:
    report.section(
        "Did it work?",
        "On functions from packages that no stage has seen, the labelers compared each model's summary with the SFT "
        "model's. Half of the comparisons won is no better than SFT. The whiskers are 95 % intervals, from "
        "resampling prompts.",
    )
    wins = [Bar(name, w.rate, w.low, w.high, COLORS[name]) for name, w in results.win_rates.items()]
    loss = results.summary["pretrain_loss"]
    names = {"base": "base", "sft": "SFT", "ppo": "PPO", "ppo_ptx": "PPO-ptx"}
    losses = [
        Bar(name, loss[key], color=COLORS[name]) for key, name in names.items() if key in loss
    ]
    scores = [
        Bar(name, terms["utility"], color=COLORS[name]) for name, terms in results.terms.items()
    ]
    report.charts(
        [
            chart_figure(
                "Preferred to SFT",
                bar_chart(wins, reference=(0.5, "as good as SFT")),
                "Higher is better.",
            ),
            chart_figure(
                "Loss on held-out pretraining text",
                bar_chart(losses, from_zero=False),
                "Nats a token; lower is better. What a model gains in one task it tends to lose elsewhere; the "
                "pretraining gradients of PPO-ptx limit that loss.",
            ),
            chart_figure(
                "Mean score by the labelers' rule",
                bar_chart(scores),
                "Without noise, from 0 to 1; higher is better.",
            ),
            _score_against_kl(results.runs),
        ]
    )
    header = ["model", *(name.replace("_", " ") for name in TERMS), "utility"]
    rows = [
        [model, *(terms[name] for name in TERMS), terms["utility"]]
        for model, terms in results.terms.items()
    ]
    report.note(
        "What changed in the responses, by the terms of the labelers' rule (0 to 1, higher is better):"
    )
    report.table(header, rows)


def _score_against_kl(runs: Mapping[str, Path]) -> str:
    series = []
    for key, name in (("ppo", "PPO"), ("ppo_ptx", "PPO-ptx")):
        metrics = read_metrics(runs[key] / "metrics.jsonl") if key in runs else {}
        if "kl" in metrics and "score" in metrics:
            series.append(Series(name, metrics["kl"][1], metrics["score"][1], COLORS[name]))
    return chart_figure(
        "Score against distance",
        scatter_chart(series, "KL from SFT (nats a response)", "reward model's score"),
        "One dot an iteration. Up is better by the reward model, right is farther from SFT: the best bargain is up "
        "and left.",
        {one.name: one.color for one in series},
    )


def _samples(report: Report, samples: Sequence[Sample], is_tiny: bool) -> None:
    report.section(
        "What the models say",
        "Held-out functions, one sampled response of each model. The score is the labelers' rule without noise, from "
        "0 to 1."
        + (
            " A model of a million parameters that has read for a minute knows the form better than the meaning."
            if is_tiny
            else ""
        ),
    )
    for sample in samples:
        report.sample(sample.prompt, sample.answers)


def _labelers(report: Report, calibration: Calibration) -> None:
    report.section(
        "The simulated labelers",
        "They share one rule, what PEP 257 asks of a docstring's first line, and each adds noise of its own, set so "
        "that two of them agree as often as the paper's did (72.6 %). Held-out accuracy is measured against such "
        "noisy labels.",
    )
    meaning = {
        "relevant": "mentions the words of the function's name",
        "command": 'opens with a command: "Return", not "Returns"',
        "sentence": "one sentence, capital letter first, full stop last",
        "length": "5 to 14 words",
        "real_words": "words that occur in the pretraining text",
        "varied": "does not repeat itself: multiplies the sum of the others",
    }
    report.table(
        ["term of the rule", "what it asks", "weight"],
        [
            [name.replace("_", " "), text, WEIGHTS.get(name, "factor")]
            for name, text in meaning.items()
        ],
    )
    report.note(
        f"Measured on the sampled responses: two labelers agree on {calibration.agreement:.1%} of the pairs that "
        f"neither calls a tie; one calls {calibration.ties:.1%} of pairs a tie; a perfect reward model would reach "
        f"{calibration.ceiling:.1%}."
    )


def _timing(report: Report, seconds: Mapping[str, float]) -> None:
    report.section("Where the time went")
    bars = [
        Bar(name.replace("_", " "), value) for name, value in seconds.items() if name != "total"
    ]
    report.charts(
        [
            chart_figure(
                "Seconds a stage",
                bar_chart(bars, digits=1),
                f"{_minutes(seconds['total'])} in all.",
            )
        ]
    )


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"
