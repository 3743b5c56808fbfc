"""Offloading of models to host memory while they are not in use.

The storage of every parameter and buffer is moved. Not supported: models in training, because
megatron keeps their parameters and gradients in contiguous buffers that other tensors are views of;
and optimizer states.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

HOST = torch.device("cpu")


def move(model: torch.nn.Module, device: torch.device) -> None:
    """Move the storage of all parameters and buffers of `model` to `device`.

    The tensor objects stay, and with them the attributes that megatron sets on them. Host copies of
    GPU tensors are pinned. Tensors that are already on `device` are left alone.
    """
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        if tensor.is_cuda and device == HOST:
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            tensor.data = host.copy_(tensor.data, non_blocking=True)
        else:
            tensor.data = tensor.data.to(device, non_blocking=True)
    if torch.cuda.is_available() and device == HOST:
        torch.cuda.synchronize()  # a checkpoint reads host memory without waiting for the stream


class Offload:
    """Keeps offloaded models in host memory except inside `with offload(model):`.

    On a CPU, host and device are the same.
    """

    def __init__(
        self, device: torch.device, move: Callable[[torch.nn.Module, torch.device], None] = move
    ) -> None:
        self._device = device
        self._move = move

    def to_host(self, model: torch.nn.Module) -> None:
        """Move a model to host memory."""
        self._move(model, HOST)

    @contextmanager
    def __call__(self, model: torch.nn.Module) -> Iterator[None]:
        """Hold `model` on the device for a block."""
        self._move(model, self._device)
        try:
            yield
        finally:
            self._move(model, HOST)
