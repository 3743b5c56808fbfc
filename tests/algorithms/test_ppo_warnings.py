"""Named warnings of a PPO run."""

from __future__ import annotations

import math

import pytest

from fastrlhf.algorithms.ppo_warnings import WINDOW, RunMonitor

HEALTHY = {
    "kl": 1.0,
    "score": 0.0,
    "explained_variance": 0.5,
    "no_stop": 0.1,
    "ratio_deviation": 1e-6,
    "loss": 1.0,
}


def names(monitor: RunMonitor, *iterations: dict[str, float]) -> list[str]:
    lines = [
        line
        for i, metrics in enumerate(iterations, 1)
        for line in monitor.check(i, {**HEALTHY, **metrics})
    ]
    return [line.split(":")[0] for line in lines]


def test_a_healthy_run_is_silent() -> None:
    rising = [
        {"kl": 0.5 * i, "score": 0.1 * i, "explained_variance": -0.5 if i < 9 else 0.3}
        for i in range(30)
    ]
    assert names(RunMonitor("fp32"), *rising) == []


@pytest.mark.parametrize(
    ("expected", "iterations"),
    [
        ("kl-runaway", [{}, {}, {}, {"kl": 50.0, "score": -1.0}]),
        ("reward-runaway", [{}, {}, {}, {"kl": 50.0, "score": 9.0}]),
        ("not-finite", [{"policy_loss": math.nan}]),
        ("not-finite", [{"value_loss": math.inf}]),
        ("dead-value-function", [{"explained_variance": -0.1}] * WINDOW),
        ("no-stop", [{"no_stop": 1.0}]),
        ("ratio-deviation", [{"ratio_deviation": 0.01}]),
        ("ratio-deviation", [{"ratio_deviation": math.nan}]),
    ],
)
def test_each_trouble_has_a_name(expected: str, iterations: list[dict[str, float]]) -> None:
    assert names(RunMonitor("fp32"), *iterations) == [expected]


def test_a_warning_is_repeated_after_a_window() -> None:
    assert names(RunMonitor("fp32"), *[{"no_stop": 1.0}] * (WINDOW + 1)) == ["no-stop", "no-stop"]


def test_limits_follow_the_dtype_and_the_kl_target() -> None:
    assert names(RunMonitor("bf16"), {"ratio_deviation": 0.1}) == []
    assert names(RunMonitor("fp32", kl_target=6.0), {"kl": 23.0}) == []
    assert names(RunMonitor("fp32", kl_target=6.0), {"kl": 25.0, "score": -1.0}) == ["kl-runaway"]
