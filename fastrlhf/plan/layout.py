"""Sizes of the groups that a plan computes with."""

from __future__ import annotations

from typing import NamedTuple

from fastrlhf.config import ParallelConfig
from fastrlhf.errors import UserError


class Layout(NamedTuple):
    """How a run is split over GPUs: tensor * pipeline * data of them."""

    tensor: int
    pipeline: int
    data: int
    sequence: bool
    """Sequence parallelism: norms and residuals are split over the tensor-parallel ranks too."""
    virtual: int = 1
    """Model chunks of a stage in the interleaved schedule."""

    @classmethod
    def of(cls, parallel: ParallelConfig, gpus: int) -> Layout:
        """Return the layout of `parallel` on `gpus` GPUs; UserError if they cannot be split."""
        model = parallel.tensor * parallel.pipeline
        if gpus % model:
            raise UserError(
                f"--gpus {gpus} is not a multiple of parallel.tensor={parallel.tensor} *"
                f" parallel.pipeline={parallel.pipeline} = {model}; change one of the three"
            )
        is_split = parallel.sequence and parallel.tensor > 1
        return cls(parallel.tensor, parallel.pipeline, gpus // model, is_split)
