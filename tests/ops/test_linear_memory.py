"""The cost of the linear ops, by the profiler: GEMMs, bytes of logits, rows that do not count."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from fastrlhf.ops import (
    backends,
    linear_chunks,
    linear_cross_entropy,
    linear_logprobs,
    linear_ppo_loss,
)
from fastrlhf.ops.linear_chunks import CountedRows, budget_override, chunk_rows, logits_fit

GEMMS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm")

pytestmark = pytest.mark.usefixtures("torch_only")


def budget(monkeypatch, size_in_bytes):
    monkeypatch.setenv("FASTRLHF_LINEAR_BUDGET_MB", str(size_in_bytes / 2**20))


def setup(tokens, vocab, hidden, dtype=torch.float32):
    h = torch.randn(tokens, hidden).to(dtype).requires_grad_()
    w = torch.randn(vocab, hidden).to(dtype).requires_grad_()
    return h, w, torch.randint(0, vocab, (tokens,)), torch.randn(tokens)


def run(op, h, w, labels, mask, x, bias=None):
    """Run forward and backward of one op."""
    if op == "cross_entropy":
        linear_cross_entropy(h, w, labels, mask, bias=bias).backward()
    elif op == "ppo_loss":
        linear_ppo_loss(h, w, labels, x, x, mask, bias=bias, entropy_coef=0.1).loss.backward()
    else:
        tokens = linear_logprobs(
            h, w, labels, bias=bias, mask=mask, recompute=op == "recomputed", with_entropy=True
        )
        (tokens.logprobs.sum() + tokens.entropy.sum()).backward()


def gemms(*args, **kwargs):
    with profile(activities=[ProfilerActivity.CPU]) as prof:
        run(*args, **kwargs)
    return sum(e.count for e in prof.key_averages() if e.key in GEMMS)


def peak_bytes(*args):
    """Return the largest allocations minus frees since the start, the output pool being empty."""
    if backends()["cpu"]["available"]:
        torch.ops.fastrlhf_cpu.release()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        run(*args)
    changes = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(changes, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


@pytest.mark.parametrize(
    ("op", "per_chunk"), [("cross_entropy", 3), ("ppo_loss", 3), ("recomputed", 4), ("kept", 3)]
)
@pytest.mark.parametrize("with_bias", [False, True])
def test_gemms_of_a_chunk(op, per_chunk, with_bias, monkeypatch):
    h, w, labels, x = setup(22, 37, 5)
    bias = torch.randn(37, requires_grad=True) if with_bias else None
    budget(monkeypatch, 5 * 37 * 4)  # 5 chunks: 5 rows each, 2 in the last
    assert gemms(op, h, w, labels, torch.ones(22, dtype=torch.bool), x, bias) == 5 * per_chunk
    mask = torch.arange(22) % 2 == 0  # 11 rows that count: 3 chunks
    assert gemms(op, h, w, labels, mask, x, bias) == 3 * per_chunk
    assert gemms(op, h, w, labels, torch.zeros(22, dtype=torch.bool), x, bias) == 0


def test_a_frozen_weight_or_hidden_saves_its_gemm():
    h, w, labels, x = setup(6, 37, 5)
    mask = torch.ones(6, dtype=torch.bool)
    assert gemms("cross_entropy", h, w.detach(), labels, mask, x) == 2
    assert gemms("recomputed", h.detach(), w, labels, mask, x) == 3


@pytest.mark.parametrize("op", ["cross_entropy", "ppo_loss", "recomputed"])
def test_complete_logits_are_never_held(op, monkeypatch):
    """The complete logits, 4.2 GB for 8192 x 128256 in fp32, are never held.

    Not all rows count, to keep the test short: 2048 (1.05 GB) with the C++ kernels, 512 with
    torch's.
    """
    tokens, vocab, hidden = 8192, 128256, 8
    h, w, labels, x = setup(tokens, vocab, hidden)
    budget(monkeypatch, 32 * 2**20)
    counted = 2048 if backends()["cpu"]["available"] else 512
    mask = torch.arange(tokens) % (tokens // counted) == 0
    # the budget's logits, their upcast in torch, dW before and after scaling, dh, per-token vectors
    upcast, weight_bytes, hidden_bytes = 5 * 16 * 2**20, 4 * vocab * hidden, 4 * tokens * hidden
    allowed = 32 * 2**20 + upcast + 3 * weight_bytes + 4 * hidden_bytes
    assert 16 * 2**20 < peak_bytes(op, h, w, labels, mask, x) < allowed < counted * vocab * 4


def test_memory_does_not_grow_with_the_rows(monkeypatch):
    """Twice the rows add the bytes of their hidden states and per-token vectors, but no logits."""
    budget(monkeypatch, 2**20)
    vocab, hidden = 4099, 8
    peaks = []
    for tokens in (512, 1024):
        h, w, labels, x = setup(tokens, vocab, hidden)
        mask = torch.ones(tokens, dtype=torch.bool)
        peaks.append(
            [
                peak_bytes(op, h, w, labels, mask, x)
                for op in ("cross_entropy", "ppo_loss", "recomputed")
            ]
        )
    for small, large in zip(*peaks, strict=True):
        assert large - small < 512 * (4 * hidden * 4 + 40 * 8) < 512 * vocab * 4 // 8


def test_auto_keeps_what_fits(monkeypatch):
    h, w, labels, _ = setup(8, 37, 5)

    def forward_and_backward():
        with profile(activities=[ProfilerActivity.CPU]) as prof:
            linear_logprobs(h, w, labels).logprobs.sum().backward()
        return sum(e.count for e in prof.key_averages() if e.key in GEMMS)

    assert forward_and_backward() == 3
    budget(monkeypatch, 8 * 37 * 4)
    assert forward_and_backward() == 3
    budget(monkeypatch, 8 * 37 * 4 - 1)  # two chunks, recomputed
    assert forward_and_backward() == 8
    assert not logits_fit(h, 8, 37) and logits_fit(h.bfloat16(), 8, 37)


@pytest.mark.parametrize("text", ["none", "-3", "0", "nan", "inf", "1e999", "12MB"])
def test_a_bad_budget_is_named(text, monkeypatch):
    monkeypatch.setenv("FASTRLHF_LINEAR_BUDGET_MB", text)
    h, w, labels, _ = setup(4, 7, 3)
    message = (
        f"FASTRLHF_LINEAR_BUDGET_MB: got '{text}', expected a number of MiB above 0, such as 512"
    )
    with pytest.raises(ValueError, match=message):
        linear_logprobs(h, w, labels)
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(h, w, labels, torch.ones(4, dtype=torch.bool))


def test_chunks_are_equal_and_within_the_budget(monkeypatch):
    assert budget_override() is None
    h = torch.zeros(1, 3)
    assert chunk_rows(h, 4096, 50257) == 1024
    assert chunk_rows(h, 1200, 50257) == 600  # not 1024 and 176
    assert chunk_rows(h, 2000, 10**6) * 4 * 10**6 <= linear_chunks.CPU_BUDGET
    assert chunk_rows(h, 0, 7) == 0
    monkeypatch.setenv("FASTRLHF_LINEAR_BUDGET_MB", "0.5")
    assert chunk_rows(h, 1000, 1024) == 125  # 128 fit, in 8 chunks
    assert chunk_rows(h, 1000, 10**9) == 1  # a row is the least
    monkeypatch.setenv("FASTRLHF_LINEAR_BUDGET_MB", "4096")
    assert chunk_rows(h, 5000, 1024) == 5000  # the override alone decides
    assert chunk_rows(h, 5000, 0, shared=True) == 1000  # ranks that do not know each other's width


def test_rows_that_do_not_count_are_never_read(monkeypatch):
    h, mask = torch.arange(12.0).view(6, 2), torch.tensor([True, False, True, True, False, True])
    monkeypatch.setattr(linear_chunks, "CPU_ROWS", 3)
    rows = CountedRows(h, mask, 7)
    assert rows.count == 4 and [rows.chunk(at).tolist() for at in rows] == [
        [[0, 1], [4, 5]],
        [[6, 7], [10, 11]],
    ]
