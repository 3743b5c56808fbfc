"""Patches that let megatron-core run on a machine without a GPU.

megatron-core hard-codes CUDA devices, CUDA generators and CUDA tensor types. `install()` redirects
each of them to its CPU counterpart. It is called only if there is no GPU, and it changes nothing
else: no arithmetic, no schedule, no collective.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch.overrides import TorchFunctionMode

logger = logging.getLogger(__name__)

_CPU = torch.device("cpu")
_installed: _CudaToCpu | None = None
_originals: list[tuple[object, str, object]] = []


def _names_cuda(device: object) -> bool:
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, torch.device) and device.type == "cuda"


class _CudaToCpu(TorchFunctionMode):
    """Redirection of CUDA devices in torch calls to the CPU (about 1 microsecond per call)."""

    def __torch_function__(
        self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict | None = None
    ) -> object:
        kwargs = kwargs or {}
        if _names_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": _CPU}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.to:
            args = tuple(_CPU if _names_cuda(arg) else arg for arg in args)
        out = func(*args, **kwargs)
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # megatron's optimizers group parameters by type name ("torch.cuda.FloatTensor").
            return out.replace("torch.", "torch.cuda.", 1)
        return out


def install() -> None:
    """Patch torch and megatron for a process without a GPU; further calls do nothing."""
    global _installed
    if _installed is not None:
        return
    assert not torch.cuda.is_available(), "CPU support is for machines without a GPU"
    import megatron.core.tensor_parallel.random as megatron_random

    def get_rng_state(*_args: object, **_kwargs: object) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(state: torch.Tensor, *_args: object, **_kwargs: object) -> None:
        torch.set_rng_state(state)

    _patch(torch.cuda, "current_device", lambda: _CPU)
    _patch(torch.cuda, "current_stream", lambda *_args, **_kwargs: torch.cpu.current_stream())
    _patch(torch.cuda, "synchronize", lambda *_args, **_kwargs: None)
    _patch(torch.cuda, "get_rng_state", get_rng_state)
    _patch(torch.cuda, "set_rng_state", set_rng_state)
    _patch(torch.cuda, "manual_seed", lambda seed: torch.default_generator.manual_seed(seed))
    _patch(megatron_random, "_get_cuda_rng_state", get_rng_state)
    _patch(megatron_random, "_set_cuda_rng_state", set_rng_state)
    _installed = _CudaToCpu()
    _installed.__enter__()
    logger.info("no GPU: megatron-core runs on the CPU")


def uninstall() -> None:
    """Remove the patches, so that torch behaves as before in a process that has used megatron."""
    global _installed
    if _installed is None:
        return
    _installed.__exit__(None, None, None)
    _installed = None
    while _originals:
        owner, name, original = _originals.pop()
        setattr(owner, name, original)


def _patch(owner: object, name: str, replacement: Callable) -> None:
    _originals.append((owner, name, getattr(owner, name)))
    setattr(owner, name, replacement)
