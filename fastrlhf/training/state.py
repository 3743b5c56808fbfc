"""What a checkpoint holds besides weights: optimizer state, learning-rate schedule, loss scale, and generators.

Adam's moments and fp32 masters go into the shard files by parameter, whatever form of optimizer holds them; the rest
is small enough for JSON. Hyperparameters are not stored: a resumed run takes those of its configuration.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from safetensors.torch import load_file

from fastrlhf.parallel.mesh import Mesh
from fastrlhf.training.shards import Tensor, Values

_MOMENTS = ("exp_avg", "exp_avg_sq")
_TRACKER = "tracker."


def is_sharded_over_data(learner: Any) -> bool:
    """Whether every data-parallel rank keeps a part of the optimizer's state of its own."""
    return isinstance(_part(learner), DistributedOptimizer)


def _part(learner: Any) -> Any:
    """The one optimizer in megatron's chain (it has more for mixtures of experts)."""
    (part,) = learner.optimizer.chained_optimizers
    return part


def optimizer_values(learner: Any) -> Values:
    """Adam's moments of a parameter, and its fp32 master if it is trained in half precision."""
    part = _part(learner)
    mains = _shards(part) if is_sharded_over_data(learner) else _copies(learner.stage)

    def values(parameter: torch.nn.Parameter) -> dict[str, tuple[Tensor, int]]:
        if parameter not in mains:  # all of it is another data-parallel rank's
            return {}
        main, first = mains[parameter]
        state = part.optimizer.state[main]
        for name in _MOMENTS:
            # Optimizers other than torch's make their state in the first step.
            if name not in state:
                state[name] = torch.zeros_like(main, dtype=torch.float32)
        found = {name: (state[name].view(-1), first) for name in _MOMENTS}
        if parameter.dtype != torch.float32:
            found["master"] = (main.detach().view(-1), first)
        return found

    return values


def _copies(stage: Any) -> dict[Tensor, tuple[Tensor, int]]:
    """Parameter -> (the whole fp32 tensor that the optimizer moves: a copy, or itself; 0)."""
    return {parameter: (getattr(parameter, "main_param", parameter), 0) for parameter in stage.parameters()}


def _shards(part: Any) -> dict[Tensor, tuple[Tensor, int]]:
    """Parameter -> (this data-parallel rank's fp32 shard of it, where the shard begins in the flattened parameter).

    megatron's own map of them is wrong for models of two dtypes (a half-precision body, an fp32 head): it counts in
    the order of the gradient buffers, while the inner optimizer has the fp32 parameters first.
    """
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


def learner_state(learner: Any) -> dict[str, Any]:
    """Updates made and the fp16 loss scale, for JSON."""
    scaler = getattr(_part(learner), "grad_scaler", None)
    state = scaler.state_dict() if scaler is not None else {}
    loss_scale = {**state, "scale": state["scale"].item()} if state else None
    return {"updates": learner.scheduler.num_steps, "loss_scale": loss_scale}


def restore_learner(learner: Any, state: dict[str, Any]) -> None:
    """Sets the counts of `learner_state`: learning rate, Adam's bias correction and loss scale go on from there."""
    part, updates, loss_scale = _part(learner), state["updates"], state["loss_scale"]
    learner.scheduler.num_steps = 0
    learner.scheduler.step(increment=updates)
    if loss_scale is not None:
        part.grad_scaler.load_state_dict({**loss_scale, "scale": torch.tensor([loss_scale["scale"]])})
    if isinstance(part.optimizer, torch.optim.Adam):
        for values in part.optimizer.state.values():
            values["step"].fill_(updates)
    else:  # Transformer Engine's and apex's Adam count in the group, which lacks the count until their first step
        for group in part.optimizer.param_groups:
            group["step"] = updates


def generator_states(mesh: Mesh) -> dict[str, Tensor]:
    """Every generator of this process: torch's, megatron's, NumPy's and Python's."""
    states = {_TRACKER + name: state for name, state in get_cuda_rng_tracker().get_states().items()}
    states["cpu"] = torch.get_rng_state()
    if mesh.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state()
    _, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    states["numpy.keys"] = torch.from_numpy(np.asarray(keys, dtype=np.int64))
    states["numpy.rest"] = torch.tensor([position, has_gauss, gauss], dtype=torch.float64)
    version, words, gauss_next = random.getstate()
    states["python.words"] = torch.tensor(words, dtype=torch.int64)
    has_next = gauss_next is not None
    states["python.rest"] = torch.tensor([version, has_next, gauss_next if has_next else 0.0], dtype=torch.float64)
    return {name: state.clone() for name, state in states.items()}


def restore_generators(path: Path, mesh: Mesh) -> None:
    """Sets every generator of this process from its file."""
    states = load_file(path)
    torch.set_rng_state(states["cpu"])
    if mesh.device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"])
    get_cuda_rng_tracker().set_states({n[len(_TRACKER) :]: s for n, s in states.items() if n.startswith(_TRACKER)})
    position, has_gauss, gauss = states["numpy.rest"].tolist()
    keys = states["numpy.keys"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, int(position), int(has_gauss), gauss))
    version, has_next, gauss_next = states["python.rest"].tolist()
    random.setstate((int(version), tuple(states["python.words"].tolist()), gauss_next if has_next else None))
