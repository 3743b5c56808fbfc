"""PPO reaches a known optimum, beta limits the KL, and ptx limits the loss of pretraining text."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
from algorithms_support import tiny_ppo

from fastrlhf.parallel import mesh as meshes
from fastrlhf.run import train

# Shares of a response's characters, at most 1. All responses run to the limit, so none is
# penalised.
RULES = """
def share_of_a(prompts, responses):
    return [response.count("a") / max(len(response), 1) for response in responses]

def share_of_digits(prompts, responses):
    return [sum(map(str.isdigit, response)) / max(len(response), 1) for response in responses]
"""
TASK: dict[str, Any] = {
    "model": {"num_layers": 1, "init_std": 0.05},
    "optimizer": {"lr": 1e-2, "eps": 1e-5},
    "generation": {"max_new_tokens": 6, "min_new_tokens": 6, "slots": 64},
    "ppo": {
        "reward_model": None,
        "reward_function": "tiny_rules:share_of_a",
        "no_stop_penalty": None,
        "batch_size": 64,
        "minibatch_size": 16,
        "value_lr": 1e-2,
        "kl_coef": 0.0,
        "gamma_ptx": 0.0,
        "ema_decay": None,
    },
    "checkpoint": {"save": False},
}
Learn = Callable[..., list[dict[str, float]]]


@pytest.fixture
def learn(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Learn]:
    (tmp_path / "tiny_rules.py").write_text(RULES)
    monkeypatch.syspath_prepend(str(tmp_path))

    def run(steps: int, **sections: dict[str, Any]) -> list[dict[str, float]]:
        """Run `steps` iterations of the task; return their metrics."""
        merged = {
            name: {**TASK.get(name, {}), **sections.get(name, {})} for name in TASK | sections
        }
        merged["train"] = {"steps": steps, "micro_batch_size": 16, "seed": 3}
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        train.train(
            "ppo", tiny_ppo.config(tiny, **merged).model_copy(update={"output_dir": str(out)})
        )
        return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]

    yield run
    meshes.finalize()


def test_reaches_95_percent_of_the_optimum(learn: Learn) -> None:
    score = [line["score"] for line in learn(40)]
    assert score[0] < 0.1
    assert mean(score[-3:]) > 0.95


def test_a_higher_beta_ends_at_a_lower_kl(learn: Learn) -> None:
    free, held = (learn(15, ppo={"kl_coef": beta}) for beta in (0.0, 0.5))
    assert free[-1]["kl"] > 3.0
    assert held[-1]["kl"] < free[-1]["kl"] / 2


def test_ptx_keeps_the_pretraining_loss_down(learn: Learn, tiny: Path) -> None:
    """Both runs start from one model and report the ptx loss; a gamma of 1e-6 has no effect."""
    out = tiny / "pretrained"
    shared = {"model": {**tiny_ppo.MODEL, **TASK["model"]}, "optimizer": {"lr": 1e-2}}
    text = {"train": str(tiny / "data" / "text.jsonl")}
    length = {"steps": 80, "micro_batch_size": 16, "global_batch_size": 16}
    chosen = tiny_ppo.config(tiny, **shared, data=text, train=length).model_copy(
        update={"output_dir": str(out)}
    )
    train.train("pretrain", chosen)
    start = {"model": {**TASK["model"], "load": str(out)}, "optimizer": {"lr": 2e-3, "eps": 1e-5}}
    rule = "tiny_rules:share_of_digits"
    without, mixed = (
        learn(15, **start, ppo={"gamma_ptx": gamma, "reward_function": rule})
        for gamma in (1e-6, 1.0)
    )
    before = without[0]["ptx_loss"]
    assert without[-1]["ptx_loss"] > before + 0.5
    assert mixed[-1]["ptx_loss"] < (before + without[-1]["ptx_loss"]) / 2
    for run in (without, mixed):
        score = [line["score"] for line in run]
        assert mean(score[-3:]) > mean(score[:3]) + 0.05
