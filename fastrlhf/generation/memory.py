"""How many sequences may decode at once within the memory of the KV cache."""

from __future__ import annotations

import functools
import logging

import torch
import torch.distributed as dist

from fastrlhf.errors import UserError
from fastrlhf.models.gpt import GPT
from fastrlhf.ops.linear_chunks import free_memory

logger = logging.getLogger(__name__)
MB = 1e6


def row_bytes(stage: GPT, length: int) -> int:
    """Of one sequence of up to `length` tokens, in this stage's and tensor-parallel rank's part of the cache."""
    heads = [layer.self_attention for layer in stage.decoder.layers]
    widths = [h.num_query_groups_per_partition * h.hidden_size_per_attention_head for h in heads]
    return 2 * length * sum(widths) * stage.config.params_dtype.itemsize


def affordable_slots(stage: GPT, slots: int, length: int, cache_mb: float | None) -> int:
    """`slots`, or as many as fit: sequences of up to `length` tokens within `cache_mb` megabytes a rank, or half of the
    GPU's free memory if None (on a CPU: no bound). The same on all ranks of a model: the least of what each can afford.

    Raises `UserError` when not even one fits.
    """
    mesh = stage.mesh
    budget = cache_mb * MB if cache_mb is not None else None
    if budget is None and mesh.device.type == "cuda":
        budget = free_memory(mesh.device) / 2
    spare = min(mesh.pipeline_size, slots)  # each group of slots has a row besides
    fit = (
        slots
        if budget is None
        else min(slots, int(budget // max(1, row_bytes(stage, length))) - spare)
    )
    agreed = torch.tensor(fit, device=mesh.device)
    for group, size in (
        (mesh.tensor_group, mesh.tensor_size),
        (mesh.pipeline_group, mesh.pipeline_size),
    ):
        if size > 1:
            dist.all_reduce(agreed, op=dist.ReduceOp.MIN, group=group)
    fit = int(agreed)
    if fit >= slots:
        return slots
    bound = (
        "half of the GPU's free memory" if cache_mb is None else f"generation.cache_mb {cache_mb:g}"
    )
    need = f"one sequence of {length} tokens takes {row_bytes(stage, length) / MB:.3g} MB of cache on a rank"
    if fit < 1:
        raise UserError(
            f"{bound} holds no sequence: {need}, and a spare one goes with each pipeline stage; give it more, or lower "
            "generation.max_new_tokens or data.max_prompt_tokens"
        )
    if mesh.tensor_rank == 0 and mesh.is_first_stage:
        _say_once(
            f"{fit} sequences decode at once, not generation.slots {slots}: {need}, and the bound is {bound}"
        )
    return fit


@functools.cache
def _say_once(message: str) -> None:
    logger.warning(message)
