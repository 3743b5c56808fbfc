"""Results as rows of a CSV file, as tables in the terminal, and as plots."""

from __future__ import annotations

import csv
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.markup import escape
from rich.table import Table

CSV_NAME = "kernels.csv"
PLOT_NAME = "kernels.svg"


@dataclass(frozen=True)
class Row:
    """One provider of one case on one clock, keyed by everything its time may depend on."""

    op: str
    mode: str
    provider: str
    kind: str
    shape: str
    dtype: str
    device: str
    threads: int
    torch: str
    triton: str
    python: str
    provider_version: str
    commit: str
    dirty: str
    """whether the code had changes that the commit does not hold"""
    time: str
    status: str
    """ "ok"; "wrong", "failed" (not timed); "not installed", "not for this device", "skipped" """
    note: str = ""
    clock: str = ""
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    samples: int = 0
    gb_per_s: float | None = None
    """of the least bytes that the op must move"""
    tflop_per_s: float | None = None
    """of the matrix products that the op must do"""
    pct_sol: float | None = None
    """floor / median: the floor at the limits measured in the same run (the two columns that
    follow)"""
    copy_gb_s: float | None = None
    matmul_tflop_s: float | None = None
    peak_extra_mb: float | None = None
    """most memory held at a time beyond the inputs, 10^6 bytes"""
    load: float | None = None
    """runnable processes, one-minute mean"""
    sm_clock_mhz: str = ""
    """before-after"""


COLUMNS = tuple(f.name for f in dataclasses.fields(Row))
RowT = TypeVar("RowT", bound=Row)


def append_csv(path: Path, rows: Sequence[Row]) -> None:
    """Add rows of one class to a CSV file.

    Called after each case, so that a killed run keeps its results.
    """
    columns = tuple(f.name for f in dataclasses.fields(rows[0])) if rows else COLUMNS
    append_table(path, columns, [dataclasses.asdict(row) for row in rows])


def append_table(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Add the `columns` of rows to a CSV file, with a header if the file is new.

    Raises ValueError if the file has other columns.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists()
    if not fresh:
        with path.open(newline="") as file:
            found = tuple(next(csv.reader(file), ()))
        if found != tuple(columns):
            raise ValueError(
                f"{path}: its columns are those of another version; move it away or pass another"
                " --out"
            )
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        if fresh:
            writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})


def read_csv(path: Path, kind: type[RowT] = Row) -> list[RowT]:  # type: ignore[assignment]
    numbers = {f.name for f in dataclasses.fields(kind) if str(f.type).startswith(("float", "int"))}
    with path.open(newline="") as file:
        lines = [
            {k: _parse(k, v) if k in numbers else v for k, v in line.items()}
            for line in csv.DictReader(file)
        ]
    return [kind(**line) for line in lines]  # type: ignore[arg-type]


def _parse(column: str, text: str) -> float | int | None:
    if column in ("samples", "threads"):
        return int(text)
    return float(text) if text else None


def latest(rows: Sequence[Row]) -> list[Row]:
    """Return the last measurement of each case, provider and clock of a file."""
    kept: dict[tuple[str, ...], Row] = {}
    for row in rows:
        key = (row.op, row.mode, row.provider, row.shape, row.dtype, row.device, row.clock)
        kept.pop(key, None)
        kept[key] = row
    return list(kept.values())


def text_of(value: float | None, digits: int = 3) -> str:
    """Format a number with `digits` significant digits, never in powers of ten; "" for None.

    Examples: "0.0123", "1.23", "12345".
    """
    if value is None:
        return ""
    if value == 0 or abs(value) >= 10**digits:
        return f"{value:.0f}"
    decimals = digits - 1 - math.floor(math.log10(abs(value)))
    return f"{value:.{min(decimals, 6)}f}"


def cases_of(rows: Sequence[Row]) -> dict[tuple[str, str, str, str], list[Row]]:
    """Return rows by (op, mode, shape, dtype), fastest first, those without a time last."""
    cases: dict[tuple[str, str, str, str], list[Row]] = {}
    for row in rows:
        cases.setdefault((row.op, row.mode, row.shape, row.dtype), []).append(row)
    for group in cases.values():
        group.sort(key=lambda r: (r.clock, r.median_ms is None, r.median_ms or 0.0))
    return cases


def _one_provider(row: Row, by_clock: dict[str, Row], clocks: Sequence[str]) -> list[str]:
    cells = [escape(row.provider)]
    for clock in clocks:
        r = by_clock.get(clock)
        cells.append(
            f"{text_of(r.median_ms, 4)} ({text_of(r.p20_ms)}-{text_of(r.p80_ms)})" if r else ""
        )
    rate = text_of(row.tflop_per_s) if row.tflop_per_s else ""
    return [
        *cells,
        text_of(row.gb_per_s),
        rate,
        text_of(row.pct_sol),
        text_of(row.peak_extra_mb),
        str(row.samples),
    ]


