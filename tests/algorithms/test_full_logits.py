"""The trainers' losses from hidden states equal those from materialised logits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

COMPARED = {
    "sft": ("loss", "grad_norm"),
    "ppo": ("policy_loss", "approx_kl", "entropy", "ptx_loss", "grad_norm", "value_loss", "score"),
}
# The hidden states are the same; a log-probability of size 6 sums over H = 64 and V = 320, and differs by up to
# 6 eps sqrt(6 (H + V)) = 3.4e-5 (`rounding` in tests/conftest.py). The policy loss, near 0, averages 128 of them times
# advantages of size 1 and of both signs: 3.4e-5 / sqrt(128). A KL of 1e-4 differs by its root times as much.
ROUNDING = {"policy_loss": 3e-6}


@pytest.mark.parametrize("command", COMPARED)
def test_losses_agree(workspace: Path, command: str) -> None:
    """Compare every step of the debug configurations, in fp32.

    The absolute tolerance is for policy losses and KLs near 0.
    """

    def metrics(name: str) -> list[dict[str, float]]:
        return [
            json.loads(line)
            for line in (workspace / name / command / "metrics.jsonl").read_text().splitlines()
        ]

    linear, full = metrics("serial"), metrics("full-logits")
    assert len(linear) == len(full) >= 2
    for ours, expected in zip(linear, full, strict=True):
        for key in COMPARED[command]:
            wanted = pytest.approx(expected[key], rel=1e-5, abs=ROUNDING.get(key, 1e-7))
            assert ours[key] == wanted, (expected["step"], key)
