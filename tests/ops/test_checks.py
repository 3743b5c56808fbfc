"""Errors for wrong arguments: one short line with the argument, its value and what was expected."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastrlhf import ops
from fastrlhf.ops import checks

pytestmark = pytest.mark.usefixtures("torch_only")

X, MASK, LABELS = (
    torch.zeros(2, 3),
    torch.ones(2, 3, dtype=torch.bool),
    torch.zeros(2, dtype=torch.long),
)
CALLS = {
    "logits": lambda bad: ops.logprobs(bad, LABELS),
    "labels": lambda bad: ops.logprobs(X, bad),
    "weight": lambda bad: ops.linear_cross_entropy(X, bad, LABELS, MASK[:, 0]),
    "hidden": lambda bad: ops.linear_ppo_loss(bad, X, LABELS, X[:, 0], X[:, 0], MASK[:, 0]),
    "ref_logits": lambda bad: ops.logits_kl(X, bad),
    "advantages": lambda bad: ops.ppo_loss(X, X, bad, MASK),
    "ranks": lambda bad: ops.pairwise_ranking_loss(X[0], bad, torch.tensor([0, 3])),
    "scores": lambda bad: ops.shaped_rewards(bad, X, X, MASK, 0.1),
    "values": lambda bad: ops.rollout_targets(X[:, 0], X, X, bad, MASK, kl_coef=0.1),
    "rewards": lambda bad: ops.gae(bad, X, MASK),
    "gamma": lambda bad: ops.gae(X, X, MASK, gamma=bad),
    "mask": lambda bad: ops.masked_mean(X, bad),
    "temperature": lambda bad: ops.logprobs(X, LABELS, temperature=bad),
    "denominator": lambda bad: ops.linear_cross_entropy(X, X, LABELS, MASK[:, 0], denominator=bad),
}


@pytest.mark.parametrize("argument", CALLS)
@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (np.zeros((300, 40)), r"numpy\.ndarray of float64\[300, 40\]"),
        ([0.5] * 1000, "a list of 1000"),
    ],
    ids=["numpy", "list"],
)
def test_arrays_and_lists_are_named_in_one_line(argument, bad, words):
    with pytest.raises(ValueError, match=rf"^{argument}: got {words}, expected [^\n]{{1,120}}$"):
        CALLS[argument](bad)


def test_other_values_are_shown_and_cut():
    assert [checks.describe(v) for v in ("k4", None, 1.5)] == ["'k4'", "None", "1.5"]
    assert "1.5" in checks.describe(np.float32(1.5))
    assert len(checks.describe("x" * 1000)) < 80


def test_numbers_of_any_kind_pass():
    for temperature in (2, 2.0, np.float32(2), torch.tensor(2.0)):
        ops.logprobs(X, LABELS, temperature=temperature)
    compiled = torch.compile(
        lambda t: ops.logprobs(X, LABELS, temperature=t).logprobs,
        backend="aot_eager",
        fullgraph=True,
    )
    for temperature in (1.0, 1.5, 2.0):
        torch.testing.assert_close(
            compiled(temperature), ops.logprobs(X, LABELS, temperature=temperature).logprobs
        )
