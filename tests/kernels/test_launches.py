"""Launches without a GPU: arguments are bound and specialized, kernels compiled for Hopper."""

from __future__ import annotations

import functools
import importlib
import os
from types import SimpleNamespace

import pytest
import torch

from fastrlhf.ops.advantage import Rollout, TargetOptions
from fastrlhf.ops.kl import SavedKL
from fastrlhf.ops.logprob_kernels import SavedRow, TokenGrads
from fastrlhf.ops.policy import PPOOptions
from fastrlhf.ops.ppo_kernels import PPOTokens

triton = pytest.importorskip("triton")
MODULES = ("gae", "logits_kl", "logprob", "ppo_loss", "ranking")
gae, logits_kl, logprob, ppo_loss, ranking = (
    importlib.import_module(f"fastrlhf.kernels.{name}") for name in MODULES
)

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled"
)


@pytest.fixture
def compiled(monkeypatch):
    """Return a function that counts how often each kernel has been compiled."""
    driver = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: triton.backends.compiler.GPUTarget("cuda", 90, 32),
    )
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    jitted = type(logprob._forward_kernel)
    monkeypatch.setattr(
        jitted, "__getitem__", lambda kernel, grid: functools.partial(kernel.warmup, grid=grid)
    )
    modules = (gae, logits_kl, logprob, ppo_loss, ranking)
    kernels = {
        f"{m.__name__}.{n}": f for m in modules for n, f in vars(m).items() if isinstance(f, jitted)
    }
    for kernel in kernels.values():
        monkeypatch.setattr(
            kernel, "device_caches", type(kernel.device_caches)(kernel.create_binder)
        )
    return lambda: {
        n: sum(len(c[0]) for c in k.device_caches.values())
        for n, k in kernels.items()
        if k.device_caches
    }


def launch_everything(batch: int, length: int, vocab: int, offset: int) -> None:
    """Launch every kernel, with every option, on slices that begin at `offset` in their storage."""

    def cut(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        size = int(torch.Size(shape).numel())
        return torch.zeros(offset + size, dtype=dtype)[offset:].view(shape)

    n = batch * length
    x, y, out, ref_out = (cut(batch, length, vocab, dtype=torch.bfloat16) for _ in range(4))
    labels, mask = cut(n, dtype=torch.int64), cut(n, dtype=torch.bool)
    a, b, c, d, e = (cut(n) for _ in range(5))
    logprob.logprob_statistics(x, labels, mask, 0.7, offset, vocab)
    logprob.logprob_forward(x, labels, mask, a, 0.7, True, offset, vocab)
    saved, upstream = SavedRow(a, b, c), TokenGrads(d, e, a)
    logprob.logprob_backward(x, labels, mask, saved, upstream, 0.7, offset, vocab, out)
    stats = logits_kl.logits_kl_statistics(x, y, mask, 0.7, vocab)
    logits_kl.logits_kl_backward(x, y, mask, SavedKL(stats, a), b, 0.7, vocab, out, ref_out)
    tokens = PPOTokens(a, b, c, mask, d, e, a, b)
    ppo_loss.ppo_loss(tokens, torch.ones(()), PPOOptions(0.2, 0.2, 0.2, 1.0, 0.1))
    table = (
        cut(batch, length),
        cut(batch, length),
        cut(batch, length),
        cut(batch, length, dtype=torch.bool),
    )
    gae.gae(table[0], table[1], table[3], 0.99, 0.95)
    options = TargetOptions(0.1, 0.2, 0.99, 0.95, "k3")
    gae.shaped_gae(Rollout(cut(batch), *table), options)
    ranking.ranking_loss(cut(n), cut(n, dtype=torch.int64), cut(batch + 1, dtype=torch.int64), True)


def test_one_compilation_serves_all_sizes_and_all_slices(compiled):
    for batch, length, vocab, offset in (
        (2, 5, 1003, 0),
        (1, 16, 1024, 1),
        (16, 1, 1000, 2),
        (3, 64, 32, 8),
    ):
        launch_everything(batch, length, vocab, offset)
    counts = compiled()
    assert len(counts) == 9
    assert set(counts.values()) == {1}, counts
