"""Charts are valid SVG with shapes at the data, also for gaps, single points and constants."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree

import pytest

from fastrlhf.evaluation.charts import (
    HEIGHT,
    LEFT,
    MAX_POINTS,
    RIGHT,
    TOP,
    WIDTH,
    Bar,
    Series,
    bar_chart,
    line_chart,
    scatter_chart,
    ticks,
)


def shapes(svg: str, kind: str) -> list[ElementTree.Element]:
    """Return the elements whose first class is `kind`."""
    return [
        e for e in ElementTree.fromstring(svg).iter() if e.get("class", "").split()[:1] == [kind]
    ]


def points(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"[ML]([\d.-]+) ([\d.-]+)", path)]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (-1, 1, [-1, -0.5, 0, 0.5, 1]),
        (3.1, 3.9, [3.2, 3.4, 3.6, 3.8]),
        (5, 5, [5]),
    ],
)
def test_ticks_are_round_numbers(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


def test_steps_are_integers_and_a_constant_share_of_zero_is_not_drawn_below_zero() -> None:
    svg = line_chart([Series("share", [1, 2, 3, 4], [0.0] * 4)], "step", "share")
    numbers = [element.text for element in shapes(svg, "tick")]
    assert [text for text in numbers if "-" in text] == []
    assert numbers[-4:] == ["1", "2", "3", "4"]


def test_the_diagonal_is_y_equal_x() -> None:
    svg = scatter_chart([Series("pair", [0.0, 4.0], [2.0, 8.0])], "a", "b", diagonal=True)
    [line] = shapes(svg, "reference")
    frame = {element.text: element for element in shapes(svg, "tick")}
    assert float(line.get("x2")) == float(frame["4"].get("x")) == WIDTH - RIGHT
    assert float(line.get("x1")) < float(line.get("x2")) and float(line.get("y1")) > float(
        line.get("y2")
    )
    assert not shapes(
        scatter_chart([Series("pair", [0.0, 1.0], [5.0, 6.0])], "a", "b", diagonal=True),
        "reference",
    )


def test_a_line_goes_from_the_left_edge_to_the_right_and_down_for_falling_values() -> None:
    svg = line_chart([Series("loss", [1, 2, 3], [3.0, 2.0, 1.0])], "step", "loss")
    (line,) = shapes(svg, "line")
    drawn = points(line.get("d"))
    assert drawn[0][0] == LEFT and drawn[-1][0] == WIDTH - RIGHT
    assert TOP < drawn[0][1] < drawn[1][1] < drawn[2][1] < HEIGHT
    assert len(shapes(svg, "dot")) == 3
    assert not shapes(svg, "raw")


def test_long_series_are_averaged_and_smoothed() -> None:
    values = [float(i % 2) for i in range(5000)]
    svg = line_chart([Series("noise", range(5000), values)], "step", "noise")
    (raw,), (line,) = shapes(svg, "raw"), shapes(svg, "line")
    assert len(points(raw.get("d"))) == MAX_POINTS
    heights = [y for _, y in points(line.get("d"))]
    assert max(heights[40:-40]) - min(heights[40:-40]) < 0.2 * HEIGHT


def test_an_exact_schedule_is_not_smoothed() -> None:
    values = [0.0] * 50 + [1.0] * 50
    svg = line_chart([Series("lr", range(100), values)], "step", "lr", smooth=False)
    assert not shapes(svg, "raw")
    (line,) = shapes(svg, "line")
    assert len({y for _, y in points(line.get("d"))}) == 2


def test_values_that_are_not_finite_leave_a_gap() -> None:
    svg = line_chart(
        [Series("loss", range(5), [1.0, 2.0, math.nan, 3.0, math.inf])], "step", "loss"
    )
    (line,) = shapes(svg, "line")
    assert line.get("d").count("M") == 2
    assert "nan" not in svg and "inf" not in svg


@pytest.mark.parametrize("values", [[], [math.nan, math.nan]])
def test_without_data_a_chart_is_an_empty_string(values: list[float]) -> None:
    assert line_chart([Series("x", range(len(values)), values)], "step", "x") == ""
    assert scatter_chart([Series("x", range(len(values)), values)], "a", "b") == ""


@pytest.mark.parametrize("values", [[2.0], [0.0, 0.0], [-3.0, -3.0, -3.0], [1e-9, 1e9]])
def test_flat_and_extreme_data_stay_inside_the_picture(values: list[float]) -> None:
    svg = line_chart([Series("x", range(len(values)), values)], "step", "x")
    (line,) = shapes(svg, "line")
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in points(line.get("d")))


def test_a_reference_level_is_inside_the_axes_even_when_far_from_the_data() -> None:
    svg = line_chart([Series("x", [0, 1], [10.0, 11.0])], "step", "x", reference=(0.5, "guessing"))
    (level,) = shapes(svg, "reference")
    assert TOP <= float(level.get("y1")) <= HEIGHT
    assert "guessing" in svg


def test_names_are_escaped() -> None:
    svg = line_chart([Series("<b>&", [0, 1], [1.0, 2.0])], 'a"<', "<y>")
    ElementTree.fromstring(svg)
    assert "<b>" not in svg and "<y>" not in svg


def test_bars_are_as_long_as_their_values() -> None:
    svg = bar_chart([Bar("a", 0.25), Bar("b", 0.5), Bar("c", -0.25)])
    a, b, c = shapes(svg, "bar")
    assert float(b.get("width")) == pytest.approx(2 * float(a.get("width")), abs=0.2)
    assert float(c.get("x")) + float(c.get("width")) == pytest.approx(float(a.get("x")), abs=0.2)


def test_whiskers_span_the_interval_around_the_value() -> None:
    svg = bar_chart([Bar("a", 0.6, 0.5, 0.7)], reference=(0.5, "even"))
    (bar,), (whisker,), (level,) = (
        shapes(svg, "bar"),
        shapes(svg, "whisker"),
        shapes(svg, "reference"),
    )
    low, high = (
        float(x) for x in re.match(r"M([\d.]+) [\d.]+H([\d.]+)", whisker.get("d")).groups()
    )
    end = float(bar.get("x")) + float(bar.get("width"))
    assert low < end < high
    assert low == pytest.approx(float(level.get("x1")), abs=0.2)
    assert "0.600 [0.500, 0.700]" in svg


def test_without_zero_points_replace_bars() -> None:
    svg = bar_chart([Bar("sft", 5.5), Bar("ppo", 6.0)], from_zero=False)
    assert not shapes(svg, "bar")
    left, right = shapes(svg, "dot")
    assert float(left.get("cx")) < float(right.get("cx"))


def test_scatter_draws_each_point_once() -> None:
    svg = scatter_chart(
        [Series("a", [0.0, 1.0, math.nan], [1.0, 2.0, 3.0]), Series("b", [2.0], [0.0], 1)],
        "kl",
        "score",
    )
    assert len(shapes(svg, "dot")) == 3
    assert not shapes(svg, "line")
