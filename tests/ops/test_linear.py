from __future__ import annotations

import pytest
import torch

from fastrlhf.ops import linear_chunks, linear_cross_entropy, linear_logprobs, linear_ppo_loss
from fastrlhf.ops.linear import linear_logprobs_ref
from fastrlhf.ops.linear_loss import linear_cross_entropy_ref, linear_ppo_loss_ref

DTYPES = [torch.float32, torch.bfloat16]


def make(dtype, device, vocab=123, hidden=24, shape=(2, 9)):
    scale = hidden**-0.5
    h = torch.randn(*shape, hidden).to(dtype).to(device).requires_grad_()
    w = (2 * scale * torch.randn(vocab, hidden)).to(dtype).to(device).requires_grad_()
    b = torch.randn(vocab).to(dtype).to(device).requires_grad_()
    labels, mask = torch.randint(0, vocab, shape).to(device), torch.rand(shape).to(device) > 0.3
    return (h, w, b), labels, mask


def double(tensors):
    return [t.detach().double().requires_grad_() for t in tensors]


def tolerance(dtype: torch.dtype) -> float:
    """Return the rounding of logits, dlogits and result to `dtype`; torch's error is added."""
    return 4 * torch.finfo(dtype).eps


def compare(inputs, call_ours, call_ref, within, upstream):
    """Compare values and gradients of `call_ours` with float64 and with the reference's error."""
    exact_in = double(inputs)
    results = []
    for call, tensors in ((call_ours, inputs), (call_ref, exact_in), (call_ref, inputs)):
        outs = [t for t in call(*tensors) if t is not None]
        loss = sum((o * u.to(o.dtype)).sum() for o, u in zip(outs, upstream, strict=False))
        results.append(([o.detach() for o in outs], torch.autograd.grad(loss, tensors)))
    (out, grads), (exact, exact_grads), (torchs, torch_grads) = results
    eps = tolerance(inputs[0].dtype)
    for a, b, c in zip(
        [*out, *grads], [*exact, *exact_grads], [*torchs, *torch_grads], strict=True
    ):
        within(a, b, c, eps * float(b.abs().max().clamp(min=1)))
    assert [g.dtype for g in grads] == [t.dtype for t in inputs]


@pytest.fixture(params=["small chunks", "one chunk"])
def chunking(request, monkeypatch):
    """Cut 18 rows of 123 logits into chunks of at most 5 (fp32) or 10 (bf16) rows, or one."""
    if request.param == "small chunks":
        monkeypatch.setenv("FASTRLHF_LINEAR_BUDGET_MB", str(5.5 * 123 * 4 / 2**20))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("recompute", [True, False])
