"""A model in training: gradient buffers, optimizer, learning-rate schedule and moving average."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch

from fastrlhf.checkpoint.shards import Values
from fastrlhf.checkpoint.soundness import DivergedError
from fastrlhf.checkpoint.state import LearnerState
from fastrlhf.config import OptimizerConfig, ScheduleConfig
from fastrlhf.models.gpt import GPT
from fastrlhf.parallel import optimizer as megatron_optimizer
from fastrlhf.parallel import schedule as pipeline
from fastrlhf.parallel.mesh import Mesh
from fastrlhf.parallel.schedule import LossHead, Metrics
from fastrlhf.parallel.watchdog import current_phase

Batch = TypeVar("Batch")


class Learner:
    """A model with its gradients, AdamW and a learning-rate schedule over `total_steps` updates.

    Implements `algorithms.protocols.Learner` and `checkpoint.state.SavedLearner`.
    """

    def __init__(
        self,
        mesh: Mesh,
        model: GPT,
        optimizer: OptimizerConfig,
        schedule: ScheduleConfig,
        *,
        total_steps: int,
        lr: float | None = None,
    ) -> None:
        self.mesh = mesh
        self.model = model
        config = model.config
        lr = lr or optimizer.lr
        min_lr = 0.0 if schedule.decay == "constant" else lr * schedule.min_lr_ratio
        # A single rank would only copy gradients and weights to itself.
        is_shared = mesh.data_size > 1
        is_sharded = optimizer.distributed and is_shared
        self.ddp = megatron_optimizer.wrap_data_parallel(mesh, model, config, is_sharded=is_sharded)
        self.optimizer = megatron_optimizer.build_optimizer(
            self.ddp, optimizer, lr, min_lr, is_sharded=is_sharded
        )
        self.scheduler = megatron_optimizer.build_scheduler(
            self.optimizer, optimizer, schedule, lr, min_lr, total_steps
        )
        config.grad_scale_func = self.optimizer.scale_loss
        config.no_sync_func = self.ddp.no_sync if is_shared else None

    def accumulate(self, batches: Sequence[Batch], head: LossHead[Batch]) -> list[Metrics]:
        """Clear the gradients, then sum those of all micro-batches and data-parallel ranks.

        Returns the metrics of `head` on the last pipeline stage, see `schedule.forward_backward`.
        """
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        return pipeline.forward_backward(self.mesh, self.ddp, batches, head)

    def accumulate_with_norms(
        self, parts: Sequence[Sequence[Batch]], head: LossHead[Batch]
    ) -> tuple[list[Metrics], list[float]]:
        """Sum the gradients of all `parts`, and return the norm of each part's own gradient too.

        The norm of a part is that of its sum over all ranks, so each part is reduced separately and
        kept aside while the next one is computed. Each part after the first costs one more
        reduction and pipeline flush than `accumulate`, and a copy of the gradients that this rank
        holds after a reduction (its own shard with the distributed optimizer).
        """
        rows: list[Metrics] = []
        norms: list[float] = []
        before: list[torch.Tensor] = []
        for part in parts:
            rows += self.accumulate(part, head)
            norms.append(megatron_optimizer.gradient_norm(self.optimizer))
            reduced = list(megatron_optimizer.reduced_gradients(self.mesh, self.ddp))
            if before:
                torch._foreach_add_(reduced, before)
            before = [gradients.clone() for gradients in reduced] if part is not parts[-1] else []
        return rows, norms

    def step(self) -> dict[str, float]:
        """Clip the gradients, update the weights and advance the schedule.

        Returns lr and grad_norm, and with fp16 also `skipped` (1.0 after an overflow) and
        loss_scale. Raises DivergedError if a gradient of an fp32 or bf16 model is not finite.
        """
        lr = self.optimizer.param_groups[0]["lr"]
        updated, grad_norm, _ = self.optimizer.step()
        if updated and not math.isfinite(grad_norm or 0.0):
            raise DivergedError(
                f"{current_phase()}: the gradient norm is {grad_norm}; stopped without saving this"
                " update (see the loss in metrics.jsonl)"
            )
        if updated:
            self.scheduler.step(increment=1)
        metrics = {"lr": float(lr), "grad_norm": float(grad_norm or 0.0)}
        if self.model.config.fp16:
            metrics |= {
                "skipped": float(not updated),
                "loss_scale": float(self.optimizer.get_loss_scale()),
            }
        return metrics

    def reload_weights(self) -> None:
        """Copy the weights to the fp32 masters, after they were changed outside `step`."""
        self.optimizer.reload_model_params()

    # ---- contents of a checkpoint ---------------------------------------------------------------

    @property
    def is_sharded_over_data(self) -> bool:
        """Whether every data-parallel rank keeps its own part of the optimizer state."""
        return megatron_optimizer.is_sharded_over_data(self.optimizer)

    def optimizer_values(self) -> Values:
        """Return the optimizer state of each parameter, for `checkpoint.shards.parts_of`."""
        state = megatron_optimizer.parameter_state(self.optimizer, self.model)
        return lambda parameter: state.get(parameter, {})

    def state_dict(self) -> LearnerState:
        """Return the number of updates made and the fp16 loss scale."""
        return {
            "updates": self.scheduler.num_steps,
            "loss_scale": megatron_optimizer.loss_scale_state(self.optimizer),
        }

    def load_state_dict(self, state: LearnerState) -> None:
        """Restore what `state_dict` returned."""
        megatron_optimizer.restore_counts(
            self.optimizer, self.scheduler, state["updates"], state["loss_scale"]
        )


class ExponentialAverage:
    """Exponential moving average of a model's weights.

    An update is average <- decay * average + (1 - decay) * weights. The average is an fp32 model of
    the same layout, so that it is evaluated, saved and resumed like any other. Implements
    `algorithms.protocols.MovingAverage`.
    """

    def __init__(self, source: GPT, average: GPT, decay: float) -> None:
        self.source = source
        self.model = average
        self.decay = decay
        with torch.no_grad():
            for copy, weights in self._pairs():
                copy.copy_(weights)

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the weights as they are now."""
        for copy, weights in self._pairs():
            copy.lerp_(weights.float(), 1.0 - self.decay)

    def _pairs(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return zip(self.model.parameters(), self.source.parameters(), strict=True)
