"""Reference log-probs, values and scores of sampled episodes.

Data-parallel ranks share the episodes of an iteration. Out of scope: sampling, penalties, the KL
and updates (ppo.py).
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from fastrlhf import ops
from fastrlhf.algorithms.rewards import OnDevice, Rewards
from fastrlhf.algorithms.rollouts import Rollouts, counted_positions, own_rows
from fastrlhf.config import TrainConfig
from fastrlhf.data.batches import PackedBatch
from fastrlhf.models.gpt import GPT
from fastrlhf.parallel import schedule
from fastrlhf.parallel.mesh import Mesh

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Tensor = torch.Tensor


@dataclass(kw_only=True)
class EpisodeScorer:
    """The models that read complete episodes, and the order in which they do."""

    mesh: Mesh
    train: TrainConfig
    tokenizer: PreTrainedTokenizerFast
    reference: GPT
    value: GPT
    rewards: Rewards
    temperature: float
    """Sampling temperature, at which the reference's log-probs are taken too."""
    on_device: OnDevice = field(default=nullcontext)

    def score(self, rollouts: Rollouts, *, with_values: bool = True) -> Rollouts:
        """Fill in reference log-probs, scores and, if they are needed, values."""
        mesh = self.mesh
        episodes = torch.arange(rollouts.scores.numel())
        micro_batches = own_rows(mesh, episodes, rollouts.lengths, self.train)
        batches = [rollouts.pack(rows) for rows in micro_batches]
        rows = torch.cat(micro_batches)
        with self.on_device(self.reference):
            reference = schedule.forward(mesh, self.reference, batches, self._reference_logprobs)
        values = schedule.forward(mesh, self.value, batches, self._values) if with_values else None
        scores = self.rewards.score(mesh, rollouts, rows, batches, self.tokenizer)

        def per_token(parts: list[Tensor]) -> Tensor:
            own = mesh.from_last_stage(torch.cat(parts) if mesh.is_last_stage else None)
            return rollouts.all_gather_rows(mesh, rows, rollouts.to_padded(rows, own))

        return replace(
            rollouts,
            ref_logprobs=per_token(reference),
            values=per_token(values) if values is not None else rollouts.values,
            scores=rollouts.all_gather_rows(mesh, rows, scores),
        )

    def _reference_logprobs(self, hidden: Tensor, batch: PackedBatch) -> Tensor:
        logprobs = label_logprobs(self.reference, hidden, batch, self.temperature)
        return logprobs[counted_positions(batch)]

    def _values(self, hidden: Tensor, batch: PackedBatch) -> Tensor:
        return self.value.score(hidden[counted_positions(batch)])


def label_logprobs(model: GPT, hidden: Tensor, batch: PackedBatch, temperature: float) -> Tensor:
    """Return the labels' log-probs at `temperature`; fp32 [T], 0 where masked."""
    return ops.linear_logprobs(
        hidden,
        labels=batch.labels,
        mask=batch.loss_mask,
        num_counted=batch.num_counted,
        temperature=temperature,
        **model.lm_head(),
    ).logprobs
