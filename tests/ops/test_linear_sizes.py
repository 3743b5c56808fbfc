"""The linear ops at real vocabulary sizes: uneven chunks, tied weights, large fp16 denominators."""

from __future__ import annotations

import pytest
import torch

from fastrlhf.ops import linear_cross_entropy, linear_logprobs, linear_ppo_loss
from fastrlhf.ops.linear import linear_logprobs_ref
from fastrlhf.ops.linear_loss import linear_cross_entropy_ref, linear_ppo_loss_ref

VOCABULARIES = [50257, 128256, 151936, 2**13 - 1, 2**13 + 1]
OPS = ["cross_entropy", "ppo_loss", "recomputed", "kept", "auto"]

pytestmark = pytest.mark.usefixtures("torch_only")


def make(vocab, hidden=4, tokens=11, dtype=torch.float32):
    h = torch.randn(tokens, hidden).to(dtype)
    w, b = torch.randn(vocab, hidden).to(dtype), torch.randn(vocab).to(dtype)
    labels = torch.randint(0, vocab, (tokens,))
    labels[0], labels[1] = 0, vocab - 1
    mask = torch.arange(tokens) % 4 != 2
    return (h, w, b), labels, mask


def small_chunks(monkeypatch, w, rows):
    monkeypatch.setenv("FASTRLHF_LINEAR_BUDGET_MB", str(rows * len(w) * w.element_size() / 2**20))


def results(op, reference, tensors, labels, mask, old, advantages, upstream):
    """Return (values, gradients) of one op or of its plain torch form, for the same upstream."""
    h, w, b = tensors = [t.detach().clone().requires_grad_() for t in tensors]
    shared = {"bias": b, "temperature": 0.7}
    if op == "cross_entropy":
        call = linear_cross_entropy_ref if reference else linear_cross_entropy
        outs = [call(h, w, labels, mask, denominator=5.0, **shared)]
    elif op == "ppo_loss":
        call = linear_ppo_loss_ref if reference else linear_ppo_loss
        outs = list(call(h, w, labels, old, advantages, mask, entropy_coef=0.2, **shared))
    elif reference:
        outs = list(linear_logprobs_ref(h, w, labels, mask=mask, **shared)[:3])
    else:
        recompute = {"recomputed": True, "kept": False, "auto": "auto"}[op]
        outs = list(
            linear_logprobs(
                h, w, labels, mask=mask, with_entropy=True, recompute=recompute, **shared
            )[:3]
        )
    loss = sum(
        (o * u[: o.numel()].view(o.shape).to(o.dtype)).sum()
        for o, u in zip(outs, upstream, strict=False)
    )
    return [o.detach() for o in outs], torch.autograd.grad(loss, tensors)


@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("op", OPS)
def test_equals_float64(op, vocab, within, monkeypatch):
    """8 rows count: chunks of 3, 3 and 2.

    A logit is H + 1 products and sums off by one rounding u each, of terms as large as |h| |w| +
    |b|; divided by T, that moves a log-prob by at most twice as much, and ratios and gradients
    relatively so. The gradient of h is a sum over the vocabulary besides, which some processors'
    kernels take term by term: V roundings of partial sums up to |gradient of the logits| |w|, of
    which 6 standard deviations are allowed, 6 u sqrt(V / 3).
    """
    inputs, labels, mask = make(vocab)
    small_chunks(monkeypatch, inputs[1], 3)
    exact_in = [t.double() for t in inputs]
    now = linear_logprobs_ref(*exact_in[:2], labels, bias=exact_in[2], temperature=0.7).logprobs
    old = (
        now + 0.4 * torch.randint(-1, 2, labels.shape)
    ).float()  # ratios of 0.67, 1 and 1.5: no border is near
    advantages, upstream = torch.randn(labels.shape), torch.randn(10, len(labels))
    arguments = (labels, mask, old, advantages, upstream)
    ours = results(op, False, inputs, *arguments)
    exact = results(op, True, exact_in, *arguments)
    torchs = results(op, True, inputs, *arguments)
    h, w, b = (t.abs() for t in exact_in)
    bound = 2 * (h.shape[1] + 2) * 2**-24 * float((h @ w.T + b).max()) / 0.7
    # One more column per token, 1 in its hidden states and 0 in w: w's gradient then contains that
    # of the token's logits.
    hidden, weight = torch.eye(len(labels)).double(), torch.zeros(vocab, len(labels)).double()
    wider = [torch.cat([exact_in[0], hidden], 1), torch.cat([exact_in[1], weight], 1), exact_in[2]]
    of_logits = results(op, True, wider, *arguments)[1][1][:, w.shape[1] :]
    over_vocabulary = 6 * 2**-24 * (vocab / 3) ** 0.5 * float((of_logits.abs().T @ w).max())
    for a, b, c in zip(ours[0], exact[0], torchs[0], strict=True):
        within(a, b, c, bound * float(b.abs().max().clamp(min=1)))
    for a, b, c, more in zip(ours[1], exact[1], torchs[1], (over_vocabulary, 0, 0), strict=True):
        within(a, b, c, bound * float(b.abs().max().clamp(min=1)) + more)
    assert not bool(ours[1][0][~mask].any())


