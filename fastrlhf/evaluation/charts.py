"""Charts as SVG text for HTML pages: lines, points, and bars with intervals.

SVG is sharp at any size, takes a few kilobytes, is readable by screen readers, and is coloured by
the page's style sheet (style.py), so one report suits light and dark screens.

Not supported: interaction beyond the browser's tooltips.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 560, 260
LEFT, RIGHT, TOP, BOTTOM = 72, 14, 12, 42
ROW = 34  # height of a bar and the space around it
MAX_POINTS = 400  # longer lines are averaged in bins: the plot is 480 units wide


@dataclass(frozen=True)
class Series:
    """One line: y over x. Non-finite values leave a gap."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    color: int = 0
    """Index of a colour of the style sheet, 0 to 5."""


@dataclass(frozen=True)
class Bar:
    """One value of a bar chart, with an optional interval from `low` to `high`."""

    label: str
    value: float
    low: float | None = None
    high: float | None = None
    color: int = 0


def line_chart(
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    *,
    smooth: bool = True,
    reference: tuple[float, str] | None = None,
) -> str:
    """Return a chart of lines over one pair of axes.

    With `smooth`, a series of more than 30 points is drawn faintly, with its moving average on top.
    `reference` is a level and its name, drawn as a horizontal line. Returns "" if no series has a
    finite point.
    """
    lines = [_binned(s) for s in series]
    axes = _axes(lines, reference)
    if axes is None:
        return ""
    body = [_frame(*axes, x_label, y_label, reference)]
    for line in lines:
        averaged = smooth and len(line.y) > 30
        if averaged:
            body.append(_path(line, *axes, "raw"))
        body.append(_path(_smoothed(line) if averaged else line, *axes, "line"))
        if len(line.y) <= 30:
            body.extend(_dots(line, *axes))
    return _svg(HEIGHT, f"{y_label} over {x_label}", body)


def scatter_chart(
    series: Sequence[Series], x_label: str, y_label: str, *, diagonal: bool = False
) -> str:
    """Return a chart of the points of each series, with `diagonal` also of the line y = x.

    Returns "" if there is no point with finite coordinates.
    """
    axes = _axes(series, None)
    if axes is None:
        return ""
    body = [_frame(*axes, x_label, y_label, None)]
    start, stop = max(axis.low for axis in axes), min(axis.high for axis in axes)
    if diagonal and start < stop:
        (x1, y1), (x2, y2) = [[axis(value) for axis in axes] for value in (start, stop)]
        body.append(
            f'<line class="reference" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'
        )
    body += [dot for one in series for dot in _dots(one, *axes)]
    return _svg(HEIGHT, f"{y_label} against {x_label}", body)


def bar_chart(
    bars: Sequence[Bar],
    *,
    reference: tuple[float, str] | None = None,
    from_zero: bool = True,
    digits: int = 3,
) -> str:
    """Return a chart of horizontal bars with whiskers for the intervals, labelled with the numbers.

    Bars begin at zero. If differences matter rather than sizes (losses), `from_zero=False` draws
    points on an axis that begins near the smallest value: a truncated bar would show a false
    proportion.
    """
    label_width, number_width = 112, 150
    levels = [reference[0]] if reference else []
    low = min(levels + [bar.value if bar.low is None else bar.low for bar in bars])
    high = max(levels + [bar.value if bar.high is None else bar.high for bar in bars])
    start = min(low, 0.0) if from_zero else low - 0.12 * ((high - low) or 1.0)
    axis = _Axis(start, max(high, start + 1e-9), label_width, WIDTH - number_width)
    height = TOP + ROW * len(bars) + (22 if reference else 6)
    body = []
    if reference:
        x = axis(reference[0])
        body.append(
            f'<line class="reference" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 6}" y2="{height - 18}"/>'
        )
        body.append(_text(x, height - 5, reference[1], "middle", "tick"))
    for i, bar in enumerate(bars):
        body.extend(
            _bar(bar, TOP + ROW * (i + 0.5), axis, axis(0.0) if from_zero else None, digits)
        )
    return _svg(height, ", ".join(f"{bar.label} {bar.value:.{digits}f}" for bar in bars), body)


