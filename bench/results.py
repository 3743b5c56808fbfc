"""Results as rows of a CSV file, as a table in the terminal, and as plots."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

CSV_NAME = "kernels.csv"
PLOT_NAME = "kernels.svg"


@dataclass(frozen=True)
class Row:
    """One provider of one case on one clock, keyed by everything that its time may depend on."""

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
    """floor / median: the floor at the limits measured in the same run (the two columns that follow)"""
    copy_gb_s: float | None = None
    matmul_tflop_s: float | None = None
    peak_extra_mb: float | None = None
    """most memory held at a time beyond the inputs, 10^6 bytes"""
    load: float | None = None
    """runnable processes, one-minute mean"""
    sm_clock_mhz: str = ""
    """before-after"""


COLUMNS = tuple(f.name for f in dataclasses.fields(Row))
NUMBERS = {f.name for f in dataclasses.fields(Row) if str(f.type).startswith(("float", "int"))}


def append_csv(path: Path, rows: Sequence[Row]) -> None:
    """Add rows, the header first in a new file; called after each case, so that a killed run keeps what it had."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists()
    if not fresh:
        with path.open(newline="") as file:
            found = tuple(next(csv.reader(file), ()))
        if found != COLUMNS:
            raise ValueError(f"{path}: its columns are those of another version; move it away or pass another --out")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if fresh:
            writer.writeheader()
        for row in rows:
            values = dataclasses.asdict(row)
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in values.items()})


def read_csv(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return [Row(**{k: _parse(k, v) for k, v in line.items()}) for line in csv.DictReader(file)]  # type: ignore[arg-type]


def _parse(column: str, text: str) -> str | float | int | None:
    if column not in NUMBERS:
        return text
    if column in ("samples", "threads"):
        return int(text)
    return float(text) if text else None


def latest(rows: Sequence[Row]) -> list[Row]:
    """The last measurement of each case, provider and clock; a file may hold several runs."""
    kept: dict[tuple[str, ...], Row] = {}
    for row in rows:
        key = (row.op, row.mode, row.provider, row.shape, row.dtype, row.device, row.clock)
        kept.pop(key, None)
        kept[key] = row
    return list(kept.values())


def text_of(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}g}" if value < 1000 else f"{value:.0f}"


def cases_of(rows: Sequence[Row]) -> dict[tuple[str, str, str, str], list[Row]]:
    """Rows by (op, mode, shape, dtype), fastest first, those without a time last."""
    cases: dict[tuple[str, str, str, str], list[Row]] = {}
    for row in rows:
        cases.setdefault((row.op, row.mode, row.shape, row.dtype), []).append(row)
    for group in cases.values():
        group.sort(key=lambda r: (r.clock, r.median_ms is None, r.median_ms or 0.0))
    return cases


def print_table(rows: Sequence[Row], console: Console) -> None:
    """Everything timed, one line each; what was not is summed up under it."""
    table = Table(title=f"{rows[0].device}, {rows[0].threads} threads" if rows else "nothing measured", title_style="")
    for name in ("case", "provider", "clock", "ms", "p20-p80", "GB/s", "TFLOP/s", "% SOL", "extra MB", "n"):
        table.add_column(name, justify="left" if name in ("case", "provider", "clock") else "right", no_wrap=True)
    others: dict[str, list[str]] = {}
    for (op, mode, shape, dtype), group in cases_of(rows).items():
        title = f"{op} {mode} {shape} {dtype}"
        for row in group:
            if row.median_ms is None:
                why = f"{row.status}: {row.note}" if row.note else row.status
                others.setdefault(f"{row.provider}: {why}", []).append(f"{op} {mode} {dtype}")
                continue
            style = "bold" if row.kind == "ours" else "dim" if row.kind == "floor" else ""
            table.add_row(
                title, escape(row.provider), row.clock, text_of(row.median_ms, 4),
                f"{text_of(row.p20_ms)}-{text_of(row.p80_ms)}", text_of(row.gb_per_s), text_of(row.tflop_per_s or None),
                text_of(row.pct_sol), text_of(row.peak_extra_mb), str(row.samples), style=style,
            )  # fmt: skip
            title = ""
        table.add_section()
    console.print(table)
    for what, where in others.items():
        console.print(f"{what}  [{', '.join(dict.fromkeys(where))}]", markup=False, highlight=False)


def plot(rows: Sequence[Row], path: Path) -> bool:
    """One bar a provider and case, with its p20-p80; False when there is nothing to draw."""
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
        axis.barh(names, medians, xerr=(low, high), color=[colors[r.kind] for r in group], capsize=2)
        for at, row in enumerate(group):
            label = f" {text_of(row.median_ms)} ms, {text_of(row.pct_sol, 2)} %"
            axis.annotate(label, (row.p80_ms or 0.0, at), va="center", fontsize=7)
        axis.set_title(f"{op} {mode}\n{shape} {dtype}", fontsize=9)
        axis.invert_yaxis()
        axis.margins(x=0.35)
        axis.tick_params(labelsize=8)
    for axis in axes[len(cases) :]:
        axis.remove()
    about = f"{timed[0].device}, {timed[0].threads} threads, torch {timed[0].torch}, commit {timed[0].commit}"
    figure.suptitle(f"Median ms ({clock}), p20-p80, and % of the measured limit. {about}", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return True
