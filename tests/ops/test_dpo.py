"""Preference losses against their papers' formulas, and the figures of a batch."""

from __future__ import annotations

import math

import pytest
import torch

from fastrlhf.ops import dpo_loss
from fastrlhf.ops.dpo import KINDS, dpo_loss_ref

pytestmark = pytest.mark.usefixtures("torch_only")


def pairs(dtype=torch.float64):
    return [3 * torch.randn(7, dtype=torch.float64).to(dtype).requires_grad_() for _ in range(4)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_values_and_gradients_in_float64(kind, smoothing):
    if smoothing and kind in ("hinge", "ipo"):
        pytest.skip("they have no labels to smooth")
    inputs = pairs()
    options = {"beta": 0.3, "kind": kind, "label_smoothing": smoothing}
    ours, expected = dpo_loss(*inputs, **options).loss, dpo_loss_ref(*inputs, **options)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=0)
    policy = inputs[:2]
    grads = torch.autograd.grad(ours, policy), torch.autograd.grad(expected, policy)
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)
    leaves = [t.detach().requires_grad_() for t in policy]
    refs = [t.detach() for t in inputs[2:]]
    assert torch.autograd.gradcheck(lambda c, r: dpo_loss(c, r, *refs, **options).loss, leaves)


def test_by_hand():
    """d = 2 and beta = 1/2: -log sigmoid(1); rewards of 1 and 0."""
    chosen, rejected, ref_chosen, ref_rejected = (torch.tensor([x]) for x in (-1.0, -3.0, -3.0, -3))
    out = dpo_loss(chosen, rejected.float(), ref_chosen, ref_rejected.float(), beta=0.5)
    expected = [math.log1p(math.exp(-1)), 1.0, 1.0, 1.0, 0.0]
    assert [t.item() for t in out] == pytest.approx(expected)
    assert not any(t.requires_grad for t in out[1:])


def test_half_precision_is_computed_in_fp32_and_references_are_constants():
    inputs = pairs(torch.bfloat16)
    out = dpo_loss(*inputs, beta=torch.tensor(0.1))
    exact = dpo_loss(*(t.detach().double() for t in inputs), beta=0.1)
    assert out.loss.dtype == torch.float32
    torch.testing.assert_close(out.loss.double(), exact.loss, rtol=2**-20, atol=0)
    leaves = [t.detach().requires_grad_() for t in inputs]
    dpo_loss(*leaves).loss.backward()
    assert leaves[2].grad is None and leaves[3].grad is None
    assert leaves[0].grad.dtype == torch.bfloat16


def test_large_ratios_do_not_overflow():
    x = torch.tensor([1e4, -1e4], requires_grad=True)
    zero = torch.zeros(2)
    for kind in KINDS:
        loss = dpo_loss(x, -x, zero, zero, beta=1.0, kind=kind).loss
        assert bool(loss.isfinite()) and bool(torch.autograd.grad(loss, x)[0].isfinite().all())


def test_mistakes_are_named():
    x = torch.zeros(3)
    for options, words in (
        ({"kind": "kto"}, "kind: got 'kto', expected one of 'sigmoid', 'hinge', 'ipo', 'robust'"),
        ({"beta": 0}, "beta: got 0, expected a number above 0"),
        ({"label_smoothing": 0.5}, r"label_smoothing: got 0\.5, expected 0 or more, below 0\.5"),
        ({"label_smoothing": 0.1, "kind": "ipo"}, "expected 0 with kind='ipo'"),
    ):
        with pytest.raises(ValueError, match=words):
            dpo_loss(x, x, x, x, **options)
    with pytest.raises(ValueError, match=r"rejected: got float32\[2\]"):
        dpo_loss(x, x[:2], x, x)
