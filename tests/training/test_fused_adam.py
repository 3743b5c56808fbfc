"""An Adam that counts steps like Transformer Engine's and apex's resumes exactly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import megatron.core.optimizer
import pytest
import torch

from fastrlhf.checkpoint.checkpointer import Checkpointer


class FusedAdam(torch.optim.Optimizer):
    """AdamW with their interface: the first step creates one count per group, and the moments."""

    def __init__(
        self,
        params: Any,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        adam_w_mode: bool,
        capturable: bool = False,
    ) -> None:
        assert adam_w_mode and not capturable
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            (beta1, beta2), step = group["betas"], group["step"]
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state |= {
                        name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")
                    }
                first = state["exp_avg"].lerp_(parameter.grad, 1 - beta1) / (1 - beta1**step)
                second = state["exp_avg_sq"].lerp_(parameter.grad.square(), 1 - beta2) / (
                    1 - beta2**step
                )
                update = first / (second.sqrt() + group["eps"]) + group["weight_decay"] * parameter
                parameter -= group["lr"] * update


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_count_of_steps_is_restored(
    dtype: str,
    monkeypatch: pytest.MonkeyPatch,
    training: Callable[..., Any],
    checkpointer: Callable[..., Checkpointer],
) -> None:
    with_torch = training(dtype, seed=1).steps([0, 1, 2])
    monkeypatch.setattr(megatron.core.optimizer, "Adam", FusedAdam, raising=False)
    monkeypatch.setattr(megatron.core.optimizer, "USING_PYTORCH_OPTIMIZER", False)
    run = training(dtype, seed=1)
    assert isinstance(run.learner.optimizer.optimizer, FusedAdam)
    begun = run.steps([0, 1])
    checkpointer().save(2, run, {"step": 2})
    unbroken = run.steps([2, 3])
    assert begun[1]["loss"] == pytest.approx(with_torch[1]["loss"], rel=1e-4)  # it is AdamW
    again = training(dtype, seed=9)
    checkpointer().load(checkpointer().path(2), again)
    assert again.steps([2, 3]) == unbroken
