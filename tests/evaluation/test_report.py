"""Reports are self-contained, well-formed and escaped, also for interrupted runs."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from fastrlhf.errors import UserError
from fastrlhf.evaluation.page import Answer, Headline, Report, chart_figure
from fastrlhf.evaluation.report import metric_charts, read_metrics, write_run_report

VOID = {"meta", "br", "hr", "img", "link", "input"}


class Balanced(HTMLParser):
    """A parser that checks that elements are closed in order, and collects texts and attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes.extend(attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes.extend(attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def parse(html: str) -> Balanced:
    page = Balanced()
    page.feed(html)
    page.close()
    assert page.open == []
    return page


def assert_self_contained(html: str) -> None:
    page = parse(html)
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert not {"src", "href"} & {name for name, _ in page.attributes}
    assert not re.search(r"@import|url\(|https?:", html)


def run_folder(path: Path, lines: list[str]) -> Path:
    path.mkdir(exist_ok=True)
    (path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return path


def line(step: int, **metrics: float) -> str:
    return json.dumps({"step": step, "time": 1.0, **metrics})


def test_a_run_report_shows_every_metric_and_the_configuration(tmp_path: Path) -> None:
    lines = [
        line(
            s, loss=5.0 / s, lr=0.1, my_number=s, **({"valid_loss": 6.0 / s} if s % 5 == 0 else {})
        )
        for s in range(1, 51)
    ]
    folder = run_folder(tmp_path / "sft", lines)
    (folder / "config.yaml").write_text("model:\n  load: <none>\n")
    path = write_run_report(folder)
    assert path == folder / "report.html"
    html = path.read_text(encoding="utf-8")
    assert_self_contained(html)
    page = parse(html)
    assert page.tags.count("figure") == 3  # loss with its held-out twin, lr, my_number
    for text in (
        "sft",
        "Loss",
        "Learning rate",
        "my number",
        "held out",
        "model:\n  load: <none>\n",
    ):
        assert text in page.texts
    assert "0.1" in page.texts and "0.12" in page.texts  # last loss, last held-out loss
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.yaml",
        "metrics.jsonl",
        "report.html",
    ]


def test_light_and_dark() -> None:
    html = Report("x").html()
    assert "prefers-color-scheme: dark" in html
    assert "color-scheme: light dark" in html


def test_read_metrics_columns(tmp_path: Path) -> None:
    folder = run_folder(
        tmp_path,
        [
            line(1, loss=2.0),
            line(2, loss=1.0, accuracy=0.5),
            '{"step": 3, "note": "text", "ok": true}',
        ],
    )
    assert read_metrics(folder / "metrics.jsonl") == {
        "loss": ([1, 2], [2.0, 1.0]),
        "accuracy": ([2], [0.5]),
    }


def test_an_incomplete_last_line_is_skipped(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, [line(1, loss=2.0), '{"step": 2, "lo'])
    assert read_metrics(folder / "metrics.jsonl") == {"loss": ([1], [2.0])}


@pytest.mark.parametrize("broken", ["{not json", "[1, 2]", '{"loss": 1.0}', '{"step": null}', "3"])
def test_a_malformed_line_is_named_and_skipped(
    tmp_path: Path, broken: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = run_folder(tmp_path, [line(1, loss=2.0), broken, line(3, loss=1.0)])
    assert read_metrics(folder / "metrics.jsonl")["loss"] == ([1, 3], [2.0, 1.0])
    assert "metrics.jsonl:2" in caplog.text


def test_missing_metrics_raise_user_error(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"nowhere/metrics\.jsonl: no such file; expected the metrics"
    ):
        write_run_report(tmp_path / "nowhere")


def test_a_run_without_metrics_has_a_report(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    page = parse(write_run_report(tmp_path).read_text())
    assert "No metrics have been recorded yet." in page.texts


def test_values_that_are_not_finite_are_counted_not_drawn(tmp_path: Path) -> None:
    folder = run_folder(
        tmp_path, [line(1, loss=2.0), line(2, loss=None), line(3, loss=math.inf), line(4, loss=1.0)]
    )
    page = parse(write_run_report(folder).read_text())
    assert "Non-finite values" in page.texts
    assert page.texts[page.texts.index("Non-finite values") + 1] == "2"


def test_known_metrics_come_first_and_names_select() -> None:
    metrics = {"zebra": ([1.0], [1.0]), "lr": ([1.0], [1.0]), "loss": ([1.0], [1.0])}
    titles = [re.search("<h3>(.*?)</h3>", chart).group(1) for chart in metric_charts(metrics)]
    assert titles == ["Loss", "Learning rate", "zebra"]
    assert len(metric_charts(metrics, ["lr", "missing"])) == 1


def test_a_runs_unknown_metrics_are_folded_and_versions_shown(tmp_path: Path) -> None:
    folder = run_folder(
        tmp_path, [line(1, loss=2.0, valid_loss=2.5, zebra=1.0), line(2, loss=1.0, zebra=2.0)]
    )
    html = write_run_report(folder).read_text()
    main, folded = html.split("<details><summary>More curves</summary>")
    assert "<h3>Loss</h3>" in main and "held out" in main and "zebra" not in main
    assert "<h3>zebra</h3>" in folded and "valid" not in folded
    rows = parse(html).texts
    assert rows[rows.index("torch") + 1] == torch.__version__


def test_everything_from_data_is_escaped() -> None:
    evil = "<script>alert('x')</script>&"
    report = Report(evil, evil)
    report.section(evil, evil)
    report.note(evil)
    report.headlines([Headline(evil, evil, evil, True)])
    report.stages({evil: evil})
    report.table([evil], [[evil]])
    report.sample(evil, [Answer(evil, evil, 0.5), Answer("empty", "")])
    report.details(evil, evil)
    report.charts([chart_figure(evil, "<svg></svg>", evil, {evil: 1})])
    html = report.html()
    page = parse(html)
    assert "script" not in page.tags
    report.charts([], folded=evil)
    page = parse(report.html())
    assert sum(evil in text for text in page.texts) >= 17


def test_cells_by_type() -> None:
    report = Report("t")
    report.table(["a", "b", "c", "d"], [["x", 1234, 0.12345, 1234.56]])
    assert {"x", "1,234", "0.123", "1,234.6"} <= set(parse(report.html()).texts)


def test_badges() -> None:
    report = Report("t")
    report.headlines(
        [Headline("a", "1", passed=True), Headline("b", "2", passed=False), Headline("c", "3")]
    )
    texts = parse(report.html()).texts
    assert texts.count("reached") == 1 and texts.count("missed") == 1


def test_writing_replaces_the_old_page(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "report.html"
    Report("one").write(path)
    Report("two").write(path)
    assert "<h1>two</h1>" in path.read_text()
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
