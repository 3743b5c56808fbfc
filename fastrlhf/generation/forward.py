"""A pipeline stage as generation runs it: the forward pass written out, in the form that megatron's schedules call."""

from __future__ import annotations

import torch

from fastrlhf.models.eager_forward import forward
from fastrlhf.models.gpt import GPT, CachedInput

Tensor = torch.Tensor


class Forward:
    """`forward(batch)` maps a `CachedInput` of T tokens to hidden states, as `models.direct.forward` does."""

    def __init__(self, stage: GPT) -> None:
        self.stage = stage
        self.config = stage.config
        self.model_type = stage.model_type
        self._input: Tensor | None = None

    def set_input_tensor(self, input_tensor: list[Tensor | None]) -> None:
        """megatron's schedules hand over the previous stage's output here."""
        self._input = input_tensor[0]

    def __call__(self, batch: CachedInput) -> Tensor:
        return forward(self.stage, batch, self._input)
