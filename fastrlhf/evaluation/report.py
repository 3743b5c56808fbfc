"""Self-contained HTML reports: headline figures, charts, tables and responses side by side, in one file that fetches
nothing.

`Report` is built section by section; `write_run_report` makes the one that every training run leaves in its folder,
from its metrics.jsonl, config.yaml and samples.jsonl. All text that comes from data is escaped.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from fastrlhf.errors import UserError
from fastrlhf.evaluation.charts import Series, line_chart
from fastrlhf.evaluation.style import STYLE
from fastrlhf.log_lines import read_log

logger = logging.getLogger(__name__)

Metrics = dict[str, tuple[list[float], list[float]]]  # name -> (steps, values)

# What a newcomer should know of what runs record: (title, what the curve should look like), in the order of the page.
EXPLAINED = {
    "loss": (
        "Loss",
        "What training makes smaller: a fast fall, then a slow one. A sudden rise: too high a learning rate.",
    ),
    "accuracy": (
        "Accuracy",
        "Share of ranked pairs in which the better response gets the higher score; 0.5 is guessing.",
    ),
    "margin": (
        "Margin",
        "Mean difference between the scores of the better and the worse response of a pair.",
    ),
    "score": (
        "Score",
        "Mean score the reward model gives to the sampled responses. It should rise.",
    ),
    "reward": ("Reward", "The score less the KL penalty: what PPO maximizes. It should rise."),
    "kl": (
        "KL from the reference",
        "How far the policy has moved, in nats a response: what the score cost.",
    ),
    "response_length": (
        "Response length",
        "In tokens. A drift to very long or very short ones hints at reward hacking.",
    ),
    "no_stop": (
        "Responses cut off",
        "Share of the responses that reached the length limit before a stop token.",
    ),
    "entropy": (
        "Entropy",
        "How undecided the policy is, in nats a token. Near zero it always says the same.",
    ),
    "ptx_loss": (
        "Pretraining loss",
        "Cross-entropy on the pretraining text mixed into PPO, in nats a token.",
    ),
    "value_loss": (
        "Value loss",
        "Half the squared error of the predicted return. It should fall as the value model learns.",
    ),
    "explained_variance": (
        "Explained variance",
        "Share of the returns' variance that the value model predicts; 1 is all.",
    ),
    "policy_loss": (
        "Policy loss",
        "PPO's clipped objective. Its level says little; it should stay small and bounded.",
    ),
    "clip_fraction": (
        "Clipped share",
        "Share of tokens whose ratio left the clip range. Above 0.3, steps are too large.",
    ),
    "approx_kl": (
        "KL of one update",
        "How far one update moved the policy. It should stay well below 0.1.",
    ),
    "ratio_deviation": (
        "First ratio's deviation from 1",
        "Rollout and training must agree: anything but rounding is a bug.",
    ),
    "ppo_grad_norm": (
        "Gradient norm of PPO",
        "Of the policy loss alone, in the first minibatch. Far below that of the pretraining part, PPO learns little.",
    ),
    "ptx_grad_norm": (
        "Gradient norm of the pretraining part",
        "Of gamma times its loss, in the first minibatch.",
    ),
    "grad_norm": (
        "Gradient norm",
        "Before clipping. Spikes are harmless when rare; steady growth is not.",
    ),
    "lr": ("Learning rate", "As the schedule asks: warm-up first, then decay."),
    "seconds": (
        "Seconds a step",
        "Wall-clock time. Steady is good; growth hints at a leak or a slowing disk.",
    ),
}
_PREFIXES = ("valid_", "valid/", "eval_", "eval/")


@dataclass(frozen=True)
class Figure:
    """One headline number."""

    label: str
    value: str
    detail: str = ""
    passed: bool | None = None
    """Shown as a badge: reached (True), missed (False), or no badge (None)."""


@dataclass(frozen=True)
class Answer:
    """One response of a side-by-side sample."""

    name: str
    """Who wrote it: "SFT", "PPO-ptx"."""
    text: str
    score: float | None = None


@dataclass
class Report:
    """An HTML page in the making; every method adds to its end. `write` or `html` finishes it."""

    title: str
    lead: str = ""
    _parts: list[str] = field(default_factory=list)

    def section(self, title: str, *paragraphs: str) -> None:
        """A heading and plain-text paragraphs under it."""
        self._parts.append(f"<h2>{escape(title)}</h2>")
        self._parts.extend(f"<p>{escape(paragraph)}</p>" for paragraph in paragraphs)

    def note(self, text: str) -> None:
        """A small remark."""
        self._parts.append(f'<p class="note">{escape(text)}</p>')

    def figures(self, figures: Iterable[Figure]) -> None:
        """A row of headline numbers."""
        self._parts.append(
            f'<div class="cards">{"".join(_card(figure) for figure in figures)}</div>'
        )

    def stages(self, stages: Mapping[str, str]) -> None:
        """Numbered steps side by side: name -> what happens in it."""
        items = [
            f"<li><b>{i}. {escape(name)}</b>{escape(text)}</li>"
            for i, (name, text) in enumerate(stages.items(), 1)
        ]
        self._parts.append(f'<ol class="stages">{"".join(items)}</ol>')

    def charts(self, charts: Iterable[str], folded: str | None = None) -> None:
        """Charts made by `framed`, in as many columns as fit; empty ones are left out. With the title `folded` they
        are hidden until it is clicked.
        """
        grid = f'<div class="charts">{"".join(charts)}</div>'
        self._parts.append(
            f"<details><summary>{escape(folded)}</summary>{grid}</details>" if folded else grid
        )

    def table(self, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """A table; numbers are right-aligned, floats with three decimals, None is "-", else text."""
        head = "".join(f"<th>{escape(name)}</th>" for name in header)
        body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
        self._parts.append(
            f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        )

    def sample(self, prompt: str, answers: Sequence[Answer]) -> None:
        """One prompt with its responses side by side."""
        columns = "".join(
            f"<div><h3>{escape(a.name)}</h3><p>{escape(a.text) or '<em>(empty)</em>'}</p>"
            + (f'<span class="score">score {a.score:.2f}</span>' if a.score is not None else "")
            + "</div>"
            for a in answers
        )
        shown = escape(prompt.strip())
        self._parts.append(
            f'<div class="sample"><div class="prompt">{shown}</div><div class="answers">{columns}</div></div>'
        )

    def details(self, title: str, text: str) -> None:
        """Preformatted text, folded until clicked."""
        self._parts.append(
            f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>"
        )

    def html(self) -> str:
        """The whole page."""
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{escape(self.title)}</title><style>{STYLE}</style></head><body><main>"
            f'<h1>{escape(self.title)}</h1><p class="lead">{escape(self.lead)}</p>{"".join(self._parts)}'
            "<footer>Written by fastrlhf.</footer></main></body></html>\n"
        )

    def write(self, path: Path) -> Path:
        """Writes the page and returns its path. The old page stays whole until the new one is complete."""
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(path.name + ".tmp")
        draft.write_text(self.html(), encoding="utf-8")
        return draft.replace(path)


def framed(
    title: str, chart: str, caption: str = "", legend: Mapping[str, int] | None = None
) -> str:
    """A chart of `charts` with its title, its caption and a legend (name -> colour index); "" for an empty chart."""
    if not chart:
        return ""
    keys = "".join(
        f'<span><i class="c{color}"></i>{escape(name)}</span>'
        for name, color in (legend or {}).items()
    )
    above = f'<div class="legend">{keys}</div>' if keys else ""
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f"<figure><h3>{escape(title)}</h3>{above}{chart}{below}</figure>"


def write_json(path: Path, results: Mapping[str, object]) -> None:
    """The numbers of a page, for programs; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def read_metrics(path: Path) -> Metrics:
    """The numeric columns of a metrics.jsonl: name -> (steps, values), without "step" and "time".

    Broken lines are skipped with a warning, see `log_lines.read_log`. Raises UserError if the file
    is missing.
    """
    if not path.is_file():
        raise UserError(f"no metrics at {path}: give the output folder of a run")
    columns: Metrics = {}
    for record in read_log(path, "step").records:
        step = float(record.pop("step"))
        for name, value in record.items():
            value = math.nan if value is None else value  # so MetricsLog writes what is not finite
            if name != "time" and isinstance(value, (int, float)) and not isinstance(value, bool):
                steps, values = columns.setdefault(name, ([], []))
                steps.append(step)
                values.append(float(value))
    return columns


