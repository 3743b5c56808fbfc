"""Tests that need a GPU: no op waits for it, and one compilation serves every batch size."""

from __future__ import annotations

import pytest
import torch

import fastrlhf.ops as ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def everything(tokens: int, vocab: int = 1003) -> None:
    """Run every op, forward and backward, on a [2, tokens] batch."""
    device = "cuda"
    x = torch.randn(2, tokens, vocab, device=device, dtype=torch.bfloat16, requires_grad=True)
    h = torch.randn(2, tokens, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
    w = torch.randn(vocab, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.zeros(2, tokens, device=device, dtype=torch.long)
    mask = torch.ones(2, tokens, device=device, dtype=torch.bool)
    old = torch.zeros(2, tokens, device=device)
    scores, offsets = torch.zeros(2, device=device), torch.arange(0, 3, 2, device=device)
    token = ops.logprobs(x, labels, mask=mask, with_entropy=True)
    linear = ops.linear_logprobs(h, w, labels, mask=mask, with_entropy=True)
    targets = ops.rollout_targets(scores, old, old, old, mask, kl_coef=0.1)
    loss = ops.ppo_loss(token.logprobs, old, targets.advantages, mask, entropy=token.entropy).loss
    loss = (
        loss
        + ops.linear_ppo_loss(h, w, labels, old, targets.advantages, mask, entropy_coef=0.1).loss
    )
    loss = loss + ops.linear_cross_entropy(h, w, labels, mask) + linear.entropy.sum()
    loss = loss + ops.logits_kl(x, x.detach() * 0.5, mask=mask).sum()
    loss = (
        loss
        + ops.pairwise_ranking_loss(
            token.logprobs[:, 0], torch.arange(2, device=device), offsets
        ).loss
    )
    loss.backward()
    ops.gae(old, old, mask)
    ops.masked_whiten(old, mask)


def test_nothing_waits_for_the_gpu():
    everything(33)  # compile first
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything(33)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("place", ["cpu", "cuda"])
def test_a_controllers_coefficient_may_lie_on_the_host(place):
    logprobs, mask = (
        torch.randn(2, 5, device="cuda"),
        torch.ones(2, 5, dtype=torch.bool, device="cuda"),
    )
    inputs = (
        torch.ones(2, device="cuda"),
        logprobs,
        torch.zeros_like(logprobs),
        torch.zeros_like(logprobs),
        mask,
    )
    expected = ops.rollout_targets(*inputs, kl_coef=0.1)
    for ours, exact in zip(
        ops.rollout_targets(*inputs, kl_coef=torch.tensor(0.1, device=place)), expected, strict=True
    ):
        assert torch.equal(ours, exact)


def test_no_recompilation_for_another_batch_size():
    from fastrlhf.kernels import gae, logits_kl, logprob, ppo_loss, ranking

    kernels = [
        logprob._forward_kernel,
        logprob._backward_kernel,
        logits_kl._statistics_kernel,
        logits_kl._backward_kernel,
        ppo_loss._kernel,
        gae._shaped_gae_kernel,
        ranking._kernel,
    ]

    def compiled() -> int:
        return sum(len(cache[0]) for k in kernels for cache in k.device_caches.values())

    everything(150)
    before = compiled()
    for tokens in (151, 160, 176, 257):
        everything(tokens)
    assert compiled() == before


def test_slices_at_any_alignment_compile_nothing_and_are_right():
    """Full-width accesses start at 16 bytes for odd widths and any address of the first row."""
    from fastrlhf.kernels import logprob

    base = torch.randn(64 * 4099, device="cuda", dtype=torch.bfloat16)
    labels = torch.randint(4099, (16,), device="cuda")
    counts = []
    for offset in range(9):
        x = base[offset : offset + 16 * 4099].view(16, 4099).detach().requires_grad_()
        ours = ops.logprobs(x, labels, with_entropy=True)
        (grad,) = torch.autograd.grad(ours.logprobs.sum() + ours.entropy.sum(), x)
        exact = ops.logprobs(x.double(), labels, with_entropy=True)
        (exact_grad,) = torch.autograd.grad(exact.logprobs.sum() + exact.entropy.sum(), x)
        torch.testing.assert_close(ours.logprobs.double(), exact.logprobs, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(grad, exact_grad, rtol=2e-2, atol=1e-6)
        counts.append(
            sum(len(cache[0]) for cache in logprob._forward_kernel.device_caches.values())
        )
    assert counts[0] == counts[-1]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_of_another_gpu_than_the_current_one():
    logits = torch.randn(7, 1003, device="cuda:1", requires_grad=True)
    labels, mask = (
        torch.arange(7, device="cuda:1"),
        torch.ones(7, dtype=torch.bool, device="cuda:1"),
    )
    assert torch.cuda.current_device() == 0
    logp = ops.logprobs(logits, labels).logprobs
    loss = ops.ppo_loss(logp, logp.detach() - 0.1, torch.ones_like(logp), mask).loss
    loss.backward()
    exact = torch.log_softmax(logits.detach().double(), -1)[labels, labels]
    torch.testing.assert_close(logp.double(), exact, rtol=1e-5, atol=1e-5)
    assert logits.grad is not None and torch.cuda.current_device() == 0
