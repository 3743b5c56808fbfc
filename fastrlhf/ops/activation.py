"""gelu(x + bias) of a matrix product's rows in one pass, for models on a CPU, where torch makes three.

torch adds a bias by copying it over the output before the product, and its tanh GELU takes five times as long as a
tanh. Left out on purpose: GPUs (megatron-core has fused activations there) and other activations.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastrlhf.ops.dispatch import has_cpu_body


def bias_gelu_ref(x: Tensor, bias: Tensor) -> Tensor:
    """Plain torch, differentiated by autograd."""
    return F.gelu(x + bias, approximate="tanh")


class _BiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, bias)
        return torch.ops.fastrlhf_cpu.bias_gelu(x, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, bias = ctx.saved_tensors
        grad_x, grad_bias = torch.ops.fastrlhf_cpu.bias_gelu_backward(grad.contiguous(), x, bias)
        return grad_x, grad_bias.to(bias.dtype)


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """z (1 + tanh(sqrt(2 / pi) (z + 0.044715 z^3))) / 2 with z = x + bias (Hendrycks and Gimpel, arXiv 1606.08415).

    x [N, H] and bias [H] of one dtype -> [N, H] of that dtype, computed in fp32; x is kept for the backward, which
    gives the gradients of both in one pass. Without the C++ extension, and in float64, torch's operators.
    """
    compiled = x.dtype == bias.dtype and x.is_contiguous() and has_cpu_body("bias_gelu", x)
    return _BiasGelu.apply(x, bias) if compiled else bias_gelu_ref(x, bias)
