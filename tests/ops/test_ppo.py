from __future__ import annotations

import math

import pytest
import torch

from fastrlhf.ops import ppo_loss
from fastrlhf.ops.ppo import ppo_loss_ref


def make(shape, dtype, device, border=0.02):
    """Return random rollouts whose ratios and value errors are `border` away from the clip."""

    def away_from(x, edge):
        near = ((x.abs() - edge).abs() < border).to(x.dtype)
        return x + 2 * border * near * x.sign()

    old = -2 * torch.rand(shape) - 0.1
    ratio = 1 + away_from(0.4 * torch.randn(shape).clamp(-2, 2), 0.2)
    old_values = torch.randn(shape)
    values = old_values + away_from(0.3 * torch.randn(shape), 0.2)
    tensors = {
        "logprobs": old + ratio.clamp(min=0.1).log(),
        "old_logprobs": old,
        "advantages": torch.randn(shape),
        "values": values,
        "old_values": old_values,
        "returns": values + torch.randn(shape).sign() * 1.5,
        "entropy": torch.rand(shape) * 3,
    }
    mask = (torch.rand(shape) > 0.3).to(device)
    tensors = {k: v.to(dtype).to(device) for k, v in tensors.items()}
    for name in ("logprobs", "values", "entropy"):
        tensors[name].requires_grad_()
    return tensors, mask


def run(function, tensors, mask, upstream, **options):
    out = function(mask=mask, **tensors, **options)
    leaves = [t for t in tensors.values() if t.requires_grad]
    return out, torch.autograd.grad(out.loss * upstream, leaves)


def test_a_value_inside_the_clip_keeps_its_gradient(backend, device):
    """old + (v - old) rounds to either side of v; that must not count as clipped."""
    old, step = torch.randn(4096, device=device), 0.1 * torch.rand(4096, device=device)
    values = (old + step).requires_grad_()
    returns, zero, mask = (
        values.detach() + 2,
        torch.zeros_like(old),
        torch.ones_like(old, dtype=torch.bool),
    )
    options = {"old_values": old, "returns": returns, "denominator": 1.0, "backend": backend}
    out = ppo_loss(zero, zero, zero, mask, values=values, **options)
    assert float(out.value_clip_fraction) == 0
    (grad,) = torch.autograd.grad(out.loss, values)
    torch.testing.assert_close(grad, values.detach() - returns)


def test_a_small_kl_is_not_lost_in_rounding(backend, device):
    """r - 1 - log r near r = 1: computed as written it is 5e-9 with a rounding error of 1e-7."""
    old = -1 - torch.rand(1000, device=device)
    logprobs, mask = old + 1e-4, torch.ones_like(old, dtype=torch.bool)
    step = logprobs.double() - old.double()
    out = ppo_loss(logprobs, old, old, mask, backend=backend)
    torch.testing.assert_close(
        out.approx_kl.double(), (torch.expm1(step) - step).mean(), rtol=1e-2, atol=0
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7, 33), (1,), (3, 1100)])
@pytest.mark.parametrize("denominator", [None, 123.0])
def test_against_float64(shape, dtype, denominator, backend, device, within):
    tensors, mask = make(shape, dtype, device)
    options = {"entropy_coef": 0.1, "value_coef": 0.5, "denominator": denominator}
    exact_in = {k: v.detach().double().requires_grad_(v.requires_grad) for k, v in tensors.items()}
    exact, exact_grads = run(ppo_loss_ref, exact_in, mask, -1.5, **options)
    torchs, torch_grads = run(ppo_loss_ref, tensors, mask, -1.5, **options)
    ours, grads = run(ppo_loss, tensors, mask, -1.5, backend=backend, **options)
    for a, b, c in zip(ours, exact, torchs, strict=True):
        within(a, b, c, 2**-20 * float(1 + b.detach().abs()))
    for a, b, c in zip(grads, exact_grads, torch_grads, strict=True):
        within(a, b, c, 2**-20 * float(b.abs().max()) + torch.finfo(dtype).eps * b.cpu().abs())
    assert not any(m.requires_grad for m in ours[1:]) and all(
        m.dtype == torch.float32 for m in ours
    )


