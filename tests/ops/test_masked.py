from __future__ import annotations

import pytest
import torch

from fastrlhf.ops import masked_mean, masked_var, masked_whiten
from fastrlhf.ops.masked import true_places

pytestmark = pytest.mark.usefixtures("torch_only")


def test_mean_by_hand_and_its_gradient():
    x = torch.tensor([[1.0, torch.nan], [4.0, torch.inf]], requires_grad=True)
    mask = torch.tensor([[True, False], [True, False]])
    mean = masked_mean(x, mask)
    assert mean.item() == 2.5
    mean.backward()
    assert x.grad.tolist() == [[0.5, 0.0], [0.5, 0.0]]
    assert masked_mean(x, mask & False).item() == 0


def test_bf16_sums_in_fp32():
    x = torch.ones(1000, dtype=torch.bfloat16)
    mean = masked_mean(x, torch.ones(1000, dtype=torch.bool))
    assert mean.dtype == torch.float32 and mean.item() == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shift_mean", [True, False])
def test_half_precision_is_whitened_in_fp32(dtype, shift_mean):
    """x - mean must be computed in fp32: a 0-dim fp32 mean does not promote half precision."""
    x, mask = (torch.randn(1000) + 3).to(dtype), torch.rand(1000) > 0.3
    white = masked_whiten(x, mask, shift_mean)
    kept = x[mask].double()
    exact = (kept - kept.mean()) / (kept.var(correction=0) + 1e-8).sqrt() + (
        0 if shift_mean else kept.mean()
    )
    assert white.dtype == torch.float32
    assert float((white[mask].double() - exact).abs().max()) < 1e-5


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_whiten_against_float64(offset):
    """Biased variance in two passes: an offset of 1,000 standard deviations must not spoil it."""
    x, mask = torch.randn(7, 33) + offset, torch.rand(7, 33) > 0.4
    kept = x[mask].double()
    white = (kept - kept.mean()) / (kept.var(correction=0) + 1e-8).sqrt()
    ours = masked_whiten(torch.where(mask, x, torch.nan), mask)
    bound = 2**-22 * (4 + offset)
    assert float((ours[mask].double() - white).abs().max()) <= bound
    assert bool((ours[~mask] == 0).all())
    with_mean = masked_whiten(x, mask, shift_mean=False)
    assert float((with_mean[mask].double() - white - kept.mean()).abs().max()) <= 2 * bound
    assert bool((with_mean[~mask] == 0).all())


def test_constant_and_empty_inputs_are_finite():
    ones, none = torch.ones(5), torch.zeros(5, dtype=torch.bool)
    assert masked_whiten(ones, ~none).tolist() == [0.0] * 5
    assert masked_whiten(ones, none).tolist() == [0.0] * 5


def test_gradcheck():
    x, mask = torch.randn(3, 4, dtype=torch.float64, requires_grad=True), torch.rand(3, 4) > 0.3
    for shift_mean in (True, False):
        assert torch.autograd.gradcheck(lambda t, s=shift_mean: masked_whiten(t, mask, s), (x,))
    assert torch.autograd.gradcheck(lambda t: masked_mean(t, mask), (x,))


def test_mistakes_are_named():
    with pytest.raises(
        ValueError, match=r"mask: got float32\[3\] on cpu, expected a bool tensor of shape \[3\]"
    ):
        masked_mean(torch.zeros(3), torch.zeros(3))
    with pytest.raises(ValueError, match=r"x: got int64\[3\]"):
        masked_whiten(torch.zeros(3, dtype=torch.long), torch.ones(3, dtype=torch.bool))


@pytest.mark.parametrize("marked", [[], [1, 3, 4], [0, 1, 2, 3, 4, 5]])
def test_places_are_in_order_with_and_without_their_count(marked):
    mask = torch.zeros(6, dtype=torch.bool)
    mask[marked] = True
    assert true_places(mask, None).tolist() == true_places(mask, len(marked)).tolist() == marked
    assert true_places(mask, 6).tolist()[: len(marked)] == marked


@pytest.mark.parametrize("dim", [0, 1, -1, None])
def test_means_and_variances_along_a_dimension(dim):
    """Against torch on each row of True positions; a row without any gives 0."""
    x = torch.randn(5, 7, dtype=torch.float64) + 100
    mask = torch.rand(5, 7) > 0.4
    mask[2] = False
    mask[:, 3] = False
    mean, var = masked_mean(x, mask, dim=dim), masked_var(x, mask, dim=dim)
    rows = (
        (x[mask],)
        if dim is None
        else [r[m] for r, m in zip(x.movedim(dim, -1), mask.movedim(dim, -1), strict=True)]
    )
    wanted = [(r.mean(), r.var(correction=0)) if len(r) else (r.sum(), r.sum()) for r in rows]
    torch.testing.assert_close(mean.flatten(), torch.stack([m for m, _ in wanted]))
    torch.testing.assert_close(var.flatten(), torch.stack([v for _, v in wanted]))


def test_the_gradient_of_a_variance():
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(3, 4) > 0.3
    for dim in (None, 1):
        assert torch.autograd.gradcheck(lambda t, d=dim: masked_var(t, mask, dim=d), (x,))
        assert torch.autograd.gradcheck(lambda t, d=dim: masked_mean(t, mask, dim=d), (x,))
