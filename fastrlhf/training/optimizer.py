"""A model in training: megatron's DDP buffers, optimizer and learning-rate schedule behind two calls, `accumulate` and
`step`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.optimizer import MixedPrecisionOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from fastrlhf.config import OptimizerConfig, ScheduleConfig
from fastrlhf.errors import UserError
from fastrlhf.parallel import schedule as pipeline
from fastrlhf.parallel.mesh import Mesh
from fastrlhf.parallel.watchdog import current_phase


class Learner:
    """Owns one stage's gradients and updates. `total_steps` is the length of the learning-rate schedule, in updates."""

    def __init__(
        self,
        mesh: Mesh,
        stage: Any,
        optimizer: OptimizerConfig,
        schedule: ScheduleConfig,
        *,
        total_steps: int,
        lr: float | None = None,
    ) -> None:
        self.mesh = mesh
        self.stage = stage
        config = stage.config
        lr = lr or optimizer.lr
        min_lr = 0.0 if schedule.decay == "constant" else lr * schedule.min_lr_ratio
        # On its own, a rank would only copy gradients and weights from and to itself.
        shared = mesh.data_size > 1
        sharded = optimizer.distributed and shared
        self.ddp = DistributedDataParallel(
            config,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                use_distributed_optimizer=sharded,
                overlap_grad_reduce=shared,
                # megatron would gather the weights in hooks of the training forward; rollouts, the LM head and the
                # running average read them without it.
                overlap_param_gather=False,
            ),
            stage,
        )
        self.optimizer = get_megatron_optimizer(
            _megatron_optimizer(optimizer, config, lr, min_lr, sharded=sharded),
            [self.ddp],
            use_gloo_process_groups=False,
        )
        _allocate_state(self.optimizer)
        self.scheduler = _scheduler(self.optimizer, schedule, lr, min_lr, optimizer.weight_decay, total_steps)
        config.grad_scale_func = self.optimizer.scale_loss
        config.no_sync_func = self.ddp.no_sync if shared else None

    def accumulate(
        self, batches: Sequence[Any], head: Callable[[torch.Tensor, Any], Any]
    ) -> list[dict[str, torch.Tensor]]:
        """Clears the gradients, then sums those of all micro-batches and data-parallel ranks; see
        `schedule.forward_backward`.
        """
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        return pipeline.forward_backward(self.mesh, self.ddp, batches, head)

    def accumulate_apart(
        self, parts: Sequence[Sequence[Any]], head: Callable[[torch.Tensor, Any], Any]
    ) -> tuple[list[dict[str, torch.Tensor]], list[float]]:
        """As `accumulate` of all `parts` one after another, and the norm of each part's own gradient.

        The norm of a part is that of its sum over all ranks, so each part is reduced by itself and set aside while the
        next one is: a reduction and a pipeline flush more than `accumulate` for each part after the first, and a copy
        of the gradients that this rank holds after a reduction (with the distributed optimizer its own shard).
        """
        rows: list[dict[str, torch.Tensor]] = []
        norms: list[float] = []
        before: list[torch.Tensor] = []
        for part in parts:
            rows += self.accumulate(part, head)
            norms.append(self.grad_norm())
            reduced = list(self._reduced_gradients())
            if before:
                torch._foreach_add_(reduced, before)
            before = [gradients.clone() for gradients in reduced] if part is not parts[-1] else []
        return rows, norms

    def grad_norm(self) -> float:
        """Norm of the accumulated gradient over all ranks, loss scale divided out; inf or nan after an overflow."""
        for part in self.optimizer.chained_optimizers:
            # What `step` does first, but for unscaling and counting overflows.
            mixed = isinstance(part, MixedPrecisionOptimizer)
            part._copy_model_grads_to_main_grads() if mixed else part.prepare_grads()
        return float(self.optimizer.get_grad_norm()) / float(self.optimizer.get_loss_scale())

    def _reduced_gradients(self) -> Iterator[torch.Tensor]:
        """The parts of megatron's buffers that hold sums over the data-parallel ranks: this rank's shard of each bucket
        with the distributed optimizer, else all.
        """
        for buffer in self.ddp.buffers:
            for bucket in buffer.buckets:
                shards = self.mesh.data_size if buffer.ddp_config.use_distributed_optimizer else 1
                yield bucket.grad_data.chunk(shards)[self.mesh.data_rank if shards > 1 else 0]

    def step(self) -> dict[str, float]:
        """Clips, updates the weights and moves the schedule. Returns lr, grad_norm, and 1.0 in `skipped` on fp16
        overflow. A gradient that is not finite with fp32 or bf16 raises `UserError`: what has been saved stays good.
        """
        lr = self.optimizer.param_groups[0]["lr"]
        updated, grad_norm, _ = self.optimizer.step()
        if updated and not math.isfinite(grad_norm or 0.0):
            raise UserError(
                f"{current_phase()}: the gradient norm is {grad_norm}; stopped, and the last checkpoint is untouched: "
                "resume from it with a lower learning rate, and look at the loss in metrics.jsonl"
            )
        if updated:
            self.scheduler.step(increment=1)
        metrics = {"lr": float(lr), "grad_norm": float(grad_norm or 0.0)}
        if self.stage.config.fp16:
            metrics |= {"skipped": float(not updated), "loss_scale": float(self.optimizer.get_loss_scale())}
        return metrics