def metric_charts(metrics: Metrics, names: Iterable[str] | None = None) -> list[str]:
    """One framed chart for each metric, or for those of `names` that were recorded; by default all, known ones first.

    A validation metric shares the chart of the one it validates.
    """
    known = [name for name in EXPLAINED if name in metrics]
    rest = sorted(
        name for name in metrics if name not in EXPLAINED and _validated(name) not in metrics
    )
    shown = known + rest if names is None else [name for name in names if name in metrics]
    charts = []
    for name in shown:
        title, text = EXPLAINED.get(name, (name.replace("_", " ").replace("/", ": "), ""))
        partners = [partner for prefix in _PREFIXES if (partner := prefix + name) in metrics]
        series = [
            Series(label, *metrics[label], color) for color, label in enumerate([name, *partners])
        ]
        legend = {"training": 0, "held out": 1} if partners else None
        y_label = title if title[:2].isupper() else title[0].lower() + title[1:]
        charts.append(
            framed(title, line_chart(series, "step", y_label, smooth=name != "lr"), text, legend)
        )
    return charts


def write_run_report(run_dir: str | Path) -> Path:
    """Writes `run_dir`/report.html from its metrics.jsonl and, if there, config.yaml and samples.jsonl. Raises
    UserError without metrics.
    """
    folder = Path(run_dir)
    metrics = read_metrics(folder / "metrics.jsonl")
    report = Report(
        folder.resolve().name, "Every number this training run recorded, over its steps."
    )
    if metrics:
        report.figures(_run_figures(metrics))
        averaged = "Of more than 30 values the faint line is what was recorded, the strong one its moving average."
        report.section("Curves", averaged)
        report.charts(metric_charts(metrics, [name for name in EXPLAINED if name in metrics]))
        others = [
            name
            for name in sorted(metrics)
            if name not in EXPLAINED and _validated(name) not in metrics
        ]
        if others:
            report.charts(metric_charts(metrics, others), folded="More curves")
    else:
        report.section("Curves", "Nothing has been recorded yet.")
    _run_samples(report, folder / "samples.jsonl")
    config = folder / "config.yaml"
    if config.is_file():
        report.section("Configuration")
        report.details(
            "config.yaml, every default written out",
            config.read_text(encoding="utf-8", errors="replace"),
        )
    report.section("Versions")
    report.table(("package", "version"), _versions())
    return report.write(folder / "report.html")


