"""Interfaces of what an algorithm trains: models with an optimizer, and a moving average of one.

`training/optimizer.py` implements both. Algorithms import only these protocols, so they do not
depend on the training loop or on the optimizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

from fastrlhf.checkpoint.state import SavedLearner
from fastrlhf.models.gpt import GPT
from fastrlhf.parallel.schedule import LossHead, Metrics

Batch = TypeVar("Batch")


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
        """Copy the model's weights to the optimizer, after they were changed outside `step`."""
        ...


class MovingAverage(Protocol):
    """A moving average of a model's weights, itself a model."""

    model: GPT

    def update(self) -> None:
        """Move the average towards the current weights."""
        ...
