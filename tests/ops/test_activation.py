"""gelu(x + bias) in one pass against float64, for all shapes, instruction sets and threads."""

from __future__ import annotations

import pytest
import torch

from fastrlhf.ops import backends
from fastrlhf.ops.activation import bias_gelu, bias_gelu_ref

BUILT = pytest.mark.skipif(
    not backends()["cpu"]["available"], reason="the C++ extension is not built"
)
SHAPES = [(1, 1), (3, 5), (7, 64), (130, 1024), (33, 1031), (0, 8), (1000, 3)]


def inputs(shape, dtype, scale=3.0):
    generator = torch.Generator().manual_seed(shape[0])
    x = (scale * torch.randn(shape, generator=generator)).to(dtype)
    bias = torch.randn(shape[1], generator=generator).to(dtype)
    upstream = torch.randn(shape, generator=generator).to(dtype)
    return x, bias, upstream


def run(function, x, bias, upstream):
    x, bias = x.clone().requires_grad_(), bias.clone().requires_grad_()
    out = function(x, bias)
    out.backward(upstream)
    return out.detach(), x.grad, bias.grad


@BUILT
@pytest.mark.parametrize("isa", ["default", ""], ids=["default", "best"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_no_further_from_float64_than_torch(shape, dtype, isa, monkeypatch):
    monkeypatch.setenv("FASTRLHF_CPU_ISA", isa)
    given = inputs(shape, dtype)
    exact = run(bias_gelu_ref, *(t.double() for t in given))
    ours, theirs = run(bias_gelu, *given), run(bias_gelu_ref, *given)
    for name, want, got, torchs in zip(("out", "x", "bias"), exact, ours, theirs, strict=True):
        assert got.dtype == dtype and got.shape == want.shape
        if not want.numel():
            continue
        # One rounding of the largest value to the dtype, and eight units of fp32 for the
        # polynomials.
        room = (torch.finfo(dtype).eps / 2 + 8 * torch.finfo(torch.float32).eps) * want.abs().max()
        if name == "bias":
            room *= 2 + shape[0] ** 0.5
        assert (got - want).abs().max() <= (torchs - want).abs().max() + room, name


@BUILT
def test_large_values_and_nan():
    x = torch.tensor([[-1e30, -100.0, -15.0, 0.0, 15.0, 100.0, 1e30, float("nan"), float("inf")]])
    out, grad, _ = run(bias_gelu, x, torch.zeros(9), torch.ones(1, 9))
    assert out[0, :7].tolist() == [
        0.0,
        0.0,
        pytest.approx(-0.0, abs=1e-30),
        0.0,
        15.0,
        100.0,
        pytest.approx(1e30),
    ]
    assert grad[0, :7].tolist() == [0.0, 0.0, pytest.approx(0.0, abs=1e-30), 0.5, 1.0, 1.0, 1.0]
    assert out[0, 7].isnan() and grad[0, 7].isnan() and out[0, 8] == float("inf")


@BUILT
def test_the_same_on_any_number_of_threads():
    given = inputs((500, 1000), torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(bias_gelu, *given))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_gradcheck_in_float64():
    x, bias, _ = inputs((3, 4), torch.float64)
    assert torch.autograd.gradcheck(bias_gelu, (x.requires_grad_(), bias.requires_grad_()))


def test_torch_where_the_extension_is_forced_off(monkeypatch):
    monkeypatch.setenv("FASTRLHF_BACKEND", "torch")
    x, bias, _ = inputs((4, 8), torch.float32)
    assert torch.equal(bias_gelu(x, bias), bias_gelu_ref(x, bias))
