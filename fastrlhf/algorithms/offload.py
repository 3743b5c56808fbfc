"""Models that wait in host memory while another phase runs.

Whole stages are moved, by their parameters' storage. Left out on purpose: trained models (megatron keeps their
parameters and gradients in contiguous buffers that other tensors are views of) and their optimizer states.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

HOST = torch.device("cpu")


def move(stage: torch.nn.Module, device: torch.device) -> None:
    """Moves the storage of all parameters and buffers; the tensors themselves stay, and with them megatron's marks.

    Host memory is pinned when it comes from a GPU. Where the tensors are on `device` already, nothing happens.
    """
    for tensor in itertools.chain(stage.parameters(), stage.buffers()):
        if tensor.is_cuda and device == HOST:
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            tensor.data = host.copy_(tensor.data, non_blocking=True)
        else:
            tensor.data = tensor.data.to(device, non_blocking=True)
    if torch.cuda.is_available() and device == HOST:
        torch.cuda.synchronize()  # a checkpoint reads host memory without asking the stream


class Offload:
    """Keeps parked models in host memory but inside `with offload(stage):`. On a CPU host and device are the same."""

    def __init__(
        self, device: torch.device, move: Callable[[torch.nn.Module, torch.device], None] = move
    ) -> None:
        self._device = device
        self._move = move

    def park(self, stage: torch.nn.Module) -> None:
        """Sends a model to host memory."""
        self._move(stage, HOST)

    @contextmanager
    def __call__(self, stage: torch.nn.Module) -> Iterator[None]:
        self._move(stage, self._device)
        try:
            yield
        finally:
            self._move(stage, HOST)
