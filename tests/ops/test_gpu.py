"""What only a GPU can show: no op waits for it, and one compilation serves every batch size."""

from __future__ import annotations

import pytest
import torch

import fastrlhf.ops as ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def everything(tokens: int, vocab: int = 1003) -> None:
    """Every op, forward and backward, on a [2, tokens] batch."""
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
    loss = loss + ops.linear_ppo_loss(h, w, labels, old, targets.advantages, mask, entropy_coef=0.1).loss
    loss = loss + ops.linear_cross_entropy(h, w, labels, mask) + linear.entropy.sum()
    loss = loss + ops.logits_kl(x, x.detach() * 0.5, mask=mask).sum()
    loss = loss + ops.pairwise_ranking_loss(token.logprobs[:, 0], torch.arange(2, device=device), offsets).loss
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


def test_no_recompilation_for_another_batch_size():
    from fastrlhf.kernels import gae, logits_kl, logprob, ppo_loss, ranking

    kernels = [
        logprob._forward_kernel, logprob._backward_kernel, logits_kl._statistics_kernel, logits_kl._backward_kernel,
        ppo_loss._kernel, gae._shaped_gae_kernel, ranking._kernel,
    ]  # fmt: skip

    def compiled() -> int:
        return sum(len(cache[0]) for k in kernels for cache in k.device_caches.values())

    everything(150)
    before = compiled()
    for tokens in (151, 160, 176, 257):
        everything(tokens)
    assert compiled() == before
