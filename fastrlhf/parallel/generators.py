"""States of megatron's random generators, which differ between tensor-parallel ranks."""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker


def tracker_states() -> dict[str, torch.Tensor]:
    """Return the states of megatron's named generators."""
    states: dict[str, torch.Tensor] = get_cuda_rng_tracker().get_states()
    return states


def set_tracker_states(states: dict[str, torch.Tensor]) -> None:
    """Restore what `tracker_states` returned."""
    get_cuda_rng_tracker().set_states(states)
