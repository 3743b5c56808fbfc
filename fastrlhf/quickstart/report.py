"""HTML report of the quickstart, for readers who are new to RLHF.

It shows the stages, whether the loop worked, and responses of each model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastrlhf.evaluation.charts import Bar, Series, bar_chart, scatter_chart
from fastrlhf.evaluation.page import Answer, Headline, Report, chart_figure
from fastrlhf.evaluation.report import metric_charts, read_metrics
from fastrlhf.evaluation.winrate import WinRate, interval_text
from fastrlhf.quickstart.labeler import TERMS, WEIGHTS, Calibration

# The colour of each model in all charts.
COLORS = {"base": 5, "SFT": 0, "PPO": 1, "PPO-ptx": 2}

STAGES = {
    "Pretraining": "A tiny GPT learns English from the documentation installed on this machine.",
    "SFT": "It learns from demonstrations to summarize a function in one line, given its name.",
    "Ranking": "It writes 4 to 9 summaries for each function, which simulated labelers rank.",
    "Reward model": "A second model learns from all ranked pairs to score a summary.",
    "PPO-ptx": "The policy learns to write summaries with high scores. A KL penalty and "
    "pretraining gradients keep it close to the earlier models.",
}
_PRETRAINED_STAGE = (
    "A pretrained model is converted; its logits are compared with those of transformers."
)
# Run -> (heading, description, what to look for), in the order of the page.
RUNS = {
    "pretrain": (
        "Pretraining",
        "Next-token prediction on text. After a minute of training the model knows common words "
        "and the form of sentences, but does not write well.",
        "The loss should fall steeply, then flatten. It starts near the logarithm of the "
        "vocabulary size, the loss of a uniform prediction.",
    ),
    "sft": (
        "Supervised fine-tuning (SFT)",
        "The same training on demonstrations, with a loss only on the response. The later stages "
        "start from the resulting policy and are compared with it.",
        "A fast drop at first, as the model learns the form, then slow progress. A held-out loss "
        "above the training loss shows overfitting.",
    ),
    "rm": (
        "Reward model",
        "A copy of the SFT model whose output is one number. For every pair of a prompt's ranked "
        "responses, the better one should have the higher score.",
        "Accuracy should rise from 0.5 towards the limit that noisy labels set. The loss starts "
        "near 0.693, the logarithm of 2.",
    ),
    "ppo": (
        "PPO, without pretraining gradients",
        "The policy samples summaries, the reward model scores them, and PPO raises the "
        "probability of those with high scores. A penalty on the KL divergence keeps the policy "
        "near the SFT model.",
        "Score and KL should rise together. If the score rises but the labelers' preference does "
        "not, that is reward hacking.",
    ),
    "ppo_ptx": (
        "PPO-ptx: PPO with pretraining gradients mixed in",
        "PPO as in the paper: the policy samples summaries, the reward model scores them, and PPO "
        "raises the probability of those with high scores, with a KL penalty. Every update also "
        "has gradients from pretraining text, so that the model keeps what it learned there.",
        "The score should rise while the pretraining loss stays near that of SFT.",
    ),
}

# Metrics on this page; the reports of the single runs show all.
SHOWN = ("loss", "accuracy", "score", "kl", "entropy", "ptx_loss", "response_length", "value_loss")


@dataclass(frozen=True)
class Sample:
    """One held-out prompt and the response of each model."""

    prompt: str
    answers: Sequence[Answer]


@dataclass(frozen=True)
class Results:
    """Results of all stages, for the report."""

    summary: Mapping[str, Any]
    """Contents of summary.json."""
    runs: Mapping[str, Path]
    """Output folders of the training runs, by the keys of `RUNS`. Without "pretrain" the first
    model was a pretrained one."""
    win_rates: Mapping[str, WinRate]
    """Win rate of each model (names as in `COLORS`) against SFT on held-out prompts."""
    terms: Mapping[str, Mapping[str, float]]
    """Means of the terms of the labelers' rule and of the utility over each model's held-out
    responses: see `labeler.mean_terms`."""
    calibration: Calibration
    counts: Mapping[str, int]
    """Amounts of data by name: {"documents": ..., "demonstrations": ...}."""
    samples: Sequence[Sample]


def outcomes(summary: Mapping[str, Any]) -> dict[str, bool]:
    """Return whether each target was reached, by the key of summary.json.

    A working installation reaches all targets. The effect of pretraining gradients is only a target
    if there is a PPO run without them to compare with.
    """
    loss = summary["pretrain_loss"]
    interval = summary["winrate_ppo_ptx_vs_sft_ci95"]
    reached = {
        "rm_heldout_accuracy": summary["rm_heldout_accuracy"] >= 0.70,
        "winrate_ppo_ptx_vs_sft": summary["winrate_ppo_ptx_vs_sft"] >= 0.65
        and interval is not None
        and interval[0] > 0.5,
    }
    if "ppo" in loss:
        with_ptx, without = (abs(loss[run] - loss["sft"]) for run in ("ppo_ptx", "ppo"))
        reached["pretrain_loss"] = with_ptx < without
    return reached


def write_quickstart_report(out: str | Path, results: Results) -> Path:
    """Write `out`/report.html and return its path; raise UserError if a run has no metrics."""
    report = Report(
        "The InstructGPT loop on a laptop",
        f"{_subject(results)} was fine-tuned on demonstrations and then trained on the "
        "preferences of simulated labelers with reinforcement learning, with the code that also "
        "runs at scale. This page shows the results.",
    )
    _headlines(report, results)
    report.section("Stages", "Each of the five stages starts from the previous one:")
    report.stages(
        STAGES
        if "pretrain" in results.runs
        else {"Pretrained": _PRETRAINED_STAGE, **_without_first(STAGES)}
    )
    report.table(["data", "amount"], [[name, count] for name, count in results.counts.items()])
    _outcome(report, results)
    _samples(report, results.samples, is_tiny="pretrain" in results.runs)
    _labelers(report, results.calibration)
    for i, key in enumerate((key for key in RUNS if key in results.runs), 1):
        heading, description, look = RUNS[key]
        report.section(f"{i}. {heading}", description, f"What to look for: {look}")
        report.charts(metric_charts(read_metrics(results.runs[key] / "metrics.jsonl"), SHOWN))
        report.note(f"{results.runs[key].name}/report.html shows all metrics of this stage.")
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
    loss, prompts = summary["pretrain_loss"], results.win_rates["PPO-ptx"].clusters
    low, high = summary["winrate_ppo_ptx_vs_sft_ci95"] or (None, None)
    report.headlines(
        [
            Headline(
                "PPO-ptx preferred to SFT",
                f"{summary['winrate_ppo_ptx_vs_sft']:.1%}",
                f"{interval_text(low, high, prompts, '.1%')}; expected 65 % or more",
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
                f"SFT {loss['sft']:.3f}, PPO {loss['ppo']:.3f}; expected closer to SFT than PPO"
                if "ppo" in loss
                else f"before {loss['base']:.3f}, SFT {loss['sft']:.3f}",
                reached.get("pretrain_loss"),
            ),
            Headline(
                "KL of PPO-ptx from SFT",
                f"{summary['kl_ppo_ptx']:.2f}",
                "nats per response",
            ),
            Headline("Time", _minutes(summary["seconds"]["total"]), "all stages"),
        ]
    )


def _outcome(report: Report, results: Results) -> None:
    report.section(
        "Did it work?",
        "On functions from packages that no stage has seen, the labelers compared each model's "
        "summary with the SFT model's. A win rate of 50 % is as good as SFT. The whiskers are 95 "
        "% intervals from resampling prompts.",
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
                "Nats per token; lower is better. Training on one task tends to make a model "
                "worse at others; the pretraining gradients of PPO-ptx limit that.",
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
        "Mean terms of the labelers' rule for each model's responses (0 to 1, higher is better):"
    )
    report.table(header, rows)


def _score_against_kl(runs: Mapping[str, Path]) -> str:
    series = []
    for key, name in (("ppo", "PPO"), ("ppo_ptx", "PPO-ptx")):
        metrics = read_metrics(runs[key] / "metrics.jsonl") if key in runs else {}
        if "kl" in metrics and "score" in metrics:
            series.append(Series(name, metrics["kl"][1], metrics["score"][1], COLORS[name]))
    return chart_figure(
        "Score against KL",
        scatter_chart(series, "KL from SFT (nats per response)", "reward model's score"),
        "One dot per iteration. A higher score at the same KL is better.",
        {one.name: one.color for one in series},
    )


def _samples(report: Report, samples: Sequence[Sample], is_tiny: bool) -> None:
    report.section(
        "Sampled responses",
        "Held-out functions with one sampled response of each model. The score is that of the "
        "labelers' rule without noise, from 0 to 1."
        + (
            " A model of a million parameters, trained for minutes, learns the form better than"
            " the meaning."
            if is_tiny
            else ""
        ),
    )
    for sample in samples:
        report.sample(sample.prompt, sample.answers)


def _labelers(report: Report, calibration: Calibration) -> None:
    report.section(
        "The simulated labelers",
        "They share one rule, which follows PEP 257 for the first line of a docstring. Each adds "
        "independent noise, calibrated so that two of them agree as often as the paper's labelers "
        "(72.6 %). Held-out accuracy is measured against such noisy labels.",
    )
    meaning = {
        "relevant": "mentions the words of the function's name",
        "command": 'begins with a command: "Return", not "Returns"',
        "sentence": "one sentence, capital letter first, full stop last",
        "length": "5 to 14 words",
        "real_words": "words that occur in the pretraining text",
        "varied": "does not repeat words; multiplies the sum of the others",
    }
    report.table(
        ["term of the rule", "requirement", "weight"],
        [
            [name.replace("_", " "), text, WEIGHTS.get(name, "factor")]
            for name, text in meaning.items()
        ],
    )
    report.note(
        f"On the sampled responses, two labelers agree on {calibration.agreement:.1%} of the "
        f"pairs that neither calls a tie. A labeler calls {calibration.ties:.1%} of the pairs a "
        f"tie. The accuracy of a perfect reward model would be {calibration.ceiling:.1%}."
    )


def _timing(report: Report, seconds: Mapping[str, float]) -> None:
    report.section("Time")
    bars = [
        Bar(name.replace("_", " "), value) for name, value in seconds.items() if name != "total"
    ]
    report.charts(
        [
            chart_figure(
                "Seconds per stage",
                bar_chart(bars, digits=1),
                f"{_minutes(seconds['total'])} in total.",
            )
        ]
    )


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"
