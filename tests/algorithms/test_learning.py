"""Each trainer learns: these tests fail if a sign, a mask, a shift or an update is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean

import pytest


@pytest.fixture(scope="module")
def metrics(workspace: Path) -> dict[str, list[dict[str, float]]]:
    def read(command: str) -> list[dict[str, float]]:
        return [
            json.loads(line)
            for line in (workspace / "learn" / command / "metrics.jsonl").read_text().splitlines()
        ]

    return {command: read(command) for command in ("sft", "rm", "ppo")}


def test_sft_learns_its_demonstrations(metrics: dict[str, list[dict[str, float]]]) -> None:
    loss = [line["loss"] for line in metrics["sft"]]
    assert loss[0] > 4.0  # close to a uniform guess over 320 tokens, 5.8
    assert mean(loss[-5:]) < 1.2


def test_reward_model_learns_the_ranking(metrics: dict[str, list[dict[str, float]]]) -> None:
    """The ranking is right answer > wrong answer > "No idea."; two of three pairs have the last."""
    accuracy = [line["accuracy"] for line in metrics["rm"]]
    assert accuracy[0] < 0.7
    assert mean(accuracy[-5:]) > 0.8
    assert mean(line["loss"] for line in metrics["rm"][-5:]) < 0.5


def test_ppo_raises_the_score(metrics: dict[str, list[dict[str, float]]]) -> None:
    score = [line["score"] for line in metrics["ppo"]]
    assert mean(score[-5:]) > mean(score[:3]) + 3.0


def test_value_model_follows_the_returns(metrics: dict[str, list[dict[str, float]]]) -> None:
    first, last = metrics["ppo"][0], metrics["ppo"][-5:]
    assert mean(line["value_loss"] for line in last) < first["value_loss"] / 3


def test_pretraining_mix_keeps_learning_text(metrics: dict[str, list[dict[str, float]]]) -> None:
    ppo = metrics["ppo"]
    assert mean(line["ptx_loss"] for line in ppo[-3:]) < ppo[0]["ptx_loss"] - 1.0


def test_run_leaves_report_config_and_checkpoint(workspace: Path) -> None:
    folder = workspace / "learn" / "sft"
    assert (folder / "report.html").stat().st_size > 1000
    assert (folder / "config.yaml").is_file()
    checkpoint = folder / "checkpoints" / (folder / "checkpoints" / "latest").read_text().strip()
    assert checkpoint.name == "step_00000060"
    assert (checkpoint / "policy" / "model.json").is_file()
