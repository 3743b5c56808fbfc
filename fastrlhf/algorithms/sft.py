"""Supervised fine-tuning, and pretraining: next-token cross-entropy on the tokens that count.

The loss is the mean over all counted tokens of the global batch, whatever the micro-batch size or
layout (InstructGPT, section 3.5); pretraining rows that are mixed in may have another weight.
Out of scope: choosing the checkpoint by reward-model score (`fastrlhf eval`).

    torchrun --nproc-per-node 8 -m fastrlhf sft configs/instructgpt/1.3b/sft.yaml
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch

from fastrlhf import ops
from fastrlhf.algorithms.protocols import Learner
from fastrlhf.checkpoint.soundness import check_losses_finite
from fastrlhf.data.batches import PackedBatch
from fastrlhf.errors import UserError
from fastrlhf.models.gpt import GPT
from fastrlhf.parallel import schedule
from fastrlhf.parallel.mesh import Mesh
from fastrlhf.parallel.schedule import Metrics
from fastrlhf.parallel.watchdog import current_phase

Tensor = torch.Tensor


class SupervisedFinetuning:
    """Supervised fine-tuning, one update a step.

    `pretrain_weight` is the weight of the tokens of pretraining rows in the mean of the loss, in
    which other tokens have the weight 1. None: there are no such rows.
    """

    def __init__(self, mesh: Mesh, policy: Learner, pretrain_weight: float | None = None) -> None:
        self.mesh = mesh
        self.policy = policy
        self.pretrain_weight = pretrain_weight

    def step(self, micro_batches: Sequence[PackedBatch]) -> dict[str, float]:
        """Update the policy on this rank's micro-batches of the global batch; return metrics."""
        batches = [batch.to(self.mesh.device) for batch in micro_batches]
        tokens = counted_tokens(self.mesh, batches)
        weight = 1.0 if self.pretrain_weight is None else self.pretrain_weight
        shares, denominator = {}, tokens
        if self.pretrain_weight is not None:
            mixed, mixed_rows, rows = self.mesh.sum_over_data(_pretraining_counts(batches))
            denominator = tokens + (weight - 1) * mixed
            shares = {
                "pretrain_share_rows": float(mixed_rows / rows),
                "pretrain_share_loss": float(weight * mixed / denominator),
            }

        def head(hidden: Tensor, batch: PackedBatch) -> tuple[Tensor, Metrics]:
            loss = _weighted_loss(self.policy.model, hidden, batch, denominator, weight)
            return loss, {"loss": loss.detach()}

        metrics = self.mesh.sum_metrics(self.policy.accumulate(batches, head), ["loss"])
        if not self.policy.model.config.fp16:  # its optimizer skips updates that are not finite
            check_losses_finite(current_phase(), metrics)
        return metrics | self.policy.step() | {"tokens": float(tokens)} | shares

    def models(self) -> dict[str, GPT]:
        """Return the models that a checkpoint holds."""
        return {"policy": self.policy.model}

    def learners(self) -> dict[str, Learner]:
        """Return the learners whose optimizer state a checkpoint holds."""
        return {"policy": self.policy}

    def statistics(self) -> dict[str, float]:
        """Return nothing: only reward models have statistics."""
        return {}

    def state_dict(self) -> dict[str, object]:
        """Return nothing: the weights, the optimizer and the data are saved elsewhere."""
        return {}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Do nothing: there is no state."""


def counted_tokens(mesh: Mesh, batches: Sequence[PackedBatch]) -> Tensor:
    """Count the labels in the loss over all micro-batches and data-parallel ranks; fp32 scalar.

    Raises UserError if there are none: the mean loss would be 0/0.
    """
    counts = torch.stack([batch.loss_mask.sum() for batch in batches]).sum().float()
    counts = mesh.sum_over_data(counts)
    if not counts:
        raise UserError(
            f"{current_phase()}: no token of the global batch counts in the loss; look at its"
            " records with `fastrlhf data show`, or raise train.global_batch_size"
        )
    return counts


def language_loss(model: GPT, hidden: Tensor, batch: PackedBatch, denominator: Tensor) -> Tensor:
    """Return the summed cross-entropy of `batch` divided by `denominator`; hidden [T, H]."""
    return ops.linear_cross_entropy(
        hidden,
        labels=batch.labels,
        mask=batch.loss_mask,
        num_counted=batch.num_counted,
        denominator=denominator,
        **model.lm_head(),
    )


def _weighted_loss(
    model: GPT, hidden: Tensor, batch: PackedBatch, denominator: Tensor, weight: float
) -> Tensor:
    """Return `language_loss` in which the tokens of pretraining rows have the weight `weight`."""
    if batch.pretraining is None or weight == 1.0:
        return language_loss(model, hidden, batch, denominator)
    # Uncounted labels cost nothing in the LM head, so two calls cost what one costs.
    mixed = replace(batch, loss_mask=batch.loss_mask & batch.pretraining)
    rest = replace(batch, loss_mask=batch.loss_mask & ~batch.pretraining)
    return language_loss(model, hidden, rest, denominator) + weight * language_loss(
        model, hidden, mixed, denominator
    )


def _pretraining_counts(batches: Sequence[PackedBatch]) -> Tensor:
    """Return [counted labels of pretraining rows, pretraining rows, rows] of the batches."""
    counts = torch.zeros(3, device=batches[0].tokens.device)
    for batch in batches:
        counts[2] += batch.num_sequences
        if batch.pretraining is not None:
            counts[0] += (batch.loss_mask & batch.pretraining).sum()
            counts[1] += batch.pretraining[batch.cu_seqlens[:-1].long()].sum()
    return counts


def evaluate_loss(mesh: Mesh, model: GPT, batches: Iterable[Sequence[PackedBatch]]) -> float:
    """Return the mean cross-entropy per counted token over `batches`, with dropout off.

    Each element of `batches` is this rank's micro-batches of one step. Raises UserError if no token
    counts.
    """
    total = torch.zeros(2, dtype=torch.float64, device=mesh.device)
    one = torch.ones((), device=mesh.device)
    was_training = model.training
    model.eval()
    for step in batches:
        micro_batches = [batch.to(mesh.device) for batch in step]
        losses = schedule.forward(
            mesh, model, micro_batches, lambda hidden, b: language_loss(model, hidden, b, one)
        )
        total[0] += sum(losses, torch.zeros((), device=mesh.device))
        total[1] += sum(batch.loss_mask.sum() for batch in micro_batches)
    model.train(was_training)
    mesh.sum_over_data(total)
    total = mesh.from_last_stage(total if mesh.is_last_stage else None)
    if not total[1]:
        raise UserError(
            f"{current_phase()}: no token of data.valid counts in the loss; look at its records with"
            " `fastrlhf data show`"
        )
    return (total[0] / total[1]).item()
