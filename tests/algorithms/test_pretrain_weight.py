"""The loss of SFT with weighted pretraining rows, against its definition."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastrlhf.algorithms import sft
from fastrlhf.data.batches import TokenizedDemonstration, pack_demonstrations


@pytest.mark.parametrize("rows", [[0, 1], [0, 0], [1, 1]], ids=["both", "none", "only"])
def test_weighted_mean_of_the_cross_entropy(rows: list[int]) -> None:
    """sum w_i CE_i / sum w_i, and its gradients, in float64 from the definition."""
    batch = pack_demonstrations(
        [
            TokenizedDemonstration([1, 2, 3, 4, 5], 3 * (1 - mixed), is_pretraining=bool(mixed))
            for mixed in rows
        ]
    )
    weight, counted = 0.25, batch.loss_mask
    factors = torch.tensor([weight if mixed else 1.0 for mixed in rows]).repeat_interleave(5)
    total = (factors * counted).sum()
    hidden = torch.randn(10, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    matrix = torch.randn(11, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)
    model: Any = SimpleNamespace(lm_head=lambda: {"weight": matrix})
    sft._weighted_loss(model, hidden, batch, total, weight).backward()
    loss = sft._weighted_loss(model, hidden, batch, total, weight)
    exact = hidden.detach().double().requires_grad_()
    logprobs = (exact @ matrix.detach().double().T).log_softmax(-1)
    chosen = logprobs.gather(1, batch.labels.clamp(min=0)[:, None]).squeeze(1)
    expected = -(factors * counted * chosen).sum() / total
    expected.backward()
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    torch.testing.assert_close(hidden.grad, exact.grad.float(), rtol=1e-4, atol=1e-6)
