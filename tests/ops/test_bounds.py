"""No index, whatever it holds, leads a kernel outside of a buffer; sizes end where they should.

Inputs are slices of larger tensors whose other elements are NaN, and outputs slices of tensors that
hold a known number around them: a kernel that reads or writes its neighbours is seen.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fastrlhf.ops import gae, logprobs, pairwise_ranking_loss, ppo_loss
from fastrlhf.ops.logprob_kernels import BACKWARD, STATISTICS, SavedRow, TokenGrads
from fastrlhf.ops.ranking import KERNEL

MARGIN, SENTINEL = 2048, 77
INT64 = torch.iinfo(torch.int64)
HOSTILE_LABELS = [-1, 7, 8, -100, 2000, -2000, 2**31, 2**40, INT64.max, INT64.min]
HOSTILE_OFFSETS = [
    [-5, 2, 6],  # begins before the scores
    [0, 2, 40],  # ends after them
    [0, 9, 6],  # a prompt outside of them
    [0, 5, 3],  # falls
    [2, 4, 6],  # leaves out the first
    [0, 2, 5],  # leaves out the last
    [0, -1000, 6],
    [0, 1000, 6],
    [INT64.min, 3, INT64.max],
]


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """Surround what torch.empty allocates with SENTINEL, and check it when the test ends."""
    kept: list[Tensor] = []
    allocate = torch.empty

    def empty(*shape: object, **options: object) -> Tensor:
        wanted = allocate(*shape, **options)
        whole = allocate(wanted.numel() + 2 * MARGIN, dtype=wanted.dtype, device=wanted.device)
        kept.append(whole.fill_(SENTINEL))
        return whole[MARGIN : MARGIN + wanted.numel()].view(wanted.shape)

    monkeypatch.setattr(torch, "empty", empty)
    yield kept
    monkeypatch.undo()
    for whole in kept:
        edges = torch.cat([whole[:MARGIN], whole[-MARGIN:]])
        assert bool((edges == SENTINEL).all()), "a kernel wrote outside of its output"


def inside(x: Tensor) -> Tensor:
    """Return x as a slice of a larger tensor that holds NaN (True, or a large index) elsewhere."""
    fill = math.nan if x.is_floating_point() else True if x.dtype == torch.bool else 1 << 20
    whole = torch.full((x.numel() + 2 * MARGIN,), fill, dtype=x.dtype, device=x.device)
    whole[MARGIN : MARGIN + x.numel()] = x.flatten()
    return whole[MARGIN : MARGIN + x.numel()].view(x.shape)


@pytest.mark.parametrize("offsets", HOSTILE_OFFSETS, ids=str)
@pytest.mark.parametrize("per_prompt", [True, False])
def test_the_ranking_kernel_clamps_offsets(offsets, per_prompt, backend, device, guarded):
    """The op refuses them on a CPU. A GPU's are seen by the kernel alone: the result is NaN."""
    if backend == "cpu" or (backend == "torch" and device.type == "cpu"):
        pytest.skip("these kernels are only reached by checked offsets")
    scores = inside(torch.randn(6, device=device))
    ranks = inside(torch.arange(6, device=device))
    run = KERNEL.implementation(scores, backend)
    metrics, gradient = run(scores, ranks, torch.tensor(offsets, device=device), per_prompt)
    assert bool(metrics.isnan().all()) and bool((gradient * metrics[-1]).isnan().all())


@pytest.mark.parametrize("offsets", HOSTILE_OFFSETS, ids=str)
def test_bad_offsets_have_one_outcome(offsets, backend, device):
    scores = torch.randn(6, device=device, requires_grad=True)
    arguments = (torch.arange(6, device=device), torch.tensor(offsets, device=device))
    if device.type == "cpu":
        words = r"prompt_offsets: got int64\[3\] on cpu, expected values that rise from 0 to the"
        with pytest.raises(ValueError, match=words + r" number of scores \(6\)"):
            pairwise_ranking_loss(scores, *arguments, backend=backend)
        return
    loss = pairwise_ranking_loss(scores, *arguments, backend=backend).loss
    (gradient,) = torch.autograd.grad(loss, scores)
    assert bool(loss.isnan()) and bool(gradient.isnan().all())


