"""The policy-loss family against its definition in float64, and by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from fastrlhf.ops import ppo_loss
from fastrlhf.ops.ppo import ppo_loss_ref

FORMS = [
    {"objective": objective, "ratio": ratio, "dual_clip": dual}
    for objective, ratio, dual in itertools.product(
        ("clip", "cispo"), ("token", "sequence"), (None, 1.5)
    )
    if objective == "clip" or dual is None
]


def rollout(shape, dtype, device):
    """Return (logprobs, constants, mask): ratios spread widely around the clip."""
    old = -2 * torch.rand(shape) - 0.1
    constants = {
        "old_logprobs": old,
        "advantages": torch.randn(shape),
        "ref_logprobs": old + 0.4 * torch.randn(shape),
        "weights": 2 * torch.rand(shape) - 0.3,
    }
    mask = torch.rand(shape) > 0.3
    if shape[0] > 2:
        mask[1] = False  # a sequence may hold nothing
    made = {name: t.to(device, dtype) for name, t in constants.items()}
    logprobs = (old + 0.5 * torch.randn(shape)).to(device, dtype).requires_grad_()
    return logprobs, made, mask.to(device)


def run(function, logprobs, constants, mask, **options):
    out = function(logprobs, mask=mask, **constants, **options)
    return out, torch.autograd.grad(out.loss, logprobs)[0]


@pytest.mark.parametrize("form", FORMS, ids=lambda f: "-".join(str(v) for v in f.values()))
@pytest.mark.parametrize("estimator", ["k1", "k3"])
@pytest.mark.parametrize(("shape", "dtype"), [((4, 7), torch.float32), ((2, 600), torch.bfloat16)])
def test_against_float64(form, estimator, shape, dtype, backend, device):
    """fp32 arithmetic on the same inputs: a few roundings of each term, and of their sums.

    No ratio is within a rounding of the clip with this seed, so that both clip alike.
    """
    logprobs, constants, mask = rollout(shape, dtype, device)
    options = {**form, "clip": (0.2, 0.3), "kl_coef": 0.3, "kl_estimator": estimator}
    wide = {name: t.double() for name, t in constants.items()}
    exact = logprobs.detach().double().requires_grad_()
    expected, expected_grad = run(ppo_loss_ref, exact, wide, mask, **options)
    ours, grad = run(ppo_loss, logprobs, constants, mask, backend=backend, **options)
    for name, a, b in zip(ours._fields, ours, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2**-18, atol=2**-18, msg=name)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(grad.double(), expected_grad, rtol=2 * eps + 2**-16, atol=2**-22)
    assert not bool(grad[~mask].any())


@pytest.mark.parametrize("estimator", ["abs", "k2"])
def test_the_other_estimators(estimator, backend, device):
    logprobs, constants, mask = rollout((4, 7), torch.float32, device)
    options = {"kl_coef": 0.3, "kl_estimator": estimator}
    wide = {name: t.double() for name, t in constants.items()}
    exact = logprobs.detach().double().requires_grad_()
    expected, expected_grad = run(ppo_loss_ref, exact, wide, mask, **options)
    ours, grad = run(ppo_loss, logprobs, constants, mask, backend=backend, **options)
    torch.testing.assert_close(ours.kl.double(), expected.kl, rtol=2**-18, atol=0)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=2**-16, atol=2**-22)


def tensors(device, *rows):
    return [torch.tensor(row, device=device) for row in rows]


def test_clip_higher_and_dual_clip_by_hand(backend, device):
    """Ratio 1.25: inside (0.2, 0.3), outside 0.2. Ratio 4, A = -1: at most 3, without gradient."""
    old, advantages = tensors(device, [0.0, 0.0], [1.0, -1.0])
    logprobs = torch.tensor([math.log(1.25), math.log(4)], device=device, requires_grad=True)
    mask = torch.ones(2, dtype=torch.bool, device=device)
    out = ppo_loss(logprobs, old, advantages, mask, clip=(0.2, 0.3), dual_clip=3.0, backend=backend)
    assert out.loss.item() == pytest.approx((-1.25 + 3.0) / 2)
    assert out.clip_fraction.item() == 0.5
    out.loss.backward()
    assert logprobs.grad.tolist() == pytest.approx([-1.25 / 2, 0.0])
    plain = ppo_loss(logprobs, old, advantages, mask, backend=backend)
    assert plain.loss.item() == pytest.approx((-1.2 + 4.0) / 2)


def test_cispo_by_hand(backend, device):
    """Ratio 2 counts as 1.2, but keeps its gradient: -1.2 A."""
    old, advantages = tensors(device, [-2.0], [3.0])
    logprobs = torch.tensor([-2.0 + math.log(2)], device=device, requires_grad=True)
    mask = torch.ones(1, dtype=torch.bool, device=device)
    out = ppo_loss(logprobs, old, advantages, mask, objective="cispo", backend=backend)
    assert out.loss.item() == pytest.approx(-1.2 * 3 * (-2 + math.log(2)))
    out.loss.backward()
    assert logprobs.grad.tolist() == pytest.approx([-3.6]) and out.clip_fraction.item() == 1


def test_the_ratio_of_a_sequence_by_hand(backend, device):
    """Log-ratios 0.3 and 0.1 have the mean 0.2; a masked one does not count."""
    old = torch.zeros(1, 3, device=device)
    (advantages,) = tensors(device, [[-1.0, -2.0, 5.0]])
    logprobs = torch.tensor([[0.3, 0.1, math.nan]], device=device, requires_grad=True)
    mask = torch.tensor([[True, True, False]], device=device)
    out = ppo_loss(logprobs, old, advantages, mask, ratio="sequence", clip=0.5, backend=backend)
    ratio = math.exp(0.2)
    assert out.loss.item() == pytest.approx(3 * ratio / 2)
    assert out.ratio_max.item() == pytest.approx(ratio)
    out.loss.backward()
    assert logprobs.grad[0].tolist() == pytest.approx([3 * ratio / 4, 3 * ratio / 4, 0.0])


def test_the_kl_of_grpo_by_hand(backend, device):
    """d = log 2: k3 is 1/2 - 1 + log 2, its gradient 1 - 1/2. Equal policies have ratio 1."""
    logprobs = torch.tensor([-1.0], device=device, requires_grad=True)
    ref, zero = logprobs.detach() - math.log(2), torch.zeros(1, device=device)
    mask = torch.ones(1, dtype=torch.bool, device=device)
    old = logprobs.detach()
    out = ppo_loss(logprobs, old, zero, mask, ref_logprobs=ref, kl_coef=0.5, backend=backend)
    kl = math.log(2) - 0.5
    assert out.kl.item() == pytest.approx(kl) and out.loss.item() == pytest.approx(kl / 2)
    out.loss.backward()
    assert logprobs.grad.tolist() == pytest.approx([0.25])
    only_logged = ppo_loss(logprobs, old, zero, mask, ref_logprobs=ref, backend=backend)
    assert only_logged.loss.item() == 0 and only_logged.kl.item() == pytest.approx(kl)


@pytest.mark.parametrize("form", FORMS, ids=lambda f: "-".join(str(v) for v in f.values()))
def test_nothing_leaks_from_under_the_mask(form, backend, device):
    logprobs, constants, mask = rollout((4, 9), torch.float32, device)
    options = {**form, "kl_coef": 0.3, "backend": backend}
    expected, expected_grad = run(ppo_loss, logprobs, constants, mask, **options)
    for poison in (math.nan, math.inf):
        dirty = {k: t.masked_fill(~mask, poison) for k, t in constants.items()}
        leaf = logprobs.detach().masked_fill(~mask, poison).requires_grad_()
        ours, grad = run(ppo_loss, leaf, dirty, mask, **options)
        assert torch.equal(ours.loss, expected.loss) and torch.equal(grad, expected_grad)
    empty, grad = run(ppo_loss, logprobs, constants, mask & False, **options)
    assert not any(bool(t.any()) for t in (*empty, grad))


def test_weights_scale_every_term_of_the_loss_and_no_metric(backend, device):
    logprobs, constants, mask = rollout((3, 8), torch.float32, device)
    values = torch.randn(3, 8, device=device, requires_grad=True)
    entropy = torch.rand(3, 8, device=device).requires_grad_()
    more = {"old_values": values.detach() + 0.1, "returns": torch.randn(3, 8, device=device)}
    more |= {"values": values, "entropy": entropy, "entropy_coef": 0.2, "kl_coef": 0.1}
    leaves = (logprobs, values, entropy)
    constants["weights"] = torch.full_like(constants["weights"], 3.0)
    weighted = ppo_loss(logprobs, mask=mask, **constants, **more, backend=backend)
    del constants["weights"]
    plain = ppo_loss(logprobs, mask=mask, **constants, **more, backend=backend)
    scaled = {"loss", "policy_loss", "value_loss", "entropy", "kl"}
    for name, a, b in zip(plain._fields, weighted, plain, strict=True):
        torch.testing.assert_close(a, 3 * b if name in scaled else b)
    by_weight = torch.autograd.grad(weighted.loss, leaves)
    for a, b in zip(by_weight, torch.autograd.grad(plain.loss, leaves), strict=True):
        torch.testing.assert_close(a, 3 * b)


@pytest.mark.parametrize("form", FORMS, ids=lambda f: "-".join(str(v) for v in f.values()))
def test_gradcheck(form, torch_only):
    logprobs, constants, mask = rollout((3, 4), torch.float64, "cpu")
    if form["objective"] == "cispo":  # the stopped gradient is not the value's derivative
        pytest.skip("compared with its definition above")
    assert torch.autograd.gradcheck(
        lambda t: ppo_loss(t, mask=mask, **constants, kl_coef=0.3, **form).loss, (logprobs,)
    )


def test_scalars_may_be_tensors(backend, device):
    logprobs, constants, mask = rollout((3, 8), torch.float32, device)
    numbers = {"clip": (0.2, 0.3), "dual_clip": 2.0, "kl_coef": 0.3}
    expected, grad = run(ppo_loss, logprobs, constants, mask, backend=backend, **numbers)
    zero_dim = {k: torch.tensor(v) for k, v in numbers.items() if k != "clip"}
    zero_dim["clip"] = tuple(map(torch.tensor, numbers["clip"]))
    ours, ours_grad = run(ppo_loss, logprobs, constants, mask, backend=backend, **zero_dim)
    for a, b in zip((*ours, ours_grad), (*expected, grad), strict=True):
        torch.testing.assert_close(a, b)


def test_mistakes_are_named(torch_only):
    x, mask = torch.zeros(3), torch.ones(3, dtype=torch.bool)
    for options, words in (
        ({"clip": (0.1, 0.2, 0.3)}, r"clip: got a tuple of 3, expected a number, or a pair"),
        ({"clip": (0.1, 0)}, "clip: got 0, expected a number above 0"),
        ({"kl_coef": 0.1}, "ref_logprobs: got None, expected the reference's log-probs"),
        ({"dual_clip": 0.5}, "dual_clip: got 0.5, expected a number from 1 on"),
        ({"dual_clip": 2.0, "objective": "cispo"}, "dual_clip: got 2.0, expected None with"),
        ({"objective": "ppo"}, "objective: got 'ppo', expected one of 'clip', 'cispo'"),
        ({"ratio": "row"}, "ratio: got 'row', expected one of 'token', 'sequence'"),
        ({"weights": x[:2]}, r"weights: got float32\[2\] on cpu, expected a float tensor"),
    ):
        with pytest.raises(ValueError, match=words):
            ppo_loss(x, x, x, mask, **options)
