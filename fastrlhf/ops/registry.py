"""Registering an op with torch: an opaque node to torch.compile, with a shape function and a gradient.

The low-level torch.library.Library, because torch.library.custom_op imports torch._dynamo at the first call (2 s, and
packages that an install of torch alone need not have) and checks every call for aliasing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._ops import OpOverload

_LIBRARY = torch.library.Library("fastrlhf", "FRAGMENT")


def custom_op(name: str, schema: str) -> Callable[[Callable[..., Any]], OpOverload]:
    """Define fastrlhf::name with `schema` ("(Tensor x) -> Tensor"); the decorated body runs it on CPU and CUDA."""

    def register(body: Callable[..., Any]) -> OpOverload:
        _LIBRARY.define(name + schema)
        for key in ("CPU", "CUDA"):
            _LIBRARY.impl(name, body, key)
        return getattr(torch.ops.fastrlhf, name).default

    return register


def register_fake(op: OpOverload) -> Callable[[Callable[..., Any]], None]:
    """The decorated function says what `op` would return: empty tensors of the right shapes, dtypes and strides."""

    def register(shapes: Callable[..., Any]) -> None:
        torch.library.register_fake(op.name(), shapes, lib=_LIBRARY)

    return register


def register_autograd(
    op: OpOverload, backward: Callable[..., Any], setup_context: Callable[..., None] | None = None
) -> None:
    torch.library.register_autograd(op.name(), backward, setup_context=setup_context, lib=_LIBRARY)
