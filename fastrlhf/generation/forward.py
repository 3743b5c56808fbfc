"""A pipeline stage with the eager forward pass, in the interface that megatron's schedules call."""

from __future__ import annotations

import torch

from fastrlhf.models.eager_forward import forward
from fastrlhf.models.gpt import GPT
from fastrlhf.models.inputs import CachedInput

Tensor = torch.Tensor


class EagerStage:
    """Callable from a `CachedInput` of T tokens to hidden states, by `eager_forward.forward`."""

    def __init__(self, stage: GPT) -> None:
        self.stage = stage
        self.config = stage.config
        self.model_type = stage.model_type
        self._input: Tensor | None = None

    def set_input_tensor(self, input_tensor: list[Tensor | None]) -> None:
        """Receive the previous stage's output; called by megatron's schedules."""
        self._input = input_tensor[0]

    def __call__(self, batch: CachedInput) -> Tensor:
        return forward(self.stage, batch, self._input)
