"""softcap tanh(x / softcap) of the logits, inside the kernels, against float64."""

from __future__ import annotations

import math

import pytest
import torch

from fastrlhf.ops import linear_logprobs, logprobs
from fastrlhf.ops.linear import linear_logprobs_ref
from fastrlhf.ops.logprob import logprobs_ref


@pytest.mark.parametrize("vocab", [5, 17, 1025, 5001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("softcap", "temperature"), [(5.0, 1.0), (30.0, 0.7)])
def test_against_float64(vocab, dtype, softcap, temperature, backend, device, within):
    """The capping adds one rounding of a logit of at most `softcap` to torch's own errors."""
    logits = (8 * torch.randn(3, vocab)).to(device, dtype)
    with torch.no_grad():
        logits[0, 0] = 1e4  # saturated: no gradient
    labels = torch.tensor([0, 1, vocab - 1], device=device)
    mask = torch.tensor([True, True, False], device=device)
    options = {"softcap": softcap, "temperature": temperature, "mask": mask}
    upstream = torch.randn(3, 3, device=device)

    def run(function, x, **more):
        leaf = x.detach().requires_grad_()
        out = function(leaf, labels, **options, **more)[:3]
        loss = sum((t * u.to(t.dtype)).sum() for t, u in zip(out, upstream, strict=True))
        return out, torch.autograd.grad(loss, leaf)[0]

    exact, exact_grad = run(logprobs_ref, logits.double())
    torchs, torch_grad = run(logprobs_ref, logits)
    ours, grad = run(logprobs, logits, with_entropy=True, backend=backend)
    size = 1 + softcap / temperature
    for a, b, c in zip(ours, exact, torchs, strict=True):
        within(a, b, c, 2**-20 * size)
    eps = torch.finfo(dtype).eps
    within(grad, exact_grad, torch_grad, 2**-20 * size + eps * exact_grad.abs().cpu())
    assert not bool(grad[2].any()) and grad[0, 0].item() == 0


def test_a_forbidden_token_is_capped_like_any_other(backend, device):
    """-inf becomes -softcap, as in softcap * tanh(x / softcap): forbid tokens after the cap."""
    logits = torch.tensor([[0.0, -math.inf]], device=device)
    label = torch.tensor([1], device=device)
    out = logprobs(logits, label, softcap=2.0, backend=backend)
    assert out.logprobs.item() == pytest.approx(-2 - math.log(1 + math.exp(-2)), rel=1e-6)


@pytest.mark.parametrize("recompute", [True, False])
def test_the_linear_op(recompute, backend, device):
    h, w = torch.randn(2, 5, 6, device=device), 3 * torch.randn(23, 6, device=device)
    labels = torch.randint(0, 23, (2, 5), device=device)
    results = []
    for function, more in (
        (linear_logprobs, {"recompute": recompute, "backend": backend, "with_entropy": True}),
        (linear_logprobs_ref, {}),
    ):
        dtype = torch.float32 if more else torch.float64
        leaves = [t.to(dtype).requires_grad_() for t in (h, w)]
        out = function(*leaves, labels, softcap=4.0, temperature=0.8, **more)
        loss = out.logprobs.square().sum() + out.entropy.sum() + out.logsumexp.sum()
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


def test_mistakes_are_named(torch_only):
    for softcap in (0.0, -1.0, math.inf):
        with pytest.raises(ValueError, match=r"softcap: got .*, expected a number above 0"):
            logprobs(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long), softcap=softcap)