def test_golden(backend, device):
    """Ratio 2, advantage 1: clipped to 1.2, no gradient. Ratio 1, advantage -3: gradient 3."""
    logp = torch.tensor([math.log(0.5), -1.0, 9.0], device=device, requires_grad=True)
    old = torch.tensor([math.log(0.25), -1.0, 0.0], device=device)
    advantages, mask = (
        torch.tensor([1.0, -3.0, 7.0], device=device),
        torch.tensor([True, True, False], device=device),
    )
    values = torch.tensor([1.0, 0.0, 5.0], device=device, requires_grad=True)
    old_values, returns = (
        torch.tensor([0.0, 0.1, 0.0], device=device),
        torch.tensor([1.5, 1.0, 0.0], device=device),
    )
    out = ppo_loss(
        logp,
        old,
        advantages,
        mask,
        values=values,
        old_values=old_values,
        returns=returns,
        value_coef=2.0,
        entropy=torch.tensor([1.0, 2.0, 9.0], device=device),
        entropy_coef=0.5,
        backend=backend,
    )
    policy = (-1.2 + 3.0) / 2
    # value 1: clipped to 0.2, (0.2 - 1.5)^2 = 1.69 > 0.25; value 2: inside the clip, (0 - 1)^2 = 1
    value = (0.5 * 1.69 + 0.5 * 1.0) / 2
    kl = (2 - 1 - math.log(2) + 0) / 2
    expected = [policy + 2 * value - 0.5 * 1.5, policy, value, 1.5, 0.5, 0.5, kl, 1.5, 2.0, 0.0]
    assert [m.item() for m in out] == pytest.approx(expected, rel=1e-6)
    out.loss.backward()
    assert logp.grad.tolist() == pytest.approx([0.0, 1.5, 0.0])
    assert values.grad.tolist() == pytest.approx([0.0, -1.0, 0.0])


def test_equal_policies_have_ratio_one(backend, device):
    logp = torch.randn(50, device=device)
    mask = torch.ones(50, dtype=torch.bool, device=device)
    out = ppo_loss(logp, logp, torch.randn(50, device=device), mask, backend=backend)
    assert (out.ratio_mean, out.ratio_max, out.approx_kl, out.clip_fraction) == (1, 1, 0, 0)


def test_nothing_leaks_from_under_the_mask_and_all_masked_is_zero(backend, device):
    tensors, mask = make((4, 40), torch.float32, device)
    expected, expected_grads = run(ppo_loss, tensors, mask, 1.0, entropy_coef=0.1, backend=backend)
    with torch.no_grad():
        for t in tensors.values():
            t[~mask] = torch.nan
    out, grads = run(ppo_loss, tensors, mask, 1.0, entropy_coef=0.1, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(grads, expected_grads, strict=True))
    out, grads = run(ppo_loss, tensors, mask & False, 1.0, entropy_coef=0.1, backend=backend)
    assert not any(bool(t.any()) for t in (*out, *grads))


def test_micro_batches_add_up(backend, device):
    """Sums over a shared denominator do not depend on how the batch was cut."""
    tensors, mask = make((6, 10), torch.float32, device)
    count = mask.sum()
    whole = ppo_loss(mask=mask, denominator=count, backend=backend, **tensors)
    parts = [
        ppo_loss(
            mask=mask[i],
            denominator=count,
            backend=backend,
            **{k: v[i] for k, v in tensors.items()},
        )
        for i in (slice(0, 1), slice(1, 6))
    ]
    for field in ("loss", "policy_loss", "value_loss", "clip_fraction", "approx_kl", "ratio_mean"):
        total = sum(getattr(p, field) for p in parts)
        torch.testing.assert_close(total, getattr(whole, field), rtol=1e-5, atol=1e-6)


def test_strided_inputs_and_retain_graph(backend, device):
    tensors, mask = make((6, 10), torch.float32, device)
    plain, grads = run(ppo_loss, tensors, mask, 1.0, backend=backend)
    turned = {
        k: v.detach().T.contiguous().T.requires_grad_(v.requires_grad) for k, v in tensors.items()
    }
    out = ppo_loss(mask=mask.T.contiguous().T, backend=backend, **turned)
    leaves = [t for t in turned.values() if t.requires_grad]
    first = torch.autograd.grad(out.loss, leaves, retain_graph=True)
    again = torch.autograd.grad(out.loss, leaves)
    assert torch.equal(out.loss, plain.loss)
    assert all(
        torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, again, grads, strict=True)
    )


def test_gradcheck(torch_only):
    tensors, mask = make((3, 4), torch.float64, "cpu")
    constants = {k: tensors[k] for k in ("old_values", "returns")}

    def loss(logp, values, entropy):
        return ppo_loss(
            logp,
            tensors["old_logprobs"],
            tensors["advantages"],
            mask,
            values=values,
            entropy=entropy,
            entropy_coef=0.3,
            value_coef=0.7,
            **constants,
        ).loss

    assert torch.autograd.gradcheck(
        loss, (tensors["logprobs"], tensors["values"], tensors["entropy"])
    )


def test_mistakes_are_named(torch_only):
    x, mask = torch.zeros(3), torch.ones(3, dtype=torch.bool)
    with pytest.raises(
        ValueError, match="old_values: got None, expected values, old_values and returns together"
    ):
        ppo_loss(x, x, x, mask, values=x, returns=x)
    with pytest.raises(
        ValueError, match=r"advantages: got float32\[2\] on cpu, expected a float tensor of"
    ):
        ppo_loss(x, x, x[:2], mask)
    with pytest.raises(ValueError, match=r"mask: got float32\[3\]"):
        ppo_loss(x, x, x, x)
    with pytest.raises(ValueError, match="clip: got 0"):
        ppo_loss(x, x, x, mask, clip=0)
