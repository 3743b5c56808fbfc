"""The trainers' losses from hidden states are those of whole logits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

COMPARED = {
    "sft": ("loss", "grad_norm"),
    "ppo": ("policy_loss", "approx_kl", "entropy", "ptx_loss", "grad_norm", "value_loss", "score"),
}


@pytest.mark.parametrize("command", COMPARED)
def test_losses_agree(workspace: Path, command: str) -> None:
    """Every step of the debug configurations, in fp32; policy losses and KLs near 0 are compared on their own scale."""

    def metrics(name: str) -> list[dict[str, float]]:
        return [
            json.loads(line)
            for line in (workspace / name / command / "metrics.jsonl").read_text().splitlines()
        ]

    linear, whole = metrics("serial"), metrics("whole-logits")
    assert len(linear) == len(whole) >= 2
    for ours, expected in zip(linear, whole, strict=True):
        for key in COMPARED[command]:
            assert ours[key] == pytest.approx(expected[key], rel=1e-5, abs=1e-7), (
                expected["step"],
                key,
            )
