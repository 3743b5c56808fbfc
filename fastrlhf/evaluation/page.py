"""Self-contained HTML pages: headline numbers, charts, tables and responses in one file.

A page fetches nothing, and all text from data is escaped. `Report` is built section by section.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from fastrlhf.evaluation.style import STYLE


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
        """Append a table; numbers are right-aligned, floats have three decimals, None is "-"."""
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
    if value is None:
        return '<td class="numeric">-</td>'
    if isinstance(value, int):
        return f'<td class="numeric">{value:,d}</td>'
    if isinstance(value, float):
        number = f"{value:.3f}" if abs(value) < 100 else f"{value:,.1f}"
        return f'<td class="numeric">{number}</td>'
    return f"<td>{escape(str(value))}</td>"
