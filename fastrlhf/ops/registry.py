"""Registering an op with torch: an opaque node to torch.compile, with a shape function and a gradient.

The low-level torch.library.Library, because torch.library.custom_op imports torch._dynamo at the first call (2 s, and
packages that an install of torch alone need not have) and checks every call for aliasing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
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


class _Once(torch.autograd.Function):
    """A gradient that was not formed by differentiable operations: it passes, and differentiating it raises."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, name: str) -> Tensor:
        ctx.name = name
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            f"{ctx.name} has no second derivative: use its plain torch formula for gradient penalties"
        )


def register_autograd(
    op: OpOverload, backward: Callable[..., Any], setup_context: Callable[..., None] | None = None
) -> None:
    """`backward(ctx, *upstreams)` gives `op` its gradient, once: what is saved for it is a constant, so that a second
    derivative (create_graph=True) would be silently wrong, and raises RuntimeError instead.
    """

    def once(ctx: Any, *upstreams: Any) -> Any:
        if not torch.is_grad_enabled():
            return backward(ctx, *upstreams)
        with torch.no_grad():
            gradients = backward(ctx, *upstreams)
        single = isinstance(gradients, Tensor)
        # each requires grad, even from constant upstreams, so that no path past it is taken for a zero
        marked = [
            _Once.apply(g.detach().requires_grad_(), op.name()) if isinstance(g, Tensor) else g
            for g in ((gradients,) if single else gradients)
        ]
        return marked[0] if single else tuple(marked)

    torch.library.register_autograd(op.name(), once, setup_context=setup_context, lib=_LIBRARY)