def _allocate_state(optimizer: Any) -> None:
    """Gives torch's Adam its state now, as its first step would, for megatron neither saves nor loads a state that is
    not there; and its fused kernel: one pass over memory, and no temporaries of the size of the weights.
    """
    for part in optimizer.chained_optimizers:
        if not isinstance(part.optimizer, torch.optim.Adam):
            continue  # Transformer Engine and apex bring their own
        for group in part.optimizer.param_groups:
            group["fused"] = True
            for parameter in group["params"]:
                moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                # The fused kernel reads the count on the parameter's device.
                part.optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device), **moments}


def _megatron_optimizer(
    optimizer: OptimizerConfig, config: Any, lr: float, min_lr: float, *, sharded: bool
) -> MegatronOptimizerConfig:
    return MegatronOptimizerConfig(
        optimizer="adam",
        lr=lr,
        min_lr=min_lr,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.beta1,
        adam_beta2=optimizer.beta2,
        adam_eps=optimizer.eps,
        clip_grad=optimizer.clip_grad,
        fp16=config.fp16,
        bf16=config.bf16,
        params_dtype=config.params_dtype,
        initial_loss_scale=optimizer.initial_loss_scale,
        use_distributed_optimizer=sharded,
    )


def _scheduler(
    optimizer: Any, schedule: ScheduleConfig, lr: float, min_lr: float, weight_decay: float, total_steps: int
) -> OptimizerParamScheduler:
    return OptimizerParamScheduler(
        optimizer,
        init_lr=lr * schedule.warmup_start,
        max_lr=lr,
        min_lr=min_lr,
        lr_warmup_steps=schedule.warmup_steps,
        # megatron wants the warm-up to end before the decay does; a run shorter than its warm-up never gets there.
        lr_decay_steps=max(total_steps, schedule.warmup_steps + 1),
        lr_decay_style=schedule.decay,
        start_wd=weight_decay,
        end_wd=weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=False,
    )


class ExponentialAverage:
    """Exponential moving average of a stage's weights: average <- decay * average + (1 - decay) * weights.

    The average is a stage of its own (fp32, same layout), so that it is evaluated, saved and resumed like any other
    model.
    """

    def __init__(self, stage: torch.nn.Module, average: torch.nn.Module, decay: float) -> None:
        self.source = stage
        self.stage = average
        self.decay = decay
        with torch.no_grad():
            for copy, weights in self._pairs():
                copy.copy_(weights)

    @torch.no_grad()
    def update(self) -> None:
        """Moves the average towards the weights as they are now."""
        for copy, weights in self._pairs():
            copy.lerp_(weights.float(), 1.0 - self.decay)

    def _pairs(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return zip(self.stage.parameters(), self.source.parameters(), strict=True)
