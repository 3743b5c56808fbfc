"""Results that are written: CSV columns, tables, plots, and the ratios of cpu-targets."""

from __future__ import annotations

import csv
import dataclasses
import io

import pytest
import torch
from rich.console import Console

from bench import __main__ as command
from bench import cpu_targets, results
from bench.results import COLUMNS, Row

ROW = Row(
    op="logprobs",
    mode="fwd",
    provider="fastrlhf[cpu]",
    kind="ours",
    shape="4x9",
    dtype="float32",
    device="a CPU",
    threads=2,
    torch="2.13.0",
    triton="",
    python="3.11",
    provider_version="0.1",
    commit="abc",
    dirty="no",
    time="now",
    status="ok",
    clock="wall",
    median_ms=1.5,
    p20_ms=1.25,
    p80_ms=2.0,
    samples=7,
    gb_per_s=3.0,
    tflop_per_s=0.0,
    pct_sol=50.0,
    copy_gb_s=6.0,
    matmul_tflop_s=0.1,
    peak_extra_mb=0.25,
    load=1.0,
)


def rival(**changes) -> Row:
    return dataclasses.replace(ROW, provider="eager", kind="rival", **changes)


def test_columns_name_everything_that_a_time_depends_on(tmp_path):
    path = tmp_path / "new/kernels.csv"
    results.append_csv(path, [ROW])
    results.append_csv(
        path, [rival(status="not installed", note="No module, alas", median_ms=None, samples=0)]
    )
    header, first, second = csv.reader(path.open())
    assert tuple(header) == COLUMNS
    keys = {
        "op",
        "provider",
        "provider_version",
        "shape",
        "dtype",
        "device",
        "threads",
        "torch",
        "triton",
        "commit",
    }
    assert keys | {
        "median_ms",
        "p20_ms",
        "p80_ms",
        "pct_sol",
        "peak_extra_mb",
        "load",
        "clock",
    } <= set(header)
    assert first[header.index("median_ms")] == "1.5" and second[header.index("median_ms")] == ""
    assert results.read_csv(path)[0] == ROW
    assert results.read_csv(path)[1].note == "No module, alas"


def test_a_file_of_other_columns_is_left_alone(tmp_path):
    path = tmp_path / "kernels.csv"
    path.write_text("op,milliseconds\n")
    with pytest.raises(ValueError, match="columns are those of another version"):
        results.append_csv(path, [ROW])
    assert path.read_text() == "op,milliseconds\n"


def test_the_last_measurement_counts():
    again = dataclasses.replace(ROW, median_ms=1.0, time="later")
    assert results.latest([ROW, rival(), again]) == [rival(), again]


def test_numbers_as_text():
    text = results.text_of
    assert [text(v) for v in (None, 0.0, 1.23456, 0.0123456, 98.76, 12345.6)] == [
        "",
        "0",
        "1.23",
        "0.0123",
        "98.8",
        "12346",
    ]


def test_table_and_plot(tmp_path):
    out = io.StringIO()
    gone = dataclasses.replace(
        rival(), provider="quack", status="not installed", note="no quack", median_ms=None
    )
    results.print_table([rival(median_ms=3.0), ROW, gone], Console(file=out, width=150))
    text = out.getvalue()
    assert text.index("fastrlhf[cpu]") < text.index("eager")  # the fastest first
    assert "quack: not installed: no quack  [logprobs]" in text
    summary = text[text.index("ours and the fastest other") :]
    assert "2.00" in summary  # 3 ms / 1.5 ms
    assert results.plot([ROW, rival()], tmp_path / "plots/kernels.svg")
    assert "fastrlhf[cpu]" in (tmp_path / "plots/kernels.svg").read_text()
    assert not results.plot([gone], tmp_path / "none.svg")


def target(**options):
    base = {
        "op": "logprobs_entropy",
        "shape": (4, 9),
        "quick": (4, 9),
        "dtype": torch.float32,
        "against": ("eager", "x"),
    }
    return cpu_targets.Target(**(base | options))


def test_targets_are_held_against_the_fastest():
    rows = [ROW, rival(median_ms=15.0, p20_ms=12.5, p80_ms=30.0)]
    rows += [dataclasses.replace(rows[1], provider="x", median_ms=9.0)]
    eager, other = cpu_targets.judge(target(at_least=8), rows)
    assert (eager.versus, eager.ratio, eager.low, eager.high, eager.reached) == (
        "eager",
        10.0,
        6.25,
        24.0,
        "",
    )
    assert (other.versus, other.ratio, other.target, other.reached) == ("x", 6.0, ">= 8x", "no")
    (eager,) = cpu_targets.judge(target(at_least=8), rows[:2])
    assert eager.reached == "yes"
    (gemms,) = cpu_targets.judge(
        target(at_most=1.10, against=("eager",)), [ROW, rival(median_ms=1.4)]
    )
    assert gemms.ratio == pytest.approx(1.5 / 1.4) and gemms.reached == "yes"
    (gemms,) = cpu_targets.judge(
        target(at_most=1.10, against=("eager",)), [ROW, rival(median_ms=1.3)]
    )
    assert gemms.reached == "no"


def test_memory_target_allows_one_buffer():
    buffer_mb = 2048 * 50257 * 4 / 1e6
    for extra, reached in ((buffer_mb, "yes"), (buffer_mb * 1.01, "no")):
        ours = dataclasses.replace(ROW, shape="2048x50257", peak_extra_mb=extra)
        memory = cpu_targets.judge(target(at_least=8, memory=True), [ours, rival(median_ms=20.0)])[
            -1
        ]
        assert (memory.measured, memory.reached) == ("fastrlhf[cpu], peak extra memory", reached)


def test_nothing_of_ours_is_not_reached():
    (outcome,) = cpu_targets.judge(target(at_least=8), [rival()])
    assert outcome.reached == "no" and outcome.ratio is None
    assert "| no |" in cpu_targets.table([outcome])


def test_the_commands(tmp_path, capsys):
    out = ["--out", str(tmp_path)]
    assert (
        command.main(["gae", "--quick", "--device", "cpu", "--providers", "fastrlhf[torch]", *out])
        == 0
    )
    assert command.main(["report", "--device", "cpu", *out]) == 0
    assert command.main(["cpu-targets", "pairwise_ranking_loss", "--quick", *out]) == 0
    printed = capsys.readouterr().out
    assert "limits here: copy" in printed and "| pairwise_ranking_loss | 8x9 | float32 |" in printed
    assert {"kernels.csv", "kernels.svg", "targets.csv", "targets.md"} <= {
        p.name for p in tmp_path.iterdir()
    }
    assert {r.op for r in results.read_csv(tmp_path / "kernels.csv")} == {
        "gae",
        "pairwise_ranking_loss",
    }


@pytest.mark.parametrize("words", [["gea"], ["cpu-targets", "gea"], ["gae", "--shapes", "3x"]])
def test_mistakes_exit_2(words, capsys):
    with pytest.raises(SystemExit) as caught:
        command.main(words)
    assert caught.value.code == 2
    assert "error:" in capsys.readouterr().err
