"""The number of sequences that can decode at once within the memory of the KV cache."""

from __future__ import annotations

import functools
import logging

import torch
import torch.distributed as dist

from fastrlhf.errors import UserError
from fastrlhf.models.gpt import GPT
from fastrlhf.ops.linear_chunks import free_memory
from fastrlhf.parallel.mesh import Mesh

logger = logging.getLogger(__name__)
MB = 1e6


def row_bytes(model: GPT, length: int) -> int:
    """Return the cache bytes of one sequence of up to `length` tokens on this rank.

    Counts the layers of this pipeline stage and the heads of this tensor-parallel rank.
    """
    heads = [layer.self_attention for layer in model.decoder.layers]
    widths = [h.num_query_groups_per_partition * h.hidden_size_per_attention_head for h in heads]
    return 2 * length * sum(widths) * model.config.params_dtype.itemsize


def affordable_slots(model: GPT, slots: int, length: int, cache_mb: float | None) -> int:
    """Return `slots`, or the number of sequences of `length` tokens that fit if that is lower.

    The bound is `cache_mb` megabytes (10^6 bytes) per rank, or half of the GPU's free memory if
    None (no bound on a CPU). All ranks of a model return the same number: the minimum over them.

    Raises UserError if not even one sequence fits.
    """
    mesh = model.mesh
    budget = cache_mb * MB if cache_mb is not None else None
    if budget is None and mesh.device.type == "cuda":
        budget = free_memory(mesh.device) / 2
    spare = min(mesh.pipeline_size, slots)  # each slot group has one scratch row
    fit = slots
    if budget is not None:
        fit = min(slots, int(budget // max(1, row_bytes(model, length))) - spare)
    fit = _min_over_model(mesh, fit)
    if fit >= slots:
        return slots
    bound = (
        "half of the GPU's free memory" if cache_mb is None else f"generation.cache_mb {cache_mb:g}"
    )
    need = (
        f"one sequence of {length} tokens takes {row_bytes(model, length) / MB:.3g} MB of cache "
        "on a rank"
    )
    if fit < 1:
        raise UserError(
            f"{bound} holds no sequence: {need}, and each pipeline stage needs a spare one; raise "
            "it, or lower generation.max_new_tokens or data.max_prompt_tokens"
        )
    if mesh.tensor_rank == 0 and mesh.is_first_stage:
        _warn_once(
            f"{fit} sequences decode at once instead of generation.slots {slots}: {need}, and the "
            f"bound is {bound}"
        )
    return fit


def _min_over_model(mesh: Mesh, number: int) -> int:
    """Return the minimum of `number` over the ranks of a model-parallel group."""
    agreed = torch.tensor(number, device=mesh.device)
    for group, size in (
        (mesh.tensor_group, mesh.tensor_size),
        (mesh.pipeline_group, mesh.pipeline_size),
    ):
        if size > 1:
            dist.all_reduce(agreed, op=dist.ReduceOp.MIN, group=group)
    return int(agreed)


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)
