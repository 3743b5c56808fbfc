"""The options of the losses from hidden states: the policy family, smoothing, z-loss, softcap."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from fastrlhf.ops import linear_chunks, linear_cross_entropy, linear_ppo_loss
from fastrlhf.ops.linear_loss import linear_cross_entropy_ref, linear_ppo_loss_ref

B, T, H, V = 4, 6, 5, 23


@pytest.fixture(params=[1024, 13, 4], ids=["one chunk", "two sequences a chunk", "part of one"])
def rows_a_chunk(request, monkeypatch):
    monkeypatch.setattr(linear_chunks, "CPU_ROWS", request.param)
    return request.param


def head(dtype, device):
    shapes = ((B, T, H), (V, H), (V,))
    return [torch.randn(s, device=device).to(dtype).requires_grad_() for s in shapes]


def tokens(device):
    labels = torch.randint(0, V, (B, T), device=device)
    mask = torch.rand(B, T, device=device) > 0.3
    mask[2] = False
    return torch.where(mask, labels, -100), mask


def compare(ours, exact, leaves, exact_leaves, tolerance):
    torch.testing.assert_close(ours.double(), exact, **tolerance)
    grads = torch.autograd.grad(ours, leaves)
    for a, b in zip(grads, torch.autograd.grad(exact, exact_leaves), strict=True):
        torch.testing.assert_close(a.double(), b, **tolerance)


FP64, FP32 = {"rtol": 1e-9, "atol": 1e-12}, {"rtol": 1e-4, "atol": 1e-5}
POLICIES = [
    {"objective": o, "ratio": r, "entropy_coef": e, **({"dual_clip": 2.0} if o == "clip" else {})}
    for o, r, e in itertools.product(("clip", "cispo"), ("token", "sequence"), (0.0, 0.1))
]


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("form", POLICIES, ids=lambda f: "-".join(map(str, f.values())))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_policy_losses(form, softcap, dtype, rows_a_chunk, backend, device):
    """In float64 to rounding; in float32 with the kernels."""
    h, w, b = head(dtype, device)
    labels, mask = tokens(device)
    with torch.no_grad():
        h[~mask] = torch.nan
    old = torch.randn(B, T, device=device, dtype=dtype) - 3
    constants = {
        "ref_logprobs": old + 0.3 * torch.randn_like(old),
        "weights": torch.rand_like(old),
    }
    advantages = torch.randn_like(old)
    options = {**form, "softcap": softcap, "clip": (0.2, 0.3), "kl_coef": 0.2, "temperature": 0.9}
    chosen = "auto" if dtype == torch.float64 else backend
    given = {"bias": b, **options, "backend": chosen}
    ours = linear_ppo_loss(h, w, labels, old, advantages, mask, **given, **constants)
    exact = [t.detach().double().requires_grad_() for t in (h, w, b)]
    with torch.no_grad():
        exact[0][~mask] = 0.0
    wide = {k: t.double() for k, t in constants.items()}
    clean = torch.where(mask, labels, 0)
    arguments = (exact[0], exact[1], clean, old.double(), advantages.double(), mask)
    expected = linear_ppo_loss_ref(*arguments, bias=exact[2], **options, **wide)
    tolerance = FP64 if dtype == torch.float64 else FP32
    for name, a, e in zip(ours._fields, ours, expected, strict=True):
        torch.testing.assert_close(a.double(), e, **tolerance, msg=name)
    compare(ours.loss, expected.loss, (h, w, b), exact, tolerance)


@pytest.mark.parametrize(
    ("smoothing", "z_loss", "softcap"), [(0.1, 0.0, None), (0.2, 0.01, None), (0.0, 0.01, 3.0)]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_cross_entropy_options(smoothing, z_loss, softcap, dtype, rows_a_chunk, backend, device):
    h, w, b = head(dtype, device)
    labels, mask = tokens(device)
    options = {"temperature": 0.7, "label_smoothing": smoothing, "z_loss": z_loss}
    options |= {"softcap": softcap, "denominator": 7.0}
    chosen = "auto" if dtype == torch.float64 else backend
    ours = linear_cross_entropy(h, w, labels, mask, bias=b, **options, backend=chosen)
    exact = [t.detach().double().requires_grad_() for t in (h, w, b)]
    clean = torch.where(mask, labels, 0)
    expected = linear_cross_entropy_ref(*exact[:2], clean, mask, bias=exact[2], **options)
    compare(ours, expected, (h, w, b), exact, FP64 if dtype == torch.float64 else FP32)


def test_smoothing_is_that_of_torch(backend, device):
    h, w, b = head(torch.float32, device)
    labels, mask = tokens(device)
    ours = linear_cross_entropy(h, w, labels, mask, bias=b, label_smoothing=0.2, backend=backend)
    logits = torch.nn.functional.linear(h, w, b)[mask]
    theirs = F.cross_entropy(logits, labels[mask], label_smoothing=0.2)
    torch.testing.assert_close(ours, theirs)
    leaves = (h, w, b)
    grads = torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves)
    for a, t in zip(*grads, strict=True):
        torch.testing.assert_close(a, t, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_smoothing_in_half_precision(dtype, backend, device):
    """Of the size of one rounding of the gradients, whose parts are added in hidden's dtype."""
    h, w, b = head(dtype, device)
    labels, mask = tokens(device)
    ours = linear_cross_entropy(
        h, w, labels, mask, bias=b, label_smoothing=0.2, z_loss=0.01, backend=backend
    )
    exact = [t.detach().double().requires_grad_() for t in (h, w, b)]
    clean = torch.where(mask, labels, 0)
    expected = linear_cross_entropy_ref(
        *exact[:2], clean, mask, bias=exact[2], label_smoothing=0.2, z_loss=0.01
    )
    eps = torch.finfo(dtype).eps
    tolerance = {"rtol": 4 * eps, "atol": 4 * eps}
    compare(ours, expected, (h, w, b), exact, tolerance)


def test_padding_has_no_part_in_the_uniform_target(backend, device):
    h, w, b = head(torch.float32, device)
    labels = torch.randint(0, V - 3, (B, T), device=device)
    mask = torch.ones(B, T, dtype=torch.bool, device=device)
    options = {"label_smoothing": 0.3, "backend": backend}
    padded = linear_cross_entropy(h, w, labels, mask, bias=b, vocab_size=V - 3, **options)
    cut = linear_cross_entropy(h, w[: V - 3], labels, mask, bias=b[: V - 3], **options)
    torch.testing.assert_close(padded, cut)
    grads = torch.autograd.grad(padded, (w, b))
    for grad, wanted in zip(grads, torch.autograd.grad(cut, (w, b)), strict=True):
        torch.testing.assert_close(grad, wanted)
        assert not bool(grad[V - 3 :].any())


def test_mistakes_are_named(torch_only):
    h, w, _ = head(torch.float32, "cpu")
    labels, mask = tokens("cpu")
    with pytest.raises(ValueError, match=r"label_smoothing: got 0\.1, expected 0 together with a"):
        linear_cross_entropy(h, w, labels, mask, softcap=3.0, label_smoothing=0.1)
    with pytest.raises(ValueError, match="label_smoothing: got 2, expected a number from 0 to 1"):
        linear_cross_entropy(h, w, labels, mask, label_smoothing=2)
    with pytest.raises(ValueError, match="z_loss: got -1, expected a finite number, 0 or more"):
        linear_cross_entropy(h, w, labels, mask, z_loss=-1)
