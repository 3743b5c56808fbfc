"""Run micro-batches through the pipeline with megatron's schedules (1F1B, or none for one stage).

Gradients and losses are sums: the head divides by the denominator of the global batch, so neither
the number of micro-batches nor the data-parallel size scales anything here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Protocol, TypeVar

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig

from fastrlhf.parallel.mesh import Mesh

Batch = TypeVar("Batch")
Batch_contra = TypeVar("Batch_contra", contravariant=True)
Result = TypeVar("Result")
Metrics = dict[str, torch.Tensor]
LossHead = Callable[[torch.Tensor, Batch], tuple[torch.Tensor, Metrics]]
"""head(hidden [T, H], batch) -> (loss, metrics); both are sums over micro-batches and ranks."""


class PipelineStage(Protocol[Batch_contra]):
    """A callable stage with megatron's configuration and a way to receive its input."""

    config: TransformerConfig

    def set_input_tensor(self, input_tensor: list[torch.Tensor | None]) -> None:
        """Receive the previous stage's output."""
        ...

    def __call__(self, batch: Batch_contra) -> torch.Tensor:
        """Run the forward pass of a micro-batch."""
        ...


def forward_backward(
    mesh: Mesh,
    stage: PipelineStage[Batch],
    batches: Sequence[Batch],
    head: LossHead[Batch],
) -> list[Metrics]:
    """Run the forward and backward pass of all micro-batches.

    Gradients are summed into megatron's buffers and over data-parallel ranks. `head(hidden, batch)
    -> (loss, metrics)` runs on the last stage. Returns its metrics, one dict per micro-batch; the
    list is empty on the other stages. Raises ValueError if `batches` is empty: the other
    data-parallel ranks would wait for this one's gradients.
    """
    if not batches:
        raise ValueError(
            "batches is empty; every data-parallel rank needs a micro-batch in every update"
        )

    def loss(output: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, Metrics]:
        value, metrics = head(output, batch)
        # The middle entry is megatron's token count for a normalization that the head has done.
        return value, torch.zeros((), dtype=torch.int, device=value.device), metrics

    return _run(mesh, stage, batches, loss, forward_only=False)


def forward(
    mesh: Mesh,
    stage: PipelineStage[Batch],
    batches: Sequence[Batch],
    head: Callable[[torch.Tensor, Batch], Result],
) -> list[Result]:
    """Run the forward pass of all micro-batches without an autograd graph.

    Returns `head(hidden, batch)` of each micro-batch on the last stage, [] on the other stages.
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
    stage: PipelineStage[Batch],
    batches: Sequence[Batch],
    head: Callable,
    *,
    forward_only: bool,
) -> list:
    def forward_step(
        iterator: Iterator[Batch], model: PipelineStage[Batch]
    ) -> tuple[torch.Tensor, Callable]:
        batch = next(iterator)
        return model(batch), partial(head, batch=batch)

    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(batches),
        model=[stage],
        num_microbatches=len(batches),
        # Activations are sent with their shapes (variable_seq_lengths): lengths of packed
        # micro-batches differ.
        seq_length=1,
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )


def finalize_gradients(
    model: list, _num_tokens: torch.Tensor | None = None, **kwargs: object
) -> None:
    """Synchronize gradients as megatron does, without its scaling by tokens.

    Covers data parallelism, sequence parallelism and tied embeddings.
    """
    finalize_model_grads(model, None, **kwargs)
