"""Runs micro-batches through the pipeline with megatron's schedules (1F1B, or none for a single stage).

Gradients and losses are sums: the head divides by a denominator known for the whole global batch, so neither the number
of micro-batches nor the data-parallel size scales anything here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

from fastrlhf.parallel.mesh import Mesh

Batch = TypeVar("Batch")
Result = TypeVar("Result")
Metrics = dict[str, torch.Tensor]
LossHead = Callable[[torch.Tensor, Batch], tuple[torch.Tensor, Metrics]]
"""head(hidden [T, H], batch) -> (loss to differentiate, metrics to sum over micro-batches and ranks)."""


class PipelineStage(Protocol):
    """What a schedule runs: a module with megatron's `config` and `set_input_tensor`."""

    config: Any

    def __call__(self, batch: Any) -> torch.Tensor: ...


def forward_backward(
    mesh: Mesh,
    stage: PipelineStage,
    batches: Sequence[Batch],
    head: LossHead[Batch],
) -> list[Metrics]:
    """Forward and backward over all micro-batches, gradients summed into megatron's buffers and over data-parallel
    ranks.

    `head(hidden, batch) -> (loss, metrics)` runs on the last stage. Returns its metrics, one dict a micro-batch (empty
    lists on the other stages). Raises `ValueError` without micro-batches: the other data-parallel ranks would wait for
    this one's gradients.
    """
    if not batches:
        raise ValueError(
            "batches is empty; every data-parallel rank needs a micro-batch in every update"
        )

    def loss(output: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, Metrics]:
        value, metrics = head(output, batch)
        # The middle entry is megatron's token count, used only for a normalisation that the head has already done.
        return value, torch.zeros((), dtype=torch.int, device=value.device), metrics

    return _run(mesh, stage, batches, loss, forward_only=False)


def forward(
    mesh: Mesh,
    stage: PipelineStage,
    batches: Sequence[Batch],
    head: Callable[[torch.Tensor, Batch], Result],
) -> list[Result]:
    """Forward only, without a graph. Returns `head(hidden, batch)` of each micro-batch on the last stage, [] elsewhere.
    Data-parallel ranks do not wait for each other, and some may have no micro-batches.
    """

    def collect(output: torch.Tensor, batch: Batch, non_loss_data: bool) -> Result:
        return head(output, batch)

    if not batches:
        return []
    with torch.no_grad():
        return _run(mesh, stage, batches, collect, forward_only=True)


def _run(
    mesh: Mesh,
    stage: PipelineStage,
    batches: Sequence[Batch],
    head: Callable,
    *,
    forward_only: bool,
) -> list[Any]:
    def forward_step(iterator: Any, model: PipelineStage) -> tuple[torch.Tensor, Callable]:
        batch = next(iterator)
        return model(batch), partial(head, batch=batch)

    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(batches),
        model=[stage],
        num_microbatches=len(batches),
        # Shapes travel with the activations (variable_seq_lengths): packed micro-batches differ in length.
        seq_length=1,
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )


def finalize_gradients(model: list, _num_tokens: torch.Tensor | None = None, **kwargs: Any) -> None:
    """megatron's gradient synchronisation (data parallel, sequence parallel, tied embeddings) without its token
    scaling.
    """
    finalize_model_grads(model, None, **kwargs)