@pytest.mark.parametrize("op", ["cross_entropy", "ppo_loss", "recomputed"])
def test_a_tied_weight_gets_both_gradients(op, monkeypatch):
    """The head's weight is the embedding too: its gradient is the sum, whichever comes first."""
    torch.manual_seed(3)
    weight, tokens = torch.randn(29, 5, dtype=torch.float64), torch.randint(0, 29, (13,))
    small_chunks(monkeypatch, weight, 4)
    mask, x = torch.arange(13) % 3 != 0, torch.randn(13, dtype=torch.float64) - 3
    grads = []
    for reference in (False, True):
        w = weight.clone().requires_grad_()
        h = torch.tanh(torch.nn.functional.embedding(tokens, w))
        if op == "cross_entropy":
            loss = (linear_cross_entropy_ref if reference else linear_cross_entropy)(
                h, w, tokens.flip(0), mask
            )
        elif op == "ppo_loss":
            call = linear_ppo_loss_ref if reference else linear_ppo_loss
            loss = call(h, w, tokens.flip(0), x, x, mask, entropy_coef=0.1).loss
        elif reference:
            loss = (linear_logprobs_ref(h, w, tokens.flip(0), mask=mask).logprobs * x).sum()
        else:
            loss = (
                linear_logprobs(h, w, tokens.flip(0), mask=mask, recompute=True).logprobs * x
            ).sum()
        (loss + w.square().sum()).backward()  # the weight once more
        grads.append(w.grad)
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)


def normwise(ours, exact):
    return float((ours.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("op", ["cross_entropy", "ppo_loss", "recomputed", "kept"])
@pytest.mark.parametrize("loss_scale", [1.0, 64.0])
def test_nothing_underflows_at_a_denominator_of_a_million(op, dtype, loss_scale, monkeypatch):
    """Dlogits of p / 1e6, 1e-10 for p around 1 / 8191, do not underflow in fp16 (least: 6e-8).

    The weights are 1 + noise, so that dh = w_label - sum p w is wrong by all that the p lose. dh
    and dW are rounded to the dtype a few times, relatively, and once to a multiple of its least
    number.
    """
    (h, w, b), labels, mask = make(8191, hidden=16, tokens=64, dtype=dtype)
    w = (1 + w * 0.25).to(dtype)
    small_chunks(monkeypatch, w, 7)
    advantages = torch.randn(64)
    exact_in = [t.double().requires_grad_() for t in (h, w, b)]
    now = linear_logprobs_ref(*exact_in[:2], labels, bias=exact_in[2]).logprobs.detach().float()
    inputs = [t.clone().requires_grad_() for t in (h, w, b)]
    wide = {"denominator": 1e6}

    def loss(tensors, exact):
        h, w, b = tensors
        if op == "ppo_loss":
            call = linear_ppo_loss_ref if exact else linear_ppo_loss
            return call(h, w, labels, now, 1e-3 * advantages, mask, bias=b, **wide).loss * 1e3
        if op == "cross_entropy":
            return (linear_cross_entropy_ref if exact else linear_cross_entropy)(
                h, w, labels, mask, bias=b, **wide
            )
        if exact:
            return (
                linear_logprobs_ref(h, w, labels, bias=b, mask=mask).logprobs * advantages
            ).sum() / 1e6
        tokens = linear_logprobs(h, w, labels, bias=b, mask=mask, recompute=op == "recomputed")
        return (tokens.logprobs * advantages).sum() / 1e6

    ours = torch.autograd.grad(loss(inputs, False) * loss_scale, inputs)
    exact = torch.autograd.grad(loss(exact_in, True) * loss_scale, exact_in)
    info = torch.finfo(dtype)
    least = (
        info.smallest_normal * info.eps
    )  # subnormal spacing: what one rounding of the result may lose
    for a, e in zip(ours, exact, strict=True):
        lost = least * e.numel() ** 0.5 / float(e.norm())
        assert normwise(a, e) <= 8 * info.eps + lost


def test_the_upstream_of_a_masked_row_is_not_measured(monkeypatch):
    """A NaN or huge upstream under the mask must not set the scale of the gradients."""
    (h, w, b), labels, mask = make(33, dtype=torch.float16)
    h.requires_grad_()
    upstream = torch.where(mask, torch.randn(mask.shape), torch.nan)
    (grad,) = torch.autograd.grad(
        linear_logprobs(h, w, labels, bias=b, mask=mask).logprobs, h, upstream
    )
    (expected,) = torch.autograd.grad(
        linear_logprobs(h, w, labels, bias=b, mask=mask).logprobs, h, upstream.nan_to_num(1e30)
    )
    assert bool(grad.isfinite().all()) and torch.equal(grad, expected) and bool(grad[mask].any())
    zero = torch.autograd.grad(
        linear_logprobs(h, w, labels, mask=mask).logprobs, h, torch.zeros(mask.shape)
    )[0]
    assert not bool(zero.any())
