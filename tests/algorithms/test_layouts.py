"""Losses and gradients are the same under every parallel layout and micro-batch size."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from algorithms_support import run_layouts

from fastrlhf.config import load_config

LAYOUTS = ("2x2", "4x1", "1x4", "2x1-sequence-dp2")
# The loss, the norm of the gradient, and for PPO what they are computed from.
COMPARED = {
    "sft": ("loss", "grad_norm"),
    "rm": ("loss", "grad_norm", "accuracy", "margin"),
    "ppo": (
        "loss",
        "grad_norm",
        "value_loss",
        "value_grad_norm",
        "entropy",
        "ptx_loss",
        "score",
        "response_length",
        "valid_score",
        "valid_score_stderr",
        "valid_response_length",
        "valid_stopped",
        "valid_prompts",
    ),
}
# Differences of log-probs of up to 8 tokens.
KL = ("valid_kl", "valid_kl_per_token")


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("command", COMPARED)
@pytest.mark.parametrize("name", [*LAYOUTS, "micro-1", "micro-8"])
def test_same_as_one_process(workspace: Path, name: str, command: str) -> None:
    serial, other = metrics(workspace / "serial" / command), metrics(workspace / name / command)
    assert len(serial) == len(other) == run_layouts.STEPS[command]
    for expected, got in zip(serial, other, strict=True):
        for key in COMPARED[command]:
            assert got[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-6), (
                expected["step"],
                key,
            )
        # A KL is a small difference of log-probs, so its error is on their scale: a log-prob of the
        # nearly uniform policy is about -log(vocabulary), and is compared as above.
        for key in KL if command == "ppo" else ():
            assert got[key] == pytest.approx(expected[key], abs=1e-5 * 8 * math.log(500)), key
            assert expected["step"] == 1 or abs(expected[key]) > 1e-3


def test_rows_that_are_no_token_are_never_sampled_under_any_layout(workspace: Path) -> None:
    """The policy is nearly uniform: about half of a response would be ids of padding rows."""
    serial, other = (metrics(workspace / name / "ppo") for name in ("padded", "2x2-padded"))
    for expected, got in zip(serial, other, strict=True):
        for key in COMPARED["ppo"]:
            assert got[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-6), key
        assert max(expected["ratio_deviation"], got["ratio_deviation"]) < 1e-5
        # The entropy of the tokenizer's ids, not of all rows.
        assert got["entropy"] < math.log(317) + 1e-3 < math.log(run_layouts.PADDED) - 0.5


@pytest.mark.parametrize("name", ["packed", "dp4-packed", "1x2-dp2-packed"])
def test_packing_under_a_token_budget_changes_no_loss(
    workspace: Path, name: str, rounding: Callable[..., float]
) -> None:
    """With fifteen samples, ranks have different numbers of samples and of micro-batches."""
    model = load_config(run_layouts.CONFIGS / "sft.yaml", []).model
    plain, packed = metrics(workspace / "unpacked" / "sft"), metrics(workspace / name / "sft")
    assert len(plain) == len(packed) == 3
    for expected, got in zip(plain, packed, strict=True):
        bound = rounding(model, model.max_positions, int(expected["tokens"]))
        assert got["loss"] == pytest.approx(expected["loss"], rel=bound)
        assert got["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
        assert got["tokens"] == expected["tokens"]


def test_the_weight_of_pretraining_tokens_does_not_depend_on_the_layout(
    workspace: Path, rounding: Callable[..., float]
) -> None:
    model = load_config(run_layouts.CONFIGS / "sft.yaml", []).model
    rows, serial, other = (
        metrics(workspace / name / "sft") for name in ("unpacked", "weighted", "2x1-dp2-weighted")
    )
    for unweighted, expected, got in zip(rows, serial, other, strict=True):
        bound = rounding(model, model.max_positions, int(expected["tokens"]))
        assert got["loss"] == pytest.approx(expected["loss"], rel=bound)
        assert got["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
        assert got["pretrain_share_loss"] == pytest.approx(expected["pretrain_share_loss"])
        shares = {line["pretrain_share_rows"] for line in (unweighted, expected, got)}
        assert len(shares) == 1
        # The weight changes each batch's share by the same factor of its odds.
        before, after = unweighted["pretrain_share_loss"], expected["pretrain_share_loss"]
        odds = [share / (1 - share) for share in (before, after)]
        assert abs(after - before) > 0.05
        if unweighted is rows[0]:
            weight = odds[1] / odds[0]
        assert odds[1] / odds[0] == pytest.approx(weight, rel=1e-4)


@pytest.mark.parametrize("name", ["serial", *LAYOUTS])
def test_first_ratio_is_one(workspace: Path, name: str) -> None:
    for line in metrics(workspace / name / "ppo"):
        assert line["ratio_deviation"] < 1e-5


def test_weights_move(workspace: Path) -> None:
    """The comparisons above would hold for a trainer that never updates."""
    for command in ("sft", "rm"):
        losses = [line["loss"] for line in metrics(workspace / "serial" / command)]
        assert max(losses) - min(losses) > 1e-3
