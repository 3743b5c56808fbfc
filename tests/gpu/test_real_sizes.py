"""Every op at the sizes of a training run, against float64 computed some rows at a time.

Errors are measured as || ours - exact || / || exact ||. Bounds: per-token results are fp32 sums
over V terms of inputs that float64 reads too, so 1e-5; gradients are stored in the dtype of the
inputs, so its rounding unit (4e-3 for bf16, whose logits are rounded as well in the linear ops,
hence three of them there).
"""

from __future__ import annotations

import pytest
import torch

import fastrlhf.ops as ops
from fastrlhf.ops.advantage import _gae_torch
from fastrlhf.ops.linear_loss import linear_cross_entropy_ref, linear_ppo_loss_ref
from fastrlhf.ops.logprob import logprobs_ref
from fastrlhf.ops.ppo import ppo_loss_ref
from fastrlhf.ops.ranking import pairwise_ranking_loss_ref

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
CUDA = torch.device("cuda")
BF16 = torch.bfloat16
PER_TOKEN, UNIT = 1e-5, 2.0**-8


def error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    gap = torch.linalg.vector_norm(ours.double() - exact) / torch.linalg.vector_norm(exact)
    assert not torch.isnan(gap)
    return float(gap)


def random_logits(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    out = torch.empty(shape, dtype=dtype, device=CUDA)
    for block in out.split(512):
        block.copy_(3 * torch.randn(block.shape, device=CUDA))
    return out


def check_rows(logits, labels, tokens, grad, g_logp, g_entropy, rows) -> None:
    """Compare logprobs, entropy, log-sum-exp and the gradient at some rows with float64."""
    for at in rows:
        x = logits.detach()[at].double().requires_grad_()
        exact = logprobs_ref(x, labels[at])
        loss = (exact.logprobs * g_logp[at]).sum() + (exact.entropy * g_entropy[at]).sum()
        (exact_grad,) = torch.autograd.grad(loss, x)
        for ours, truth in zip(tokens[:3], exact[:3], strict=True):
            assert error(ours.detach()[at], truth.detach()) < PER_TOKEN
        assert error(grad[at], exact_grad) < UNIT


@pytest.mark.parametrize("vocab", [128256, 50257, 151937])
@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_logprobs(vocab, dtype, gib):
    gib(16)
    n = 4096
    logits = random_logits(n, vocab, dtype=dtype).requires_grad_()
    labels, g_logp, g_entropy = (
        torch.randint(vocab, (n,), device=CUDA),
        *torch.randn(2, n, device=CUDA),
    )
    tokens = ops.logprobs(logits, labels, with_entropy=True, backend="triton")
    (grad,) = torch.autograd.grad([tokens.logprobs, tokens.entropy], logits, [g_logp, g_entropy])
    check_rows(
        logits, labels, tokens, grad, g_logp, g_entropy, torch.arange(n, device=CUDA).split(1024)
    )


def test_logprobs_past_2_to_the_31(gib):
    """18,000 tokens of a 128k vocabulary: offsets of the last rows need more than 32 bits."""
    gib(24)
    n, vocab = 18_000, 128_256
    assert n * vocab > 2**31
    logits = random_logits(n, vocab).requires_grad_()
    labels, g_logp, g_entropy = (
        torch.randint(vocab, (n,), device=CUDA),
        *torch.randn(2, n, device=CUDA),
    )
    tokens = ops.logprobs(logits, labels, with_entropy=True)
    (grad,) = torch.autograd.grad([tokens.logprobs, tokens.entropy], logits, [g_logp, g_entropy])
    border = 2**31 // vocab
    rows = torch.tensor([0, 1, border - 1, border, border + 1, n - 2, n - 1], device=CUDA)
    check_rows(logits, labels, tokens, grad, g_logp, g_entropy, [rows])
    assert bool(torch.isfinite(tokens.logprobs).all())


def test_logits_kl_past_2_to_the_31(gib):
    gib(32)
    n, vocab = 17_000, 128_256
    logits, ref = random_logits(n, vocab).requires_grad_(), random_logits(n, vocab)
    weight = torch.randn(n, device=CUDA)
    kl = ops.logits_kl(logits, ref)
    (grad,) = torch.autograd.grad(kl, logits, weight)
    rows = torch.tensor([0, 2**31 // vocab, n - 1], device=CUDA)
    x = logits.detach()[rows].double().requires_grad_()
    logp, logq = torch.log_softmax(x, -1), torch.log_softmax(ref[rows].double(), -1)
    exact = (logp.exp() * (logp - logq)).sum(-1)
    assert error(kl.detach()[rows], exact.detach()) < PER_TOKEN
    assert error(grad[rows], torch.autograd.grad(exact, x, weight[rows])[0]) < UNIT


def head(
    n: int, hidden: int, vocab: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    h = torch.randn(n, hidden, device=CUDA).to(BF16).requires_grad_()
    w = (2 * hidden**-0.5 * torch.randn(vocab, hidden, device=CUDA)).to(BF16).requires_grad_()
    return h, w, torch.randint(vocab, (n,), device=CUDA), torch.rand(n, device=CUDA) > 0.2


def exact_gradients(
    loss_of_rows, h, w, rows: int = 256
) -> tuple[float, torch.Tensor, torch.Tensor]:
    """Return the sum of `loss_of_rows(h, w, slice)` over blocks and its gradients, in float64."""
    total, dh = 0.0, torch.empty(h.shape, dtype=torch.float64, device=CUDA)
    w64 = w.detach().double().requires_grad_()
    dw = torch.zeros_like(w64)
    for start in range(0, h.shape[0], rows):
        at = slice(start, start + rows)
        h64 = h.detach()[at].double().requires_grad_()
        loss = loss_of_rows(h64, w64, at)
        dh[at], part = torch.autograd.grad(loss, [h64, w64])
        dw += part
        total += float(loss)
    return total, dh, dw


# 5,000 rows: one full chunk of the head and a remainder
N, H, V = 5000, 1024, 50257


def test_linear_cross_entropy(gib):
    gib(12)
    h, w, labels, mask = head(N, H, V)
    count = float(mask.sum())
    loss = ops.linear_cross_entropy(h, w, labels, mask)
    grads = torch.autograd.grad(loss, [h, w])
    exact, *exact_grads = exact_gradients(
        lambda a, b, at: linear_cross_entropy_ref(a, b, labels[at], mask[at], denominator=count),
        h,
        w,
    )
    assert abs(float(loss) - exact) < 1e-3 * abs(exact)  # the logits are rounded to bf16 on the way
    assert all(error(g, e) < 3 * UNIT for g, e in zip(grads, exact_grads, strict=True))


def test_linear_ppo_loss(gib):
    gib(12)
    h, w, labels, mask = head(N, H, V)
    with torch.no_grad():
        old = ops.linear_logprobs(h, w, labels).logprobs + 0.3 * torch.randn(N, device=CUDA)
    advantages, count = torch.randn(N, device=CUDA), float(mask.sum())
    # where rounding decides on which side of the clip a token falls, float64 is no measure
    ratio = torch.exp(ops.linear_logprobs(h, w, labels).logprobs.detach() - old)
    mask &= ((ratio - 1).abs() - 0.2).abs() > 0.03
    shared = {"entropy_coef": 0.01, "denominator": count}
    out = ops.linear_ppo_loss(h, w, labels, old, advantages, mask, **shared)
    grads = torch.autograd.grad(out.loss, [h, w])

    def rows(a, b, at):
        return linear_ppo_loss_ref(
            a, b, labels[at], old[at].double(), advantages[at].double(), mask[at], **shared
        ).loss

    _, *exact_grads = exact_gradients(rows, h, w)
    assert all(error(g, e) < 3 * UNIT for g, e in zip(grads, exact_grads, strict=True))


@pytest.mark.parametrize("recompute", [True, False])
def test_linear_logprobs(recompute, gib):
    gib(12)
    h, w, labels, mask = head(N, H, V)
    g_logp, g_entropy = torch.randn(2, N, device=CUDA)
    tokens = ops.linear_logprobs(h, w, labels, mask=mask, with_entropy=True, recompute=recompute)
    grads = torch.autograd.grad([tokens.logprobs, tokens.entropy], [h, w], [g_logp, g_entropy])

    def rows(a, b, at):
        exact = logprobs_ref(a @ b.T, labels[at], mask=mask[at])
        return (exact.logprobs * g_logp[at]).sum() + (exact.entropy * g_entropy[at]).sum()

    _, *exact_grads = exact_gradients(rows, h, w)
    assert all(error(g, e) < 3 * UNIT for g, e in zip(grads, exact_grads, strict=True))


def test_a_fused_loss_never_holds_the_logits(gib):
    """Forward and backward allocate dh, dW in fp32 and its copy, and a chunk of logits."""
    gib(16)
    n, hidden, vocab = 32_768, 512, 50_257
    h, w, labels, mask = head(n, hidden, vocab)
    torch.autograd.grad(ops.linear_cross_entropy(h[:64], w, labels[:64], mask[:64]), [h, w])
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.grad(ops.linear_cross_entropy(h, w, labels, mask), [h, w])
    extra = torch.cuda.max_memory_allocated() - before
    whole = n * vocab * 2
    assert extra < whole / 2, f"{extra / 2**20:.0f} MiB, logits are {whole / 2**20:.0f} MiB"


@pytest.mark.parametrize("shape", [(512, 1024), (64, 8193), (4096, 33)])
def test_gae(shape):
    rewards, values = torch.randn(2, *shape, device=CUDA)
    mask = torch.rand(shape, device=CUDA) > 0.2
    exact = _gae_torch(rewards.double().cpu(), values.double().cpu(), mask.cpu(), 0.99, 0.95)
    for ours, truth in zip(
        ops.gae(rewards, values, mask, 0.99, 0.95, backend="triton"), exact, strict=True
    ):
        assert error(ours.cpu(), truth) < PER_TOKEN


def test_ppo_loss():
    shape = (512, 1024)
    logp, values, advantages, returns = torch.randn(4, *shape, device=CUDA)
    old, old_values = logp + 0.3 * torch.randn_like(logp), values + 0.3 * torch.randn_like(values)
    mask = torch.rand(shape, device=CUDA) > 0.2
    leaves = [logp.requires_grad_(), values.requires_grad_()]
    out = ops.ppo_loss(
        logp,
        old,
        advantages,
        mask,
        values=values,
        old_values=old_values,
        returns=returns,
        backend="triton",
    )
    l64, v64 = (t.detach().double().requires_grad_() for t in leaves)
    exact = ppo_loss_ref(
        l64,
        old.double(),
        advantages.double(),
        mask,
        values=v64,
        old_values=old_values.double(),
        returns=returns.double(),
    )
    assert error(torch.stack(out).detach()[:3], torch.stack(exact).detach()[:3]) < PER_TOKEN
    # a ratio that rounds across the clip loses or gains its gradient: a handful in half a million
    for ours, truth in zip(
        torch.autograd.grad(out.loss, leaves),
        torch.autograd.grad(exact.loss, [l64, v64]),
        strict=True,
    ):
        off = (ours.double() - truth).abs() > 1e-5 * truth.abs().max()
        assert int(off.sum()) <= 16


@pytest.mark.parametrize("sizes", [[9] * 64, [2, 64, 3, 33, 17] * 100])
def test_ranking_loss(sizes):
    offsets = torch.tensor([0, *sizes]).cumsum(0).to(CUDA)
    n = int(offsets[-1])
    scores, ranks = (
        torch.randn(n, device=CUDA, requires_grad=True),
        torch.randint(9, (n,), device=CUDA),
    )
    out = ops.pairwise_ranking_loss(scores, ranks, offsets, backend="triton")
    s64 = scores.detach().double().requires_grad_()
    exact = pairwise_ranking_loss_ref(s64, ranks, offsets)
    assert error(out.loss.detach(), exact.loss.detach()) < PER_TOKEN
    ours, truth = torch.autograd.grad(out.loss, scores)[0], torch.autograd.grad(exact.loss, s64)[0]
    assert error(ours, truth) < PER_TOKEN
    assert float(out.pairs) == float(exact.pairs)
