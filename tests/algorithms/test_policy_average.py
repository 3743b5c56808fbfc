"""When the average of the policy moves, and what is said of its start."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from algorithms_support import tiny_ppo

from fastrlhf.algorithms.policy_average import PolicyAverage
from fastrlhf.config import PPOConfig


def averaging(decay: float | None, every: str, steps: int) -> tuple[PolicyAverage, list[int]]:
    config = PPOConfig(reward_model="rm", ema_decay=decay, ema_every=every)  # type: ignore[arg-type]
    moved: list[int] = []
    average: Any = SimpleNamespace(model=None, update=lambda: moved.append(1))
    return PolicyAverage(average if decay is not None else None, config, steps), moved


@pytest.mark.parametrize(("every", "moves"), [("update", [3, 6, 9]), ("iteration", [1, 2, 3])])
def test_the_share_of_the_start_is_the_decay_to_the_power_of_the_moves(
    every: str, moves: list[int]
) -> None:
    average, moved = averaging(0.5, every, 3)
    for iteration, count in enumerate(moves, 1):
        for _ in range(3):
            average.after("update")
        average.after("iteration")
        assert len(moved) == count
        metrics = average.metrics(iteration, 3, is_main=True)
        assert metrics == {"ema_start_share": 0.5**count}


@pytest.mark.parametrize(
    ("every", "decay", "warned"),
    [
        ("update", 0.9, False),  # 0.9^60 = 0.002
        ("iteration", 0.9, True),  # 0.9^20 = 0.12
        ("update", 0.963, True),  # 0.963^60 = 0.104
        ("update", 0.962, False),  # 0.962^60 = 0.098
        ("update", 0.0, False),
    ],
)
def test_a_large_final_share_is_one_warning(
    every: str, decay: float, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    average, _ = averaging(decay, every, 20)
    for iteration in range(1, 21):
        for _ in range(3):
            average.after("update")
        average.after("iteration")
        average.metrics(iteration, 3, is_main=True)
    assert len(caplog.messages) == int(warned)
    if warned:
        assert caplog.messages[0].startswith("warning: ema-start: at the end of this run 1")


def test_without_an_average_nothing_is_logged() -> None:
    average, _ = averaging(None, "update", 3)
    average.after("update")
    assert average.metrics(1, 1, is_main=True) == {} and average.moves == 0


@pytest.mark.parametrize("every", ["update", "iteration"])
def test_an_iteration_of_ppo_moves_the_average_by_the_equation(
    every: str, build: Callable[..., Any]
) -> None:
    """Two updates: w0 d^2 + (1-d) d w1 + (1-d) w2, or w0 d + (1-d) w2 once an iteration."""
    ppo = build(ppo={"ema_decay": 0.5, "ema_every": every})
    trained = list(ppo.policy.model.parameters())
    weights = [[p.detach().clone() for p in trained]]
    step = ppo.policy.step

    def recorded() -> Any:
        metrics = step()
        weights.append([p.detach().clone() for p in trained])
        return metrics

    ppo.policy.step = recorded
    metrics = ppo.step([ppo.first_prompts])
    assert metrics["updates"] == 2 and len(weights) == 3
    assert metrics["ema_start_share"] == (0.25 if every == "update" else 0.5)
    assert ppo.state_dict()["average_moves"] == (2 if every == "update" else 1)
    shares = (0.25, 0.25, 0.5) if every == "update" else (0.5, 0.0, 0.5)
    for average, *states in zip(ppo.average.model.parameters(), *weights, strict=True):
        expected = sum(share * state for share, state in zip(shares, states, strict=True))
        torch.testing.assert_close(average.detach(), expected, rtol=1e-6, atol=1e-7)


def test_a_checkpoint_without_a_count_moved_once_an_iteration(
    build: Callable[..., Any], tiny: Path
) -> None:
    assert tiny_ppo.config(tiny).ppo.ema_every == "update"
    ppo = build()
    state = ppo.state_dict()
    ppo.load_state_dict({**state, "iteration": 5, "average_moves": 40})
    assert ppo.averaging.moves == 40
    del state["average_moves"]
    ppo.load_state_dict({**state, "iteration": 5})
    assert ppo.averaging.moves == 5
