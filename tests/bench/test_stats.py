"""Medians, their spread, and the order of turns."""

from __future__ import annotations

import pytest

from bench.stats import quantile, spread, turns


def test_quantiles_interpolate():
    assert quantile([30.0, 10.0, 20.0], 0.5) == 20
    assert quantile([1.0, 2.0], 0.5) == 1.5
    assert quantile(list(range(11)), 0.2) == 2
    assert quantile(list(range(11)), 0.8) == 8
    assert quantile([0.0, 10.0], 0.2) == pytest.approx(2)
    assert quantile([7.0], 0.8) == 7


@pytest.mark.parametrize(("values", "q"), [([], 0.5), ([1.0], 1.5), ([1.0], -0.1)])
def test_quantile_of_nothing_is_a_mistake(values, q):
    with pytest.raises(ValueError, match="quantile"):
        quantile(values, q)


def test_one_slow_call_moves_neither_median_nor_spread():
    calm = spread([1.0] * 9 + [1000.0])
    assert (calm.median, calm.p20, calm.p80, calm.samples) == (1.0, 1.0, 1.0, 10)


def test_turns_are_even_and_change_direction():
    order = list(turns(3, 4))
    assert order == [0, 1, 2, 2, 1, 0, 0, 1, 2, 2, 1, 0]
