"""megatron-core's gradient buffers, Adam and learning-rate schedule, built from our configuration.

This is the only module that uses the internals of megatron's optimizers. Their chain has one
optimizer here; it has more only for mixtures of experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import (
    ChainedOptimizer,
    MegatronOptimizer,
    MixedPrecisionOptimizer,
)
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.transformer_config import TransformerConfig

from fastrlhf.config import OptimizerConfig, ScheduleConfig
from fastrlhf.parallel.mesh import Mesh

Tensor = torch.Tensor
_MOMENTS = ("exp_avg", "exp_avg_sq")


def wrap_data_parallel(
    mesh: Mesh, stage: torch.nn.Module, config: TransformerConfig, *, is_sharded: bool
) -> DistributedDataParallel:
    """Return `stage` with contiguous fp32 gradient buffers, reduced over data-parallel ranks.

    `is_sharded`: the distributed optimizer will keep one shard of the state on each rank.
    """
    return DistributedDataParallel(
        config,
        DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=is_sharded,
            overlap_grad_reduce=mesh.data_size > 1,
            # megatron would gather the weights in hooks of the training forward pass; rollouts, the
            # LM head and the running average read them outside of it.
            overlap_param_gather=False,
        ),
        stage,
    )


def build_optimizer(
    ddp: DistributedDataParallel,
    optimizer: OptimizerConfig,
    lr: float,
    min_lr: float,
    *,
    is_sharded: bool,
) -> ChainedOptimizer:
    """Build AdamW over the parameters of `ddp`, with its state and fp32 masters allocated."""
    config: TransformerConfig = ddp.config
    chain = get_megatron_optimizer(
        MegatronOptimizerConfig(
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
            use_distributed_optimizer=is_sharded,
        ),
        [ddp],
        use_gloo_process_groups=False,
    )
    _allocate_state(chain)
    return chain


def _allocate_state(chain: ChainedOptimizer) -> None:
    """Allocate Adam's state eagerly and enable its fused kernel.

    megatron only saves and loads optimizer state that already exists, and torch allocates it at the
    first step. The fused kernel makes one pass over memory, without temporaries of the size of the
    weights.
    """
    for part in chain.chained_optimizers:
        if not isinstance(part.optimizer, torch.optim.Adam):
            continue  # Transformer Engine and apex bring their own
        for group in part.optimizer.param_groups:
            group["fused"] = True
            for parameter in group["params"]:
                moments = {name: torch.zeros_like(parameter) for name in _MOMENTS}
                # The fused kernel reads the count on the parameter's device.
                part.optimizer.state[parameter] = {
                    "step": torch.zeros((), device=parameter.device),
                    **moments,
                }


def build_scheduler(
    chain: ChainedOptimizer,
    optimizer: OptimizerConfig,
    schedule: ScheduleConfig,
    lr: float,
    min_lr: float,
    steps: int,
) -> OptimizerParamScheduler:
    """Return the learning-rate schedule over `steps` updates."""
    return OptimizerParamScheduler(
        chain,
        init_lr=lr * schedule.warmup_start,
        max_lr=lr,
        min_lr=min_lr,
        lr_warmup_steps=schedule.warmup_steps,
        # megatron requires that the warm-up ends before the decay; a run shorter than its warm-up
        # ends before either.
        lr_decay_steps=max(steps, schedule.warmup_steps + 1),
        lr_decay_style=schedule.decay,
        start_wd=optimizer.weight_decay,
        end_wd=optimizer.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=False,
    )


def reduced_gradients(mesh: Mesh, ddp: DistributedDataParallel) -> Iterator[Tensor]:
    """Yield the parts of megatron's buffers that hold sums over the data-parallel ranks.

    With the distributed optimizer that is this rank's shard of each bucket, otherwise the full bucket.
    """
    for buffer in ddp.buffers:
        for bucket in buffer.buckets:
            shards = mesh.data_size if buffer.ddp_config.use_distributed_optimizer else 1
            yield bucket.grad_data.chunk(shards)[mesh.data_rank if shards > 1 else 0]


def gradient_norm(chain: ChainedOptimizer) -> float:
    """Return the norm of the accumulated gradient over all ranks, without the loss scale.

    It is inf or nan on overflow.
    """
    for part in chain.chained_optimizers:
        # The first part of `step`, without unscaling and overflow checks.
        if isinstance(part, MixedPrecisionOptimizer):
            part._copy_model_grads_to_main_grads()
        else:
            part.prepare_grads()
    return float(chain.get_grad_norm()) / float(chain.get_loss_scale())


# ---- optimizer state in checkpoints --------------------------------------------------------------


def is_sharded_over_data(chain: ChainedOptimizer) -> bool:
    """Return whether every data-parallel rank keeps its own part of the optimizer state."""
    return isinstance(_single(chain), DistributedOptimizer)


def parameter_state(
    chain: ChainedOptimizer, stage: torch.nn.Module
) -> dict[Tensor, dict[str, tuple[Tensor, int]]]:
    """Return parameter -> name -> (flat state tensor, its offset).

    The offset is that of its first element in the flattened parameter. Names are Adam's moments
    "exp_avg" and "exp_avg_sq", and "master" for a half-precision parameter's fp32 copy. Parameters
    whose state is on other data-parallel ranks are omitted.
    """
    part = _single(chain)
    return {
        parameter: _state_of(part, parameter, main, first)
        for parameter, (main, first) in _main_parameters(part, stage).items()
    }


def _state_of(
    part: MegatronOptimizer, parameter: Tensor, main: Tensor, first: int
) -> dict[str, tuple[Tensor, int]]:
    state = part.optimizer.state[main]
    for name in _MOMENTS:
        # Optimizers other than torch's allocate their state in the first step.
        if name not in state:
            state[name] = torch.zeros_like(main, dtype=torch.float32)
    found = {name: (state[name].view(-1), first) for name in _MOMENTS}
    if parameter.dtype != torch.float32:
        found["master"] = (main.detach().view(-1), first)
    return found


def _main_parameters(
    part: MegatronOptimizer, stage: torch.nn.Module
) -> dict[Tensor, tuple[Tensor, int]]:
    """Return parameter -> (fp32 tensor that the optimizer updates, its offset).

    The offset is that of its first element in the flattened parameter.
    """
    if not isinstance(part, DistributedOptimizer):
        return {
            parameter: (getattr(parameter, "main_param", parameter), 0)
            for parameter in stage.parameters()
        }
    # megatron's own map is wrong for models of two dtypes (half-precision layers, fp32 head): it
    # counts in the order of the gradient buffers, but the inner optimizer has the fp32 parameters
    # first.
    found = {}
    for models, shards in (
        (part.model_float16_groups, part.shard_fp32_from_float16_groups),
        (part.model_fp32_groups, part.shard_fp32_groups),
    ):
        for group, shard_group in zip(models, shards, strict=True):
            for parameter, shard in zip(group, shard_group, strict=True):
                own = part._get_model_param_range_map(parameter)["param"]
                assert own.size == shard.numel()
                found[parameter] = (shard, own.start)
    return found


def loss_scale_state(chain: ChainedOptimizer) -> dict[str, float] | None:
    """Return the state of the fp16 loss scale, for JSON; None in other dtypes."""
    scaler = getattr(_single(chain), "grad_scaler", None)
    state = scaler.state_dict() if scaler is not None else {}
    return {**state, "scale": state["scale"].item()} if state else None


def restore_counts(
    chain: ChainedOptimizer,
    scheduler: OptimizerParamScheduler,
    updates: int,
    loss_scale: Mapping[str, float] | None,
) -> None:
    """Set the number of updates made (learning rate, Adam's bias correction) and the loss scale."""
    part = _single(chain)
    scheduler.num_steps = 0
    scheduler.step(increment=updates)
    if loss_scale is not None:
        part.grad_scaler.load_state_dict(
            {**loss_scale, "scale": torch.tensor([loss_scale["scale"]])}
        )
    if isinstance(part.optimizer, torch.optim.Adam):
        for values in part.optimizer.state.values():
            values["step"].fill_(updates)
    else:
        # Transformer Engine's and apex's Adam keep the count in the group, from the first step on.
        for group in part.optimizer.param_groups:
            group["step"] = updates


def _single(chain: ChainedOptimizer) -> MegatronOptimizer:
    (part,) = chain.chained_optimizers
    return part