def try_run_report(run_dir: str | Path) -> Path | None:
    """Write the report of a run that has ended; if that fails, warn and return None."""
    try:
        return write_run_report(run_dir)
    except Exception as error:  # of the file system, or of content that a crash has damaged
        words = getattr(error, "strerror", None) or " ".join(str(error).split())
        logger.warning(
            "warning: no-report: %s cannot be written: %s",
            *(Path(run_dir) / "report.html", words or type(error).__name__),
        )
        return None


def _versions() -> list[tuple[str, str]]:
    """Of what decides a run's numbers, as installed when the page is written."""
    packages = (
        "fastrlhf",
        "torch",
        "megatron-core",
        "transformers",
        "triton",
        "flash-attn",
        "transformer-engine",
    )
    rows = [("Python", platform.python_version())]
    for package in packages:
        try:
            rows.append((package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            continue
    return rows


def _run_samples(report: Report, path: Path) -> None:
    """Add the responses of the first and the last iteration in a samples.jsonl, if there is one.

    Broken lines are skipped with a warning.
    """
    if not path.is_file():
        return
    records = [record for record in read_log(path, "iteration").records if _is_sample(record)]
    iterations = [record["iteration"] for record in records]
    for iteration in sorted({iterations[0], iterations[-1]}) if iterations else []:
        report.section(
            f"Responses of iteration {iteration}", "The score includes penalties, but not the KL."
        )
        for record in records:
            if record["iteration"] == iteration:
                ended = "" if record["stopped"] else ", cut off"
                name = f"KL {record['kl']:.2f} nats{ended}"
                report.sample(record["prompt"], [Answer(name, record["response"], record["score"])])


def _is_sample(record: Mapping[str, object]) -> bool:
    """Return whether a line of samples.jsonl has the fields of `rollouts.SampleRecord`."""
    texts = (record.get("prompt"), record.get("response"))
    numbers = (record.get("score"), record.get("kl"))
    return (
        all(isinstance(text, str) for text in texts)
        and all(isinstance(number, (int, float)) for number in numbers)
        and "stopped" in record
    )


def _run_figures(metrics: Metrics) -> list[Figure]:
    last_step = max(steps[-1] for steps, _ in metrics.values())
    figures = [Figure("Steps", f"{last_step:,.0f}")]
    headline = (
        "loss",
        "accuracy",
        "score",
        "kl",
        *(p + n for p in _PREFIXES for n in ("loss", "accuracy")),
    )
    for name in headline:
        if name in metrics:
            values = metrics[name][1]
            label = EXPLAINED.get(_validated(name) or name, (name, ""))[0] + (
                ", held out" if _validated(name) else ""
            )
            figures.append(
                Figure(f"{label}, at the end", f"{values[-1]:.4g}", f"{values[0]:.4g} at the start")
            )
    if "seconds" in metrics:
        figures.append(
            Figure(
                "Time a step",
                f"{sorted(metrics['seconds'][1])[len(metrics['seconds'][1]) // 2]:.3g} s",
                "median",
            )
        )
    broken = sum(not math.isfinite(value) for _, values in metrics.values() for value in values)
    if broken:
        figures.append(Figure("Values not finite", str(broken), "gaps in the curves below"))
    return figures


def _validated(name: str) -> str | None:
    """The metric that a held-out one belongs to: "valid_loss" -> "loss"; None for any other."""
    return next(
        (name.removeprefix(prefix) for prefix in _PREFIXES if name.startswith(prefix)), None
    )


def _card(figure: Figure) -> str:
    badge = ""
    if figure.passed is not None:
        kind, word = ("good", "reached") if figure.passed else ("bad", "missed")
        badge = f'<div class="badge {kind}">{word}</div>'
    detail = f'<div class="detail">{escape(figure.detail)}</div>' if figure.detail else ""
    return (
        f'<div class="card"><div class="label">{escape(figure.label)}</div>'
        f'<div class="value">{escape(figure.value)}</div>{detail}{badge}</div>'
    )


def _cell(value: object) -> str:
    value = "-" if value is None else value
    if isinstance(value, int):
        return f'<td class="numeric">{value:,d}</td>'
    if isinstance(value, float):
        return (
            f'<td class="numeric">{value:.3f}</td>'
            if abs(value) < 100
            else f'<td class="numeric">{value:,.1f}</td>'
        )
    return f"<td>{escape(str(value))}</td>"
