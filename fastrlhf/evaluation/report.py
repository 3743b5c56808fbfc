"""Self-contained HTML reports: headline numbers, charts, tables and responses in one file.

A report fetches nothing. `Report` is built section by section. `write_run_report` writes the report
of a training run from its metrics.jsonl, config.yaml and samples.jsonl. All text from data is
escaped.
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
from fastrlhf.evaluation.metric_info import METRIC_INFO
from fastrlhf.evaluation.style import STYLE
from fastrlhf.log_lines import read_log

logger = logging.getLogger(__name__)

Metrics = dict[str, tuple[list[float], list[float]]]  # name -> (steps, values)

_PREFIXES = ("valid_", "valid/", "eval_", "eval/")


@dataclass(frozen=True)
class Headline:
    """One headline number."""

    label: str
    value: str
    detail: str = ""
    passed: bool | None = None
    """A badge: reached (True), missed (False), or none (None)."""


@dataclass(frozen=True)
class Answer:
    """One response of a sample."""

    name: str
    """Name of the model that wrote it, such as "SFT" or "PPO-ptx"."""
    text: str
    score: float | None = None


@dataclass
class Report:
    """An HTML page that is built from top to bottom: every method appends to it."""

    title: str
    lead: str = ""
    _parts: list[str] = field(default_factory=list)

    def section(self, title: str, *paragraphs: str) -> None:
        """Append a heading and plain-text paragraphs."""
        self._parts.append(f"<h2>{escape(title)}</h2>")
        self._parts.extend(f"<p>{escape(paragraph)}</p>" for paragraph in paragraphs)

    def note(self, text: str) -> None:
        """Append a remark in small type."""
        self._parts.append(f'<p class="note">{escape(text)}</p>')

    def headlines(self, headlines: Iterable[Headline]) -> None:
        """Append a row of headline numbers."""
        self._parts.append(
            f'<div class="cards">{"".join(_card(headline) for headline in headlines)}</div>'
        )

    def stages(self, stages: Mapping[str, str]) -> None:
        """Append a row of numbered steps: name -> description."""
        items = [
            f"<li><b>{i}. {escape(name)}</b>{escape(text)}</li>"
            for i, (name, text) in enumerate(stages.items(), 1)
        ]
        self._parts.append(f'<ol class="stages">{"".join(items)}</ol>')

    def charts(self, charts: Iterable[str], folded: str | None = None) -> None:
        """Append charts made by `chart_figure`, in as many columns as fit; empty ones are skipped.

        If the title `folded` is given, the charts are hidden until it is clicked.
        """
        grid = f'<div class="charts">{"".join(charts)}</div>'
        self._parts.append(
            f"<details><summary>{escape(folded)}</summary>{grid}</details>" if folded else grid
        )

    def table(self, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """Append a table; numbers are right-aligned, floats have three decimals."""
        head = "".join(f"<th>{escape(name)}</th>" for name in header)
        body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        self._parts.append(f'<div class="wide">{table}</div>')

    def sample(self, prompt: str, answers: Sequence[Answer]) -> None:
        """Append a prompt with its responses in columns."""
        columns = "".join(
            f"<div><h3>{escape(a.name)}</h3><p>{escape(a.text) or '<em>(empty)</em>'}</p>"
            + (f'<span class="score">score {a.score:.2f}</span>' if a.score is not None else "")
            + "</div>"
            for a in answers
        )
        self._parts.append(
            f'<div class="sample"><div class="prompt">{escape(prompt.strip())}</div>'
            f'<div class="answers">{columns}</div></div>'
        )

    def details(self, title: str, text: str) -> None:
        """Append preformatted text that is folded until clicked."""
        self._parts.append(
            f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>"
        )

    def html(self) -> str:
        """Return the page."""
        title, lead = escape(self.title), escape(self.lead)
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{title}</title><style>{STYLE}</style></head><body><main>"
            f'<h1>{title}</h1><p class="lead">{lead}</p>{"".join(self._parts)}'
            "<footer>Written by fastrlhf.</footer></main></body></html>\n"
        )

    def write(self, path: Path) -> Path:
        """Write the page atomically and return its path."""
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(path.name + ".tmp")
        draft.write_text(self.html(), encoding="utf-8")
        return draft.replace(path)


def chart_figure(
    title: str, chart: str, caption: str = "", legend: Mapping[str, int] | None = None
) -> str:
    """Return a chart with a title, a caption and a legend; "" for an empty chart.

    `chart` is an SVG of charts.py; `legend` maps names to colour indices.
    """
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
    """Write the numbers of a page as JSON, and create the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def read_metrics(path: Path) -> Metrics:
    """Return the numeric columns of a metrics.jsonl: name -> (steps, values).

    "step" and "time" are not columns. Malformed lines are skipped with a warning, see
    `log_lines.read_log`. Raises UserError if the file is missing.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected the metrics of a run in its output folder")
    columns: Metrics = {}
    for record in read_log(path, "step").records:
        step = float(record.pop("step"))
        for name, value in record.items():
            value = math.nan if value is None else value  # MetricsLog writes non-finite values so
            if name != "time" and isinstance(value, (int, float)) and not isinstance(value, bool):
                steps, values = columns.setdefault(name, ([], []))
                steps.append(step)
                values.append(float(value))
    return columns


def metric_charts(metrics: Metrics, names: Iterable[str] | None = None) -> list[str]:
    """Return one titled chart for each metric, or for each of `names` that was recorded.

    By default all are shown, known ones first. A validation metric shares the chart of its training
    metric.
    """
    if names is None:
        names = _known(metrics) + _unknown(metrics)
    shown = [name for name in names if name in metrics]
    charts = []
    for name in shown:
        title, text = METRIC_INFO.get(name, (name.replace("_", " ").replace("/", ": "), ""))
        partners = [partner for prefix in _PREFIXES if (partner := prefix + name) in metrics]
        series = [
            Series(label, *metrics[label], color) for color, label in enumerate([name, *partners])
        ]
        legend = {"training": 0, "held out": 1} if partners else None
        y_label = title if title[:2].isupper() else title[0].lower() + title[1:]
        charts.append(
            chart_figure(
                title, line_chart(series, "step", y_label, smooth=name != "lr"), text, legend
            )
        )
    return charts


def write_run_report(run_dir: str | Path) -> Path:
    """Write `run_dir`/report.html from its metrics.jsonl; return its path.

    config.yaml and samples.jsonl are used if they exist. Raises UserError if there are no metrics.
    """
    folder = Path(run_dir)
    metrics = read_metrics(folder / "metrics.jsonl")
    report = Report(folder.resolve().name, "The recorded metrics of this training run.")
    if metrics:
        report.headlines(_run_headlines(metrics))
        report.section(
            "Curves",
            "With more than 30 points, the faint line shows the raw values and the bold line their "
            "moving average.",
        )
        report.charts(metric_charts(metrics, _known(metrics)))
        if others := _unknown(metrics):
            report.charts(metric_charts(metrics, others), folded="More curves")
    else:
        report.section("Curves", "No metrics have been recorded yet.")
    _run_samples(report, folder / "samples.jsonl")
    config = folder / "config.yaml"
    if config.is_file():
        report.section("Configuration")
        report.details(
            "config.yaml with all defaults", config.read_text(encoding="utf-8", errors="replace")
        )
    report.section("Versions")
    report.table(("package", "version"), _versions())
    return report.write(folder / "report.html")


def try_run_report(run_dir: str | Path) -> Path | None:
    """Write the report of a run that has ended; a failure is a warning, and the result is None.

    A page must not change the exit status of a training.
    """
    try:
        return write_run_report(run_dir)
    except Exception as error:  # of the file system, or of content that a crash has damaged
        words = getattr(error, "strerror", None) or " ".join(str(error).split())
        logger.warning(
            "warning: no-report: %s cannot be written: %s",
            *(Path(run_dir) / "report.html", words or type(error).__name__),
        )
        return None


def _known(metrics: Metrics) -> list[str]:
    return [name for name in METRIC_INFO if name in metrics]


def _unknown(metrics: Metrics) -> list[str]:
    """Return the metrics without an explanation or a training metric whose chart they share."""
    return sorted(
        name
        for name in metrics
        if name not in METRIC_INFO and _training_metric(name) not in metrics
    )


def _versions() -> list[tuple[str, str]]:
    """Return the installed versions of Python and of the packages that affect a run's numbers."""
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
    """Append the responses of the first and the last iteration of a samples.jsonl, if it exists.

    Malformed lines are skipped with a warning.
    """
    if not path.is_file():
        return
    records = [record for record in read_log(path, "iteration").records if _is_sample(record)]
    iterations = [record["iteration"] for record in records]
    for iteration in sorted({iterations[0], iterations[-1]}) if iterations else []:
        report.section(
            f"Responses of iteration {iteration}",
            "The score includes penalties, but not the KL penalty.",
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


def _run_headlines(metrics: Metrics) -> list[Headline]:
    last_step = max(steps[-1] for steps, _ in metrics.values())
    headlines = [Headline("Steps", f"{last_step:,.0f}")]
    headline = (
        "loss",
        "accuracy",
        "score",
        "kl",
        *(p + n for p in _PREFIXES for n in ("loss", "accuracy")),
    )
    for name in headline:
        if name in metrics:
            values, training = metrics[name][1], _training_metric(name)
            label = METRIC_INFO.get(training or name, (name, ""))[0]
            label += ", held out" if training else ""
            headlines.append(
                Headline(
                    f"{label}, at the end", f"{values[-1]:.4g}", f"{values[0]:.4g} at the start"
                )
            )
    if "seconds" in metrics:
        seconds = sorted(metrics["seconds"][1])
        headlines.append(Headline("Time per step", f"{seconds[len(seconds) // 2]:.3g} s", "median"))
    broken = sum(not math.isfinite(value) for _, values in metrics.values() for value in values)
    if broken:
        headlines.append(Headline("Non-finite values", str(broken), "gaps in the curves below"))
    return headlines


def _training_metric(name: str) -> str | None:
    """Return the training metric of a held-out one: "valid_loss" -> "loss"; None for any other."""
    return next(
        (name.removeprefix(prefix) for prefix in _PREFIXES if name.startswith(prefix)), None
    )


def _card(headline: Headline) -> str:
    badge = ""
    if headline.passed is not None:
        kind, word = ("good", "reached") if headline.passed else ("bad", "missed")
        badge = f'<div class="badge {kind}">{word}</div>'
    detail = f'<div class="detail">{escape(headline.detail)}</div>' if headline.detail else ""
    return (
        f'<div class="card"><div class="label">{escape(headline.label)}</div>'
        f'<div class="value">{escape(headline.value)}</div>{detail}{badge}</div>'
    )


def _cell(value: object) -> str:
    if isinstance(value, int):
        return f'<td class="numeric">{value:,d}</td>'
    if isinstance(value, float):
        number = f"{value:.3f}" if abs(value) < 100 else f"{value:,.1f}"
        return f'<td class="numeric">{number}</td>'
    return f"<td>{escape(str(value))}</td>"
