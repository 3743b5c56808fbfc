"""Initial weights that depend on the seed and the parameter's name, not on the parallel layout."""

from __future__ import annotations

import hashlib
import math

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel

from fastrlhf.models.stage import Stage, global_names

Tensor = torch.Tensor


@torch.no_grad()
def initialize_weights(stage: Stage, seed: int, prefix: str = "") -> None:
    """Initialize the parameters whose name begins with `prefix` as GPT-2's.

    Weights are N(0, init_std), residual projections are scaled by 1 / sqrt(2 * layers), norms are 1
    and biases 0. Padding rows of the vocabulary are 0. Each parameter is drawn in full from a
    generator seeded by (seed, name) and then sharded, so the model does not depend on the parallel
    layout.
    """
    config = stage.model_config
    for name, parameter in global_names(stage):
        if not name.startswith(prefix):
            continue
        if name.endswith("bias"):
            parameter.zero_()
        elif "norm" in name:
            parameter.fill_(1.0)
        else:
            std = config.init_std
            if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
                std /= math.sqrt(2 * config.num_layers)
            if name == "score.weight":
                std = stage.score.init_std
            parameter.copy_(draw_shard(stage, name, parameter, std, seed))


def parameter_seed(seed: int, name: str) -> int:
    """Return the seed of a parameter's initial weights: 63 bits of a hash of (seed, name).

    `parallel.mesh.hashed_seed` has 56 bits, because megatron adds to it. This function must not
    change: a seed would no longer give the same initial model.
    """
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def draw_shard(
    stage: Stage, name: str, parameter: torch.nn.Parameter, std: float, seed: int
) -> Tensor:
    """Draw the full parameter `name` from N(0, std) and return this rank's shard, on the CPU."""
    generator = torch.Generator().manual_seed(parameter_seed(seed, name))
    tensor_size, tensor_rank = stage.mesh.tensor_size, stage.mesh.tensor_rank
    sharded = tensor_size > 1 and getattr(parameter, "tensor_model_parallel", False)
    dim: int = getattr(parameter, "partition_dim", 0) if sharded else 0
    shape = list(parameter.shape)
    shape[dim] *= tensor_size if sharded else 1
    if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        rows = torch.empty(stage.vocab_size, shape[1]).normal_(0.0, std, generator=generator)
        full = F.pad(rows, (0, 0, 0, shape[0] - stage.vocab_size))
    else:
        full = torch.empty(shape).normal_(0.0, std, generator=generator)
    if not sharded:
        return full
    if stage.model_config.activation == "swiglu" and "linear_fc1" in name:
        # The gate projection is stacked on the up projection; each rank has its part of both.
        return torch.cat(
            [half.chunk(tensor_size, dim)[tensor_rank] for half in full.chunk(2, dim)], dim
        )
    return full.chunk(tensor_size, dim)[tensor_rank]


def mark_shards(stage: Stage) -> None:
    """Set the attributes by which megatron distinguishes shards from replicas.

    megatron's gradient norm and checkpoints read them. megatron sets them only if it initializes
    the weights, which `initialize_weights` does here.
    """
    for module in stage.modules():
        if isinstance(
            module, (tensor_parallel.ColumnParallelLinear, tensor_parallel.VocabParallelEmbedding)
        ):
            dim = 0
        elif isinstance(module, tensor_parallel.RowParallelLinear):
            dim = 1
        else:
            continue
        if module.weight is not None and not hasattr(module.weight, "tensor_model_parallel"):
            tensor_parallel.set_tensor_model_parallel_attributes(module.weight, True, dim, 1)
