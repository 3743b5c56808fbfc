"""A model in training: megatron's DDP buffers, optimizer and learning-rate schedule behind two calls, `accumulate` and
`step`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from fastrlhf.config import OptimizerConfig, ScheduleConfig
from fastrlhf.parallel import schedule as pipeline
from fastrlhf.parallel.mesh import Mesh


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
        overlap = mesh.device.type == "cuda" and mesh.data_size > 1
        self.ddp = DistributedDataParallel(
            config,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                use_distributed_optimizer=optimizer.distributed,
                overlap_grad_reduce=overlap,
                overlap_param_gather=False,
            ),
            stage,
        )
        self.optimizer = get_megatron_optimizer(_megatron_optimizer(optimizer, config, lr, min_lr), [self.ddp])
        _allocate_state(self.optimizer)
        self.scheduler = _scheduler(self.optimizer, schedule, lr, min_lr, optimizer.weight_decay, total_steps)
        config.grad_scale_func = self.optimizer.scale_loss
        config.no_sync_func = self.ddp.no_sync if overlap else None

    def accumulate(
        self, batches: Sequence[Any], head: Callable[[torch.Tensor, Any], Any]
    ) -> list[dict[str, torch.Tensor]]:
        """Clears the gradients, then sums those of all micro-batches and data-parallel ranks; see
        `schedule.forward_backward`.
        """
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        return pipeline.forward_backward(self.mesh, self.ddp, batches, head)

    def step(self) -> dict[str, float]:
        """Clips, updates the weights and moves the schedule. Returns lr, grad_norm, and 1.0 in `skipped` on fp16
        overflow.
        """
        lr = self.optimizer.param_groups[0]["lr"]
        updated, grad_norm, _ = self.optimizer.step()
        if updated:
            self.scheduler.step(increment=1)
        metrics = {"lr": float(lr), "grad_norm": float(grad_norm or 0.0)}
        if self.stage.config.fp16:
            metrics |= {"skipped": float(not updated), "loss_scale": float(self.optimizer.get_loss_scale())}
        return metrics


def torch_adams(optimizer: Any) -> Iterator[torch.optim.Adam]:
    """torch's Adams inside megatron's optimizer; none where Transformer Engine or apex brings its own."""
    for part in optimizer.chained_optimizers:
        if isinstance(part.optimizer, torch.optim.Adam):
            yield part.optimizer


def _allocate_state(optimizer: Any) -> None:
    """Gives torch's Adam its state now, as its first step would: megatron neither saves nor loads a state that is not
    there.
    """
    for adam in torch_adams(optimizer):
        for group in adam.param_groups:
            for parameter in group["params"]:
                moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                adam.state[parameter] = {"step": torch.tensor(0.0), **moments}


def _megatron_optimizer(optimizer: OptimizerConfig, config: Any, lr: float, min_lr: float) -> MegatronOptimizerConfig:
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
        use_distributed_optimizer=optimizer.distributed,
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
        for copy, weights in self._pairs():
            copy.lerp_(weights.float(), 1.0 - self.decay)

    def _pairs(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return zip(self.stage.parameters(), self.source.parameters(), strict=True)