def print_case(case: str, rows: Sequence[Row], console: Console) -> None:
    """Print one line per provider, fastest first; rates are those of the first clock."""
    clocks = sorted({r.clock for r in rows}, key=("cold", "hot", "wall").index)
    table = Table(
        title=case,
        title_justify="left",
        title_style="bold",
        box=None,
        padding=(0, 1),
        pad_edge=False,
    )
    table.add_column("provider", no_wrap=True)
    for name in (
        *(f"{c} ms (p20-p80)" for c in clocks),
        "GB/s",
        "TFLOP/s",
        "% limit",
        "extra MB",
        "n",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        if row.clock == clocks[0]:
            mine = {r.clock: r for r in rows if r.provider == row.provider}
            style = {"ours": "green", "rival": "", "floor": "dim"}[row.kind]
            table.add_row(*_one_provider(row, mine, clocks), style=style)
    console.print(table)


def print_table(rows: Sequence[Row], console: Console) -> None:
    """Print each case, then the providers that were not timed, then ours and the best rival."""
    others: dict[str, list[str]] = {}
    summary = Table(
        title="ours and the fastest other", title_justify="left", title_style="bold", box=None
    )
    for name in (
        "case",
        "ours",
        "ms",
        "% limit",
        "fastest other",
        "ms",
        "times faster",
        "GEMMs ms",
    ):
        summary.add_column(
            name,
            justify="left" if name in ("case", "ours", "fastest other") else "right",
            no_wrap=True,
        )
    for key, group in cases_of(rows).items():
        case = " ".join(key)
        timed = [r for r in group if r.median_ms is not None]
        for row in group:
            if row.median_ms is None:
                others.setdefault(f"{row.provider}: {row.status}: {row.note}", []).append(row.op)
        if timed:
            print_case(case, timed, console)
            summary.add_row(case, *_summary(timed))
    for what, where in others.items():
        console.print(f"{what}  [{', '.join(dict.fromkeys(where))}]", markup=False, highlight=False)
    console.print(summary)


def _summary(timed: Sequence[Row]) -> list[str]:
    """Return the cells of one case; rows come fastest first, the cold clock before the others."""
    best = {
        kind: next((r for r in timed if r.kind == kind), None)
        for kind in ("ours", "rival", "floor")
    }
    ours, rival, floor = best["ours"], best["rival"], best["floor"]
    mine = (
        [escape(ours.provider), text_of(ours.median_ms, 4), text_of(ours.pct_sol)]
        if ours
        else [""] * 3
    )
    theirs = [escape(rival.provider), text_of(rival.median_ms, 4)] if rival else [""] * 2
    both = ours and rival and ours.median_ms and rival.median_ms
    times = text_of(rival.median_ms / ours.median_ms) if both else ""  # type: ignore[union-attr,operator]
    return [*mine, *theirs, times, text_of(floor.median_ms, 4) if floor else ""]


def plot(rows: Sequence[Row], path: Path) -> bool:
    """Plot one bar per provider and case with its p20-p80 range; False if nothing is plotted."""
    from matplotlib.figure import Figure

    clock = "cold" if any(r.clock == "cold" for r in rows) else "wall"
    timed = [r for r in rows if r.median_ms is not None and r.clock == clock]
    cases = cases_of(timed)
    if not cases:
        return False
    columns = min(3, len(cases))
    lines = -(-len(cases) // columns)
    tallest = max(len(g) for g in cases.values())
    figure = Figure(figsize=(6.4 * columns, (0.9 + 0.32 * tallest) * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axis, ((op, mode, shape, dtype), group) in zip(axes, cases.items(), strict=False):
        colors = {"ours": "#0b6e4f", "rival": "#9aa5b1", "floor": "#e0c46c"}
        medians = [r.median_ms or 0.0 for r in group]
        low = [m - (r.p20_ms or m) for m, r in zip(medians, group, strict=True)]
        high = [(r.p80_ms or m) - m for m, r in zip(medians, group, strict=True)]
        names = [r.provider for r in group]
        axis.barh(
            names, medians, xerr=(low, high), color=[colors[r.kind] for r in group], capsize=2
        )
        for at, row in enumerate(group):
            label = f" {text_of(row.median_ms)} ms, {text_of(row.pct_sol, 2)} %"
            axis.annotate(label, (row.p80_ms or 0.0, at), va="center", fontsize=7)
        axis.set_title(f"{op} {mode}\n{shape} {dtype}", fontsize=9)
        axis.invert_yaxis()
        axis.margins(x=0.35)
        axis.tick_params(labelsize=8)
    for axis in axes[len(cases) :]:
        axis.remove()
    about = (
        f"{timed[0].device}, {timed[0].threads} threads, torch {timed[0].torch}, commit"
        f" {timed[0].commit}"
    )
    figure.suptitle(
        f"Median ms ({clock}), p20-p80, and % of the measured limit. {about}", fontsize=9
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return True
