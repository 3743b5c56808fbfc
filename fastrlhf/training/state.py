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
from fastrlhf.training.optimizer import torch_adams
from fastrlhf.training.shards import Tensor, Values

_MOMENTS = ("exp_avg", "exp_avg_sq")
_TRACKER = "tracker."


def is_sharded_over_data(learner: Any) -> bool:
    """Whether every data-parallel rank keeps a part of the optimizer's state of its own."""
    return any(isinstance(part, DistributedOptimizer) for part in learner.optimizer.chained_optimizers)


def optimizer_values(learner: Any) -> Values:
    """Adam's moments of a parameter, and its fp32 master if it is trained in half precision."""

    def values(parameter: torch.nn.Parameter) -> dict[str, tuple[Tensor, int]]:
        for part in learner.optimizer.chained_optimizers:
            if isinstance(part, DistributedOptimizer):
                if parameter not in part.model_param_group_index_map:
                    continue
                first = part._get_model_param_range_map(parameter)["param"].start
                group, number = part.model_param_group_index_map[parameter]
                main = part.optimizer.param_groups[group]["params"][number]
            else:
                first = 0
                main = getattr(parameter, "main_param", parameter)
            state = part.optimizer.state[main]
            for name in _MOMENTS:
                # Optimizers other than torch's make their state in the first step.
                if name not in state:
                    state[name] = torch.zeros_like(main, dtype=torch.float32)
            found = {name: (state[name].view(-1), first) for name in _MOMENTS}
            if parameter.dtype != torch.float32:
                found["master"] = (main.detach().view(-1), first)
            return found
        return {}

    return values


def learner_state(learner: Any) -> dict[str, Any]:
    """Updates made and the fp16 loss scale, for JSON."""
    scalers = [_scaler_state(part) for part in learner.optimizer.chained_optimizers]
    return {"updates": learner.scheduler.num_steps, "loss_scalers": scalers}


def restore_learner(learner: Any, state: dict[str, Any]) -> None:
    """Sets the counts of `learner_state`: learning rate, Adam's bias correction and loss scale go on from there."""
    updates = state["updates"]
    learner.scheduler.num_steps = 0
    learner.scheduler.step(increment=updates)
    for part, scaler in zip(learner.optimizer.chained_optimizers, state["loss_scalers"], strict=True):
        if scaler is not None:
            part.grad_scaler.load_state_dict({**scaler, "scale": torch.tensor([scaler["scale"]])})
        for group in part.optimizer.param_groups:
            if "step" in group:  # Transformer Engine's and apex's Adam count here
                group["step"] = updates
    for adam in torch_adams(learner.optimizer):
        for values in adam.state.values():
            values["step"].fill_(updates)


def _scaler_state(part: Any) -> dict[str, Any] | None:
    scaler = getattr(part, "grad_scaler", None)
    state = scaler.state_dict() if scaler is not None else {}
    return {**state, "scale": state["scale"].item()} if state else None


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
