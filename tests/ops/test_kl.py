from __future__ import annotations

import math

import pytest
import torch

from fastrlhf.ops import logits_kl
from fastrlhf.ops.kl import logits_kl_ref


def run(function, x, y, upstream, **options):
    kl = function(x, y, **options)
    return kl.detach(), *torch.autograd.grad(kl, (x, y), upstream.to(kl.dtype))


def check(x, y, backend, within, **options):
    upstream = torch.randn(x.shape[:-1], device=x.device)
    exact = run(
        logits_kl_ref, *(t.detach().double().requires_grad_() for t in (x, y)), upstream, **options
    )
    torchs = run(logits_kl_ref, x, y, upstream, **options)
    ours = run(logits_kl, x, y, upstream, backend=backend, **options)
    # the raw logits' scale bounds the rounding of x - y and of max x - max y, which cancel
    scale = float(
        1 + x.detach().abs().nan_to_num(0, 0, 0).max() + y.detach().abs().nan_to_num(0, 0, 0).max()
    )
    bound = 2**-21 * scale / options.get("temperature", 1.0) ** 2 * float(1 + upstream.abs().max())
    rounding = torch.finfo(x.dtype).eps
    for a, b, c in zip(ours, exact, torchs, strict=True):
        within(a, b, c, bound + (rounding * b.cpu().abs() if a.dtype == x.dtype else 0.0))
    return ours


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [1, 123, 4097])
def test_against_float64(vocab, dtype, backend, device, within):
    x, y = (torch.randn(2, 3, vocab).to(dtype).mul(3).to(device).requires_grad_() for _ in range(2))
    mask = torch.rand(2, 3).to(device) > 0.3
    ours = check(x, y, backend, within, mask=mask, temperature=0.7)
    assert all(bool((t[~mask] == 0).all()) for t in ours)


@pytest.mark.parametrize("shift", [1e3, -1e3])
def test_shifts_of_either_side_change_nothing(shift, backend, device, within):
    x, y = (torch.randn(3, 507, device=device) for _ in range(2))
    for a, b in ((x + shift, y), (x, y + shift), (x + shift, y + shift)):
        check(a.requires_grad_(), b.requires_grad_(), backend, within)


def test_strided_views_and_odd_vocabularies(backend, device, within):
    base, other = torch.randn(2, 5, 130, device=device), torch.randn(4, 2, 123, device=device)
    x, y = (
        base[:, :-1, :123].detach().requires_grad_(),
        other.transpose(0, 1).detach().requires_grad_(),
    )
    check(x, y, backend, within)


def test_golden_equal_and_forbidden(backend, device):
    """KL((1/4, 3/4) || (1/2, 1/2)); equal logits give 0, as does a token forbidden in both."""
    x = torch.tensor([[0.0, math.log(3), -math.inf]], device=device)
    y = torch.tensor([[1.0, 1.0, -math.inf]], device=device)
    expected = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert logits_kl(x, y, backend=backend).item() == pytest.approx(expected, rel=1e-5)
    assert logits_kl(x, x, backend=backend).item() == pytest.approx(0, abs=1e-7)
    allowed = torch.tensor([[1.0, -math.inf, 1.0]], device=device)
    assert logits_kl(x[:, [0, 1, 1]], allowed, backend=backend).item() == math.inf


def test_nothing_leaks_from_under_the_mask(backend, device):
    x, y = (torch.randn(4, 123, device=device) for _ in range(2))
    mask = torch.tensor([True, False, True, False], device=device)
    x[1], y[3], y[1] = torch.nan, torch.inf, -torch.inf
    x.requires_grad_(), y.requires_grad_()
    kl, dx, dy = run(logits_kl, x, y, torch.where(mask, 1.0, torch.nan), mask=mask, backend=backend)
    for t in (kl, dx, dy):
        assert bool((t[~mask] == 0).all()) and bool(t[mask].isfinite().all())


def test_padding_one_sided_gradients_and_retain_graph(backend, device):
    x, y = (torch.randn(3, 40, device=device) for _ in range(2))
    padded = torch.cat([x, torch.full((3, 9), 99.0, device=device)], 1).requires_grad_()
    ref = torch.cat([y, torch.full((3, 9), -99.0, device=device)], 1)
    kl = logits_kl(padded, ref, vocab_size=40, backend=backend)
    torch.testing.assert_close(kl, logits_kl(x, y, backend=backend), rtol=0, atol=2**-20)
    (first,) = torch.autograd.grad(kl.sum(), padded, retain_graph=True)
    (again,) = torch.autograd.grad(kl.sum(), padded)
    assert torch.equal(first, again) and not bool(first[:, 40:].any())


def test_gradcheck(torch_only):
    x, y = (torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mask = torch.tensor([[True, False, True], [True, True, False]])
    assert torch.autograd.gradcheck(
        lambda a, b: logits_kl(a, b, mask=mask, temperature=0.8, vocab_size=4), (x, y)
    )


def test_mistakes_are_named(torch_only):
    x = torch.zeros(2, 3)
    with pytest.raises(
        ValueError, match=r"ref_logits: got bfloat16\[2, 3\] on cpu, expected float32\[2, 3\]"
    ):
        logits_kl(x, x.bfloat16())
    with pytest.raises(ValueError, match=r"mask: got int64\[2\]"):
        logits_kl(x, x, mask=torch.ones(2, dtype=torch.int64))
