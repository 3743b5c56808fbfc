"""Scalar options of the ops: Python numbers or 0-dim tensors, packed into one small tensor.

A custom op that took floats would be compiled again for every new value, and one that read a GPU's
tensor would wait for it. So the numbers travel as one tensor. Kernels are handed floats where the
host has them (always in eager mode, unless a scalar lives on a GPU), and 0-dim tensors elsewhere.
"""

from __future__ import annotations

from typing import TypeAlias, cast

import torch
from torch import Tensor

from fastrlhf.ops import checks

Number: TypeAlias = float | Tensor


def pack(like: Tensor, *values: Number) -> Tensor:
    """Return the values as one tensor [k], constant to autograd.

    On the CPU in float64, unless one of them is on a GPU or a graph is traced: then on the device
    of `like`, where a graph needs no copy from the host.
    """
    tensors = [v for v in values if isinstance(v, Tensor)]
    tracing = torch.compiler.is_compiling()
    if not tracing and not tensors:
        return torch.tensor(values, dtype=torch.float64, device="cpu")
    away = tracing or any(t.device.type != "cpu" for t in tensors)
    device = like.device if away else torch.device("cpu")
    on_host = device.type == "cpu"
    dtype = torch.float64 if on_host else checks.compute_dtype(like)
    one = torch.ones((), dtype=dtype, device=device)
    # a float of a traced function is symbolic; a product with a tensor keeps it so
    made = [
        v.detach().to(device, dtype, non_blocking=not on_host) if isinstance(v, Tensor) else one * v
        for v in values
    ]
    return torch.stack(made)


def unpack(scalars: Tensor) -> list[Number]:
    """Return the values of `pack` as floats, or as 0-dim tensors if they are on a GPU."""
    return scalars.tolist() if scalars.device.type == "cpu" else list(scalars.unbind())


def clamp(x: Tensor, low: Number, high: Number) -> Tensor:
    """Return x within [low, high], which are both numbers or both 0-dim tensors."""
    return x.clamp(cast(float, low), cast(float, high))


def is_zero(value: Number) -> bool:
    """Return whether a term with this coefficient can be left out; never reads a tensor."""
    return not isinstance(value, Tensor) and value == 0


def as_tensor(value: Number | None, like: Tensor) -> Tensor | None:
    """Return a 0-dim tensor on the device of `like`, which waits for nothing."""
    if value is None or isinstance(value, Tensor):
        return value
    dtype = checks.compute_dtype(like)
    if torch.compiler.is_compiling():
        return torch.ones((), dtype=dtype, device=like.device) * value
    return torch.full((), float(value), dtype=dtype, device=like.device)
