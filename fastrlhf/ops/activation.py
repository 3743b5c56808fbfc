"""gelu(x + bias) of a matrix product's rows in one pass on a CPU, where torch needs three.

torch adds a bias by copying it over the output before the product, and its tanh GELU takes five
times as long as a tanh. Not supported: GPUs (megatron-core has fused activations there) and other
activations.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastrlhf.ops.dispatch import has_cpu_implementation
from fastrlhf.ops.registry import Context


def bias_gelu_ref(x: Tensor, bias: Tensor) -> Tensor:
    """Compute `bias_gelu` in plain torch, differentiated by autograd."""
    return F.gelu(x + bias, approximate="tanh")


class _BiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, x: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, bias)
        return torch.ops.fastrlhf_cpu.bias_gelu(x, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, bias = ctx.saved_tensors
        grad_x, grad_bias = torch.ops.fastrlhf_cpu.bias_gelu_backward(grad.contiguous(), x, bias)
        return grad_x, grad_bias.to(bias.dtype)


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """Return the tanh GELU of z = x + bias.

    z (1 + tanh(sqrt(2 / pi) (z + 0.044715 z^3))) / 2 (Hendrycks and Gimpel, arXiv 1606.08415).
    x [N, H] and bias [H] of one dtype -> [N, H] of that dtype, computed in fp32. x is kept for the
    backward, which computes both gradients in one pass. Without the C++ extension, and in float64,
    torch's operators run.
    """
    same = x.dtype == bias.dtype and x.is_contiguous()
    compiled = same and has_cpu_implementation("bias_gelu", x)
    return _BiasGelu.apply(x, bias) if compiled else bias_gelu_ref(x, bias)