def stacked_chart(
    rows: Mapping[str, Mapping[str, float]],
    colors: Mapping[str, int],
    *,
    limit: tuple[float, str] | None = None,
    digits: int = 1,
) -> str:
    """Return a chart of horizontal bars that consist of parts, labelled with their sums.

    `rows` maps a bar's label to its parts; `colors` maps a part to a colour of the style sheet.
    `limit` is a level and its name, drawn as a vertical line.
    """
    sums = {label: sum(parts.values()) for label, parts in rows.items()}
    highest = max([*sums.values(), limit[0] if limit else 0.0, 1e-9])
    axis = _Axis(0.0, highest, 112, WIDTH - 90)
    height = TOP + ROW * len(rows) + (22 if limit else 6)
    body = []
    for i, (label, parts) in enumerate(rows.items()):
        middle, start = TOP + ROW * (i + 0.5), 0.0
        body.append(_text(axis.start - 10, middle + 4, label, "end", "name"))
        for name, value in parts.items():
            x, width = axis(start), axis(start + value) - axis(start)
            title = f"<title>{escape(name)} {value:.{digits}f}</title>"
            box = f'x="{x:.1f}" y="{middle - 9:.1f}" width="{width:.1f}" height="18"'
            body.append(f'<rect class="bar c{colors[name]}" {box}>{title}</rect>')
            start += value
        number = f"{sums[label]:.{digits}f}"
        body.append(_text(axis(start) + 8, middle + 4, number, "start", "number"))
    if limit:
        x = axis(limit[0])
        ends = f'x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 6}" y2="{height - 18}"'
        body += [f'<line class="reference" {ends}/>', _text(x, height - 5, limit[1], "end", "tick")]
    described = ", ".join(f"{label} {value:.{digits}f}" for label, value in sums.items())
    return _svg(height, described, body)


def ticks(low: float, high: float, target: int = 5, *, integral: bool = False) -> list[float]:
    """Return about `target` round numbers from low to high; integers only if `integral`.

    They are spaced by 1, 2 or 5 times a power of ten.
    """
    if not high > low:
        return [low]
    raw = (high - low) / target
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw * 0.999)
    step = max(step, 1.0) if integral else step
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


class _Axis:
    """Maps data from [low, high] to drawing units from `start` to `stop`.

    The data are integers if `integral`.
    """

    def __init__(
        self, low: float, high: float, start: float, stop: float, *, integral: bool = False
    ) -> None:
        self.low, self.high, self.start, self.stop = low, high, start, stop
        self.integral = integral

    def __call__(self, value: float) -> float:
        span = self.high - self.low
        share = (value - self.low) / span if span > 0 else 0.5
        return self.start + share * (self.stop - self.start)


def _padded(low: float, high: float) -> tuple[float, float]:
    pad = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return (0.0 if 0 <= low <= 0.3 * high else low - pad), high + pad


