"""The HTML page of a plan: memory of each phase as stacked bars, and the time of a step."""

from __future__ import annotations

from pathlib import Path

from fastrlhf.evaluation.charts import Bar, bar_chart, stacked_chart
from fastrlhf.evaluation.page import Headline, Report, chart_figure
from fastrlhf.plan.hardware import GIB
from fastrlhf.plan.planner import Plan

_COLORS = 6
"""Colours of the style sheet."""


def write_page(plan: Plan, path: Path, title: str) -> Path:
    """Write the page of `plan` and return its path."""
    report = Report(title, f"{plan.gpus} GPUs of {plan.gpu.memory_gib:.0f} GiB: {plan.binding}.")
    seconds = plan.seconds["iteration"]
    report.headlines(
        [
            Headline("fits", "yes" if plan.fits else "no", passed=plan.fits),
            Headline("seconds a step", f"{seconds['mid']:.3g}", _range(seconds)),
            Headline("compute", f"{plan.pflops_days:.3g} PF/s-days", f"{plan.tokens:.3g} tokens"),
        ]
    )
    report.section("Memory", "GiB of tensors at the peak of each phase, by kind of rank.")
    names = dict.fromkeys(n for r in plan.ranks for parts in r.parts.values() for n in parts)
    colors = {name: i % _COLORS for i, name in enumerate(names)}
    limit = (plan.limit / GIB, "what tensors may take")
    for rank in plan.ranks:
        rows = {
            phase: {name: size / GIB for name, size in parts.items()}
            for phase, parts in rank.parts.items()
        }
        chart = stacked_chart(rows, colors, limit=limit)
        report.charts([chart_figure(f"{rank.kind} stage", chart, legend=colors)])
    report.section("Time", "Seconds of each phase of a step; whiskers from low to high.")
    bars = [
        Bar(phase, values["mid"], values["low"], values["high"])
        for phase, values in plan.seconds.items()
    ]
    report.charts([chart_figure("a step", bar_chart(bars, digits=1))])
    if plan.notes:
        report.section("Assumptions", *plan.notes)
    return report.write(path)


def _range(values: dict[str, float]) -> str:
    return f"{values['low']:.3g} to {values['high']:.3g}"