def test_the_plain_kernel_survives_offsets_that_it_cannot_check(torch_only):
    """On a GPU they come unchecked; an index outside of the prompts would end the process there."""
    scores, ranks = torch.randn(6), torch.arange(6)
    for offsets in HOSTILE_OFFSETS:
        metrics, gradient = KERNEL.implementation(scores, "torch")(
            scores, ranks, torch.tensor(offsets), True
        )
        assert metrics.shape == (5,) and gradient.shape == (6,)


@pytest.mark.parametrize("vocab_start", [0, 3])
def test_labels_lead_nowhere(vocab_start, backend, device, guarded):
    """Those that no column holds: log-prob -inf, and a gradient without a term of its own."""
    n, vocab = len(HOSTILE_LABELS), 7
    rows = inside(torch.randn(1, n, vocab, device=device))
    labels = inside(torch.tensor(HOSTILE_LABELS, device=device))
    labels[1:3] += vocab_start
    statistics = STATISTICS.implementation(rows, backend)
    stats = statistics(rows, labels, None, 1.0, vocab_start, vocab)
    assert stats[3].tolist() == [-math.inf] * n and bool(stats[:3].isfinite().all())
    saved = SavedRow(stats[0].contiguous(), stats[1].contiguous(), None)
    upstream = TokenGrads(torch.ones(n, device=device), None, None)
    out = torch.empty(1, n, vocab, device=device)
    backward = BACKWARD.implementation(rows, backend)
    backward(rows, labels, None, saved, upstream, 1.0, vocab_start, vocab, out)
    torch.testing.assert_close(out, -torch.softmax(rows, -1))


def test_hostile_labels_through_the_op(backend, device):
    logits = torch.randn(len(HOSTILE_LABELS), 7, device=device, requires_grad=True)
    labels = torch.tensor(HOSTILE_LABELS, device=device)
    out = logprobs(logits, labels, backend=backend)
    assert out.logprobs.tolist() == [-math.inf] * len(HOSTILE_LABELS)
    out.logsumexp.sum().backward()
    torch.testing.assert_close(logits.grad, torch.softmax(logits.detach(), -1))


@pytest.mark.parametrize("size", [(1, 1), (3, 7), (2, 129), (5, 1025)])
def test_nothing_outside_of_the_tokens_is_read_or_written(size, backend, device, guarded):
    tokens = [inside(torch.randn(size, device=device)) for _ in range(6)]
    mask = inside(torch.rand(size, device=device) > 0.3)
    logp, old, advantages, values, old_values, returns = tokens
    out = ppo_loss(
        logp,
        old,
        advantages,
        mask,
        values=values,
        old_values=old_values,
        returns=returns,
        backend=backend,
    )
    assert all(bool(t.isfinite()) for t in out)
    assert all(bool(t.isfinite().all()) for t in gae(logp, values, mask, backend=backend))


def test_the_extension_refuses_columns_outside_of_the_rows(torch_only):
    if not hasattr(torch.ops.fastrlhf_cpu, "logprob_statistics"):
        pytest.skip("the extension is not built")
    rows, labels = torch.zeros(1, 2, 5), torch.zeros(2, dtype=torch.long)
    for columns in (-1, 6):
        with pytest.raises(RuntimeError, match="columns from 0 to V"):
            torch.ops.fastrlhf_cpu.logprob_statistics(rows, labels, None, 1.0, 0, columns)
    stats = torch.ops.fastrlhf_cpu.logprob_statistics(rows, labels, None, 1.0, 0, 5)
    arguments = (labels, None, stats[0], stats[1], None, labels.float(), None, None, 1.0, 0, 5)
    with pytest.raises(RuntimeError, match="the shape of the rows"):
        torch.ops.fastrlhf_cpu.logprob_backward(rows, *arguments, rows.new_zeros(1, 5, 2))
