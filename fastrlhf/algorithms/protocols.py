"""What an algorithm is handed: models that learn, and a running average of one.

`training/optimizer.py` implements both. Algorithms know only these protocols, so that they do not depend on the
training loop or on the optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import torch

from fastrlhf.checkpoint.state import SavedLearner
from fastrlhf.models.gpt import GPT

Batch = TypeVar("Batch")
Metrics = dict[str, torch.Tensor]
LossHead = Callable[[torch.Tensor, Batch], tuple[torch.Tensor, Metrics]]
"""head(hidden [T, H], batch) -> (loss to differentiate, metrics to add up over micro-batches and ranks)."""


class Learner(SavedLearner, Protocol):
    """A model with its gradients and its optimizer."""

    model: GPT

    def accumulate(self, batches: Sequence[Batch], head: LossHead[Batch]) -> list[Metrics]:
        """Clear the gradients, then sum those of all micro-batches and data-parallel ranks."""
        ...

    def accumulate_with_norms(
        self, parts: Sequence[Sequence[Batch]], head: LossHead[Batch]
    ) -> tuple[list[Metrics], list[float]]:
        """Sum the gradients of all parts, and return the norm of each part's own gradient too."""
        ...

    def step(self) -> dict[str, float]:
        """Clip the gradients and update the weights; return lr and grad_norm."""
        ...

    def reload_weights(self) -> None:
        """Tell the optimizer that the weights were changed from outside."""
        ...


class MovingAverage(Protocol):
    """A running average of a model's weights, itself a model."""

    model: GPT

    def update(self) -> None:
        """Move the average towards the weights as they are now."""
        ...