def _binned(series: Series) -> Series:
    if len(series.y) <= MAX_POINTS:
        return series
    xs, ys = [], []
    for i in range(MAX_POINTS):
        start, stop = i * len(series.y) // MAX_POINTS, (i + 1) * len(series.y) // MAX_POINTS
        finite = [y for y in series.y[start:stop] if math.isfinite(y)]
        xs.append(series.x[(start + stop) // 2])
        ys.append(math.fsum(finite) / len(finite) if finite else math.nan)
    return Series(series.name, xs, ys, series.color)


def _smoothed(series: Series) -> Series:
    """Return a centred moving average over a twentieth of the points.

    The window narrows towards the start, where curves are steep, and is cut at the end, where they
    are flat.
    """
    half = max(len(series.y) // 40, 1)
    ys = []
    for i, value in enumerate(series.y):
        reach = min(half, i)
        window = [y for y in series.y[i - reach : i + reach + 1] if math.isfinite(y)]
        ys.append(math.fsum(window) / len(window) if math.isfinite(value) else math.nan)
    return Series(series.name, series.x, ys, series.color)


def _path(series: Series, x_axis: _Axis, y_axis: _Axis, kind: str) -> str:
    parts, pen_down = [], False
    for x, y in zip(series.x, series.y, strict=True):
        if math.isfinite(y):
            parts.append(f"{'L' if pen_down else 'M'}{x_axis(x):.1f} {y_axis(y):.1f}")
        pen_down = math.isfinite(y)
    title = f"<title>{escape(series.name)}</title>"
    return f'<path class="{kind} c{series.color}" d="{"".join(parts)}">{title}</path>'


def _bar(bar: Bar, middle: float, axis: _Axis, zero: float | None, digits: int) -> list[str]:
    """Return a row of a bar chart: name, bar from `zero` (None: a point), whisker and number."""
    x, end, number = axis(bar.value), axis(bar.value), f"{bar.value:.{digits}f}"
    parts = [_text(axis.start - 10, middle + 4, bar.label, "end", "name")]
    if zero is None:
        ends = f'x1="{axis.start}" x2="{axis.stop}"'
        parts.append(f'<line class="grid" {ends} y1="{middle:.1f}" y2="{middle:.1f}"/>')
        parts.append(f'<circle class="dot c{bar.color}" cx="{x:.1f}" cy="{middle:.1f}" r="6"/>')
    else:
        corner = f'x="{min(x, zero):.1f}" y="{middle - 9:.1f}"'
        size = f'width="{max(abs(x - zero), 1):.1f}" height="18"'
        parts.append(f'<rect class="bar c{bar.color}" {corner} {size} rx="3"/>')
    if bar.low is not None and bar.high is not None:
        end, above = max(axis(bar.high), x), f"{middle - 5:.1f}v10"
        x1, x2 = f"{axis(bar.low):.1f}", f"{axis(bar.high):.1f}"
        parts.append(
            f'<path class="whisker" d="M{x1} {middle:.1f}H{x2}M{x1} {above}M{x2} {above}"/>'
        )
        number += f" [{bar.low:.{digits}f}, {bar.high:.{digits}f}]"
    return [*parts, _text(end + (11 if zero is None else 8), middle + 4, number, "start", "number")]


def _dots(series: Series, x_axis: _Axis, y_axis: _Axis) -> list[str]:
    dots = []
    for x, y in zip(series.x, series.y, strict=True):
        if math.isfinite(x) and math.isfinite(y):
            title = escape(f"{series.name}: {y:.4g} at {x:.4g}")
            center = f'cx="{x_axis(x):.1f}" cy="{y_axis(y):.1f}"'
            shape = f'<circle class="dot c{series.color}" {center} r="3">'
            dots.append(f"{shape}<title>{title}</title></circle>")
    return dots


def _axes(
    series: Sequence[Series], reference: tuple[float, str] | None
) -> tuple[_Axis, _Axis] | None:
    """Return axes that include every finite point; None if there is none."""
    points = [
        (x, y)
        for one in series
        for x, y in zip(one.x, one.y, strict=True)
        if math.isfinite(x) and math.isfinite(y)
    ]
    if not points:
        return None
    levels = [y for _, y in points] + ([reference[0]] if reference else [])
    xs = [x for x, _ in points]
    integral = all(float(x).is_integer() for x in xs)
    x_axis = _Axis(min(xs), max(xs), LEFT, WIDTH - RIGHT, integral=integral)
    return x_axis, _Axis(*_padded(min(levels), max(levels)), HEIGHT - BOTTOM, TOP)


def _frame(
    x_axis: _Axis, y_axis: _Axis, x_label: str, y_label: str, reference: tuple[float, str] | None
) -> str:
    """Return the grid, the ticks and names of the axes, and the reference level."""
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = []
    for value in ticks(y_axis.low, y_axis.high):
        y = y_axis(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(LEFT - 8, y + 4, _number(value), "end", "tick"))
    marks = ticks(x_axis.low, x_axis.high, 6, integral=x_axis.integral)
    parts.extend(
        _text(x_axis(value), bottom + 16, _number(value), "middle", "tick") for value in marks
    )
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    parts.append(_text((LEFT + right) / 2, HEIGHT - 6, x_label, "middle", "label"))
    middle = (TOP + bottom) / 2
    vertical = f'text-anchor="middle" transform="translate(11 {middle:.0f}) rotate(-90)"'
    parts.append(f'<text class="label" {vertical}>{escape(y_label)}</text>')
    if reference:
        level = y_axis(reference[0])
        parts.append(
            f'<line class="reference" x1="{LEFT}" x2="{right}" y1="{level:.1f}" y2="{level:.1f}"/>'
        )
        parts.append(_text(right - 4, level - 5, reference[1], "end", "tick"))
    return "".join(parts)


def _number(value: float) -> str:
    if value != 0 and (abs(value) >= 1e5 or abs(value) < 1e-3):
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.6g}"


def _text(x: float, y: float, text: str, anchor: str, kind: str) -> str:
    return (
        f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
    )


def _svg(height: float, description: str, body: Sequence[str]) -> str:
    label = f'role="img" aria-label="{escape(description, quote=True)}"'
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" {label}>{"".join(body)}</svg>'
