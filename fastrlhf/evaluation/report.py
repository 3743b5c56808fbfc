"""The report of a training run, from its metrics.jsonl, config.yaml and samples.jsonl."""

from __future__ import annotations

import importlib.metadata
import logging
import math
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path

from fastrlhf.errors import UserError
from fastrlhf.evaluation.charts import Series, line_chart
from fastrlhf.evaluation.metric_info import METRIC_INFO
from fastrlhf.evaluation.page import Answer, Headline, Report, chart_figure
from fastrlhf.log_lines import read_log

logger = logging.getLogger(__name__)

Metrics = dict[str, tuple[list[float], list[float]]]  # name -> (steps, values)

_PREFIXES = ("valid_", "valid/", "eval_", "eval/")


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