def test_logprobs(dtype, recompute, backend, device, within, chunking):
    inputs, labels, mask = make(dtype, device)
    ref = torch.randn(labels.shape, device=device)
    shared = {"temperature": 0.8, "mask": mask, "ref_logprobs": ref}
    upstream = [torch.randn(labels.shape, device=device) for _ in range(4)]
    compare(
        inputs,
        lambda h, w, b: linear_logprobs(
            h, w, labels, bias=b, recompute=recompute, with_entropy=True, backend=backend, **shared
        ),
        lambda h, w, b: linear_logprobs_ref(h, w, labels, bias=b, **shared),
        within,
        upstream,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("denominator", [None, 5.0, "tensor"])
def test_cross_entropy(dtype, denominator, backend, device, within, chunking):
    inputs, labels, mask = make(dtype, device)
    denominator = torch.tensor(7.0, device=device) if denominator == "tensor" else denominator
    shared = {"denominator": denominator, "temperature": 1.3}
    compare(
        inputs,
        lambda h, w, b: [
            linear_cross_entropy(h, w, labels, mask, bias=b, backend=backend, **shared)
        ],
        lambda h, w, b: [linear_cross_entropy_ref(h, w, labels, mask, bias=b, **shared)],
        within,
        [torch.tensor(-2.5)],
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("entropy_coef", [0.0, 0.3])
def test_ppo_loss(dtype, entropy_coef, backend, device, within, chunking):
    inputs, labels, mask = make(dtype, device)
    with torch.no_grad():
        now = linear_logprobs_ref(*double(inputs[:2]), labels, bias=inputs[2].double()).logprobs
    # half of the ratios are clipped, none is near a border where rounding would choose the side
    old = (now + 0.5 * torch.randint(-1, 2, labels.shape, device=device) * 0.8).float()
    advantages = torch.randn(labels.shape, device=device)
    shared = {"clip": 0.2, "entropy_coef": entropy_coef}
    compare(
        inputs,
        lambda h, w, b: linear_ppo_loss(
            h, w, labels, old, advantages, mask, bias=b, backend=backend, **shared
        ),
        lambda h, w, b: linear_ppo_loss_ref(h, w, labels, old, advantages, mask, bias=b, **shared),
        within,
        [torch.tensor(1.5)],
    )


def test_nothing_leaks_from_under_the_mask(backend, device):
    """A NaN hidden state under the mask must not reach the weight's gradient as 0 * NaN."""
    (h, w, b), labels, mask = make(torch.float32, device)
    with torch.no_grad():
        h[~mask] = torch.nan
    labels = torch.where(mask, labels, -100)
    nan = torch.where(mask, torch.zeros(mask.shape, device=device), torch.nan)
    for loss in (
        linear_cross_entropy(h, w, labels, mask, bias=b, backend=backend),
        linear_ppo_loss(h, w, labels, nan, nan + 1, mask, bias=b, backend=backend).loss,
        linear_logprobs(h, w, labels, bias=b, mask=mask, backend=backend).logprobs.sum(),
    ):
        grads = torch.autograd.grad(loss, (h, w, b))
        assert bool(loss.isfinite()) and all(bool(g.isfinite().all()) for g in grads)
        assert not bool(grads[0][~mask].any()) and bool(grads[1].any())


@pytest.mark.parametrize("extra", [0, 2, 100])
def test_rows_not_counted_never_reach_a_gemm(extra, backend, device, monkeypatch):
    """As on a GPU, whose masks cannot be read: num_counted is exact, a little or far too large."""
    monkeypatch.setattr(linear_chunks, "readable", lambda mask: False)
    inputs, labels, mask = make(torch.float32, device)
    with torch.no_grad():
        inputs[0][~mask] = torch.nan
    x = torch.randn(labels.shape, device=device)
    seen = []
    chunk_logits = linear_chunks.LinearHead.chunk_logits

    def counting(head, hidden, out):
        seen.append(len(hidden))
        return chunk_logits(head, hidden, out)

    monkeypatch.setattr(linear_chunks.LinearHead, "chunk_logits", counting)

    def results(op, num_counted):
        h, w, b = leaves = [t.detach().clone().requires_grad_() for t in inputs]
        shared = {"bias": b, "num_counted": num_counted, "backend": backend}
        if op == "cross_entropy":
            loss = linear_cross_entropy(h, w, labels, mask, **shared)
        elif op == "ppo_loss":
            loss = linear_ppo_loss(h, w, labels, x - 4, x, mask, entropy_coef=0.1, **shared).loss
        else:
            recompute = op == "recomputed"
            tokens = linear_logprobs(
                h, w, labels, mask=mask, with_entropy=True, recompute=recompute, **shared
            )
            loss = (tokens.logprobs * x + tokens.entropy).sum()
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    for op, passes in (("cross_entropy", 1), ("ppo_loss", 1), ("recomputed", 2), ("kept", 1)):
        expected = results(op, None)
        assert sum(seen) == passes * mask.numel()
        seen.clear()
        ours = results(op, int(mask.sum()) + extra)
        assert sum(seen) == passes * min(mask.numel(), int(mask.sum()) + extra)
        seen.clear()
        for a, e in zip(ours, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-6)


def test_all_masked_is_zero(backend, device):
    (h, w, b), labels, mask = make(torch.float32, device)
    loss = linear_cross_entropy(h, w, labels, mask & False, bias=b, backend=backend)
    loss.backward()
    assert loss.item() == 0 and not bool(h.grad.any()) and not bool(w.grad.any())


def test_retain_graph_and_frozen_parameters(backend, device):
    (h, w, b), labels, mask = make(torch.float32, device)
    loss = linear_cross_entropy(h, w, labels, mask, bias=b, backend=backend)
    first = torch.autograd.grad(loss, (h, w), retain_graph=True)
    again = torch.autograd.grad(loss, (h, w))
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    frozen = linear_cross_entropy(h, w.detach(), labels, mask, bias=b.detach(), backend=backend)
    assert torch.equal(torch.autograd.grad(frozen, h)[0], first[0])
    for recompute in (True, False):
        logp = linear_logprobs(h, w, labels, recompute=recompute, backend=backend).logprobs
        first = torch.autograd.grad(logp.sum(), (h, w), retain_graph=True)
        again = torch.autograd.grad(logp.sum(), (h, w))
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    with torch.no_grad():
        assert not linear_cross_entropy(h, w, labels, mask, backend=backend).requires_grad


def test_the_weight_gradient_is_accumulated_in_fp32(backend, device, monkeypatch):
    """64 chunks each add 2^-9 of a first, large one: in bf16 each would round to 0."""
    for limit in ("CPU_ROWS", "GPU_ROWS"):
        monkeypatch.setattr(linear_chunks, limit, 1)
    h = torch.full((65, 1), 2.0**-9, dtype=torch.bfloat16, device=device)
    h[0] = 1.0
    w = torch.zeros(2, 1, dtype=torch.bfloat16, device=device, requires_grad=True)
    labels, mask = (
        torch.zeros(65, dtype=torch.long, device=device),
        torch.ones(65, dtype=torch.bool, device=device),
    )
    linear_cross_entropy(h, w, labels, mask, denominator=1.0, backend=backend).backward()
    assert w.grad[0].item() == pytest.approx(-0.5 * (1 + 64 * 2**-9), rel=2**-8)


@pytest.mark.parametrize("recompute", [True, False])
def test_gradcheck(recompute, torch_only, monkeypatch):
    monkeypatch.setenv("FASTRLHF_LINEAR_BUDGET_MB", str(2 * 7 * 8 / 2**20))  # two rows at a time
    (h, w, b), labels, mask = make(torch.float64, "cpu", vocab=7, hidden=3, shape=(2, 3))
    old, advantages = torch.randn(2, 3).double() - 2, torch.randn(2, 3).double()

    def all_three(h, w, b):
        tokens = linear_logprobs(
            h, w, labels, bias=b, recompute=recompute, mask=mask, with_entropy=True
        )
        ce = linear_cross_entropy(h, w, labels, mask, bias=b, temperature=0.7)
        ppo = linear_ppo_loss(h, w, labels, old, advantages, mask, bias=b, entropy_coef=0.2)
        return tokens.logprobs, tokens.entropy, tokens.logsumexp, ce, ppo.loss

    assert torch.autograd.gradcheck(all_three, (h, w, b))


def all_losses(h, w, b, labels, mask, advantages, backend):
    tokens = linear_logprobs(h, w, labels, bias=b, mask=mask, with_entropy=True, backend=backend)
    ce = linear_cross_entropy(h, w, labels, mask, bias=b, backend=backend)
    ppo = linear_ppo_loss(
        h, w, labels, tokens.logprobs.detach(), advantages, mask, bias=b, backend=backend
    )
    return tokens.logprobs.sum(), tokens.entropy.sum(), ce, ppo.loss


@pytest.mark.parametrize("dtype", DTYPES)
def test_autocast_casts_as_a_linear_layer_does(dtype, backend, device):
    """fp32 parameters under bf16 autocast equal bf16 ones bit for bit; their gradients are fp32."""
    (h, w, b), labels, mask = make(torch.float32, device)
    h, advantages = h.detach().to(dtype).requires_grad_(), torch.randn(labels.shape, device=device)
    half = [t.detach().bfloat16().requires_grad_() for t in (h, w, b)]
    expected = all_losses(*half, labels, mask, advantages, backend)
    with torch.autocast(device.type, torch.bfloat16):
        ours = all_losses(h, w, b, labels, mask, advantages, backend)
    assert all(
        x.dtype == torch.float32 and torch.equal(x, y) for x, y in zip(ours, expected, strict=True)
    )
    grads, exact = (
        torch.autograd.grad(sum(ours), (h, w, b)),
        torch.autograd.grad(sum(expected), half),
    )
    for x, y, parameter in zip(grads, exact, (h, w, b), strict=True):
        assert x.dtype == parameter.dtype
        torch.testing.assert_close(
            x.float(), y.float(), rtol=2**-7, atol=2**-7
        )  # sums of bf16 gradients


def test_autocast_multiplies_in_its_dtype(backend, device, monkeypatch):
    """Autocast casts fp32 operands too, and in a compiled graph, as nn.Linear does."""
    (h, w, b), labels, mask = make(torch.float32, device)
    seen = []
    chunk_logits = linear_chunks.LinearHead.chunk_logits

    def recording(head, hidden, out):
        seen.append(hidden.dtype)
        return chunk_logits(head, hidden, out)

    monkeypatch.setattr(linear_chunks.LinearHead, "chunk_logits", recording)
    with torch.autocast(device.type, torch.bfloat16):
        all_losses(h, w, b, labels, mask, torch.randn(labels.shape, device=device), backend)
        torch.compile(linear_cross_entropy, backend="aot_eager", fullgraph=True)(
            h, w, labels, mask, bias=b
        )
        with torch.autocast(device.type, enabled=False):
            assert set(seen) == {torch.bfloat16} and len(seen) >= 4
            linear_cross_entropy(h, w, labels, mask, bias=b, backend=backend)
        assert seen[-1] == torch.float32
        wide = [t.detach().double() for t in (h, w, b)]
        assert linear_cross_entropy(*wide[:2], labels, mask, bias=wide[2]).dtype == torch.float64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"weight": torch.zeros(5, 4)},
            r"weight: got float32\[5, 4\] on cpu, expected \[V, 3\] with V above 0",
        ),
        (
            {"weight": torch.zeros(0, 3)},
            r"weight: got float32\[0, 3\] on cpu, expected \[V, 3\] with V above 0",
        ),
        (
            {"weight": torch.zeros(5, 3).bfloat16()},
            r"weight: got bfloat16\[5, 3\].*of hidden's dtype",
        ),
        ({"bias": torch.zeros(4)}, r"bias: got float32\[4\] on cpu, expected \[5\]"),
        (
            {"num_counted": 1},
            r"num_counted: got 1, expected no less than the mask's True positions \(2\)",
        ),
        (
            {"num_counted": -1},
            "num_counted: got -1, expected the number of the mask's True positions, or a larger"
            " one",
        ),
        ({"mask": None}, "mask: got None, expected a bool tensor"),
        ({"denominator": 0.0}, "denominator: got 0.0, expected a number above 0"),
        (
            {"denominator": torch.ones(1)},
            r"denominator: got float32\[1\] on cpu, expected a float or a 0-dim tensor",
        ),
    ],
)
def test_mistakes_are_named(change, message, torch_only):
    given = {
        "hidden": torch.zeros(2, 3),
        "weight": torch.zeros(5, 3),
        "labels": torch.zeros(2, dtype=torch.long),
        "mask": torch.ones(2, dtype=torch.bool),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**given)
