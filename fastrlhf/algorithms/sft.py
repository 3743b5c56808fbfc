"""Supervised fine-tuning, and pretraining: next-token cross-entropy on the tokens that count.

The loss is the mean over all counted tokens of the global batch, whatever the micro-batch size or layout
(InstructGPT, section 3.5). Choosing the checkpoint by reward-model score is left to `fastrlhf eval`.

    torchrun --nproc-per-node 8 -m fastrlhf sft configs/instructgpt/1.3b/sft.yaml
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from fastrlhf import ops
from fastrlhf.data.batches import PackedBatch
from fastrlhf.parallel import schedule
from fastrlhf.parallel.mesh import Mesh


class SupervisedFinetuning:
    """One update a step from this rank's micro-batches of the global batch."""

    def __init__(self, mesh: Mesh, policy: Any) -> None:
        self.mesh = mesh
        self.policy = policy

    def step(self, micro_batches: Sequence[PackedBatch]) -> dict[str, float]:
        batches = [batch.to(self.mesh.device) for batch in micro_batches]
        tokens = counted_tokens(self.mesh, batches)

        def head(
            hidden: torch.Tensor, batch: PackedBatch
        ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            loss = language_loss(self.policy.model, hidden, batch, tokens)
            return loss, {"loss": loss.detach()}

        metrics = self.mesh.sum_metrics(self.policy.accumulate(batches, head))
        return metrics | self.policy.step() | {"tokens": float(tokens)}

    def models(self) -> dict[str, Any]:
        return {"policy": self.policy.model}

    def learners(self) -> dict[str, Any]:
        return {"policy": self.policy}

    def statistics(self) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def counted_tokens(mesh: Mesh, batches: Sequence[PackedBatch]) -> torch.Tensor:
    """Labels that count, over all micro-batches and data-parallel ranks; fp32 scalar."""
    counts = torch.stack([batch.loss_mask.sum() for batch in batches]).sum().float()
    return mesh.sum_over_data(counts)


def language_loss(
    stage: Any, hidden: torch.Tensor, batch: PackedBatch, denominator: torch.Tensor
) -> torch.Tensor:
    """Cross-entropy summed over the counted labels of `batch` / denominator; hidden [T, H]."""
    return ops.linear_cross_entropy(
        hidden,
        labels=batch.labels,
        mask=batch.loss_mask,
        num_counted=batch.num_counted,
        denominator=denominator,
        **stage.lm_head(),
    )


def evaluate_loss(mesh: Mesh, stage: Any, batches: Iterable[Sequence[PackedBatch]]) -> float:
    """Mean cross-entropy per counted token over `batches` (this rank's share of each), dropout off."""
    total = torch.zeros(2, dtype=torch.float64, device=mesh.device)
    one = torch.ones((), device=mesh.device)
    training, _ = stage.training, stage.eval()
    for step in batches:
        micro_batches = [batch.to(mesh.device) for batch in step]
        losses = schedule.forward(
            mesh, stage, micro_batches, lambda hidden, b: language_loss(stage, hidden, b, one)
        )
        total[0] += sum(losses, torch.zeros((), device=mesh.device))
        total[1] += sum(batch.loss_mask.sum() for batch in micro_batches)
    stage.train(training)
    mesh.sum_over_data(total)
    total = mesh.from_last_stage(total if mesh.is_last_stage else None)
    return (total[0] / total[1]).item()
