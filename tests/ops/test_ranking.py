from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastrlhf.ops import pairwise_ranking_loss
from fastrlhf.ops.ranking import pairwise_ranking_loss_ref


def brute_force(prompts, reduction):
    """Compute the definition as a double loop in floats; prompts: list of (scores, ranks)."""
    means, losses, right, margins = [], [], [], []
    for scores, ranks in prompts:
        mine = []
        for i, j in itertools.permutations(range(len(scores)), 2):
            if ranks[i] < ranks[j]:
                margin = scores[i] - scores[j]
                mine.append(math.log1p(math.exp(-abs(margin))) + max(-margin, 0.0))
                right.append(margin > 0)
                margins.append(margin)
        losses += mine
        if mine:
            means.append(sum(mine) / len(mine))
    per = means if reduction == "prompts" else losses
    n = max(len(losses), 1)
    return sum(per) / max(len(per), 1), sum(right) / n, len(losses), sum(margins) / n


def pack(prompts, device, dtype=torch.float32):
    scores = torch.tensor(
        [s for p in prompts for s in p[0]], dtype=dtype, device=device, requires_grad=True
    )
    ranks = torch.tensor([r for p in prompts for r in p[1]], dtype=torch.int64, device=device)
    offsets = torch.tensor([0, *itertools.accumulate(len(p[0]) for p in prompts)], device=device)
    return scores, ranks, offsets


ragged = st.lists(
    st.lists(st.tuples(st.integers(-40, 40).map(lambda x: x / 8), st.integers(0, 4)), max_size=20),
    min_size=1,
    max_size=6,
)


@settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(prompts=ragged, reduction=st.sampled_from(["prompts", "pairs"]))
def test_ragged_prompts_against_a_double_loop(prompts, reduction, backend, device):
    prompts = [([s for s, _ in p], [r for _, r in p]) for p in prompts]
    scores, ranks, offsets = pack(prompts, device)
    out = pairwise_ranking_loss(scores, ranks, offsets, reduction=reduction, backend=backend)
    assert [t.item() for t in out] == pytest.approx(
        brute_force(prompts, reduction), rel=1e-5, abs=1e-6
    )
    (grad,) = torch.autograd.grad(out.loss * 2, scores)
    exact = scores.detach().double().requires_grad_()
    loss = pairwise_ranking_loss(exact, ranks, offsets, reduction=reduction).loss
    (expected,) = torch.autograd.grad(loss * 2, exact)
    torch.testing.assert_close(grad.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("responses", [2, 9, 16, 17, 64, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sizes_and_dtypes(responses, dtype, backend, device):
    prompts = [
        (torch.randn(k).to(dtype).tolist(), torch.randint(0, k, (k,)).tolist())
        for k in (responses, 2, 5)
    ]
    scores, ranks, offsets = pack(prompts, device, dtype)
    out = pairwise_ranking_loss(scores, ranks.int(), offsets.int(), backend=backend)
    assert [t.item() for t in out] == pytest.approx(
        brute_force(prompts, "prompts"), rel=1e-5, abs=1e-6
    )
    by_float = pairwise_ranking_loss(scores, ranks.float() / 2, offsets, backend=backend)
    assert torch.equal(out.loss, by_float.loss)


@pytest.mark.parametrize("reduction", ["prompts", "pairs"])
@pytest.mark.parametrize("margins", [True, False])
@pytest.mark.parametrize("center_coef", [0.0, 0.1])
def test_margins_and_centering_in_float64(margins, center_coef, reduction, backend, device):
    scores, ranks, offsets = pack(
        [(torch.randn(k).tolist(), torch.randint(0, k, (k,)).tolist()) for k in (5, 17, 2)], device
    )
    needed = torch.randn_like(scores.detach()) if margins else None
    options = {"reduction": reduction, "center_coef": center_coef}
    ours = pairwise_ranking_loss(scores, ranks, offsets, margins=needed, backend=backend, **options)
    exact = scores.detach().double().requires_grad_()
    wide = needed.double() if margins else None
    expected = pairwise_ranking_loss_ref(exact, ranks, offsets, margins=wide, **options)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)
    (grad,), (wanted,) = (
        torch.autograd.grad(out.loss, leaf) for out, leaf in ((ours, scores), (expected, exact))
    )
    torch.testing.assert_close(grad.double(), wanted, rtol=1e-5, atol=1e-6)


def test_a_margin_and_a_center_by_hand(backend, device):
    """The better score is ahead by 1, of which the margin takes 1; the sum of the scores is 3."""
    scores = torch.tensor([2.0, 1.0], device=device)
    ranks, offsets, margins = (torch.tensor(x, device=device) for x in ([0, 1], [0, 2], [1.5, 0.5]))
    out = pairwise_ranking_loss(
        scores, ranks, offsets, margins=margins, center_coef=0.1, backend=backend
    )
    assert [t.item() for t in out] == pytest.approx([math.log(2) + 0.9, 1.0, 1.0, 1.0])


def test_golden(backend, device):
    """Two responses, better by log 3: the loss is -log(3/4), the gradient -+1/4."""
    scores = torch.tensor([0.0, math.log(3)], device=device, requires_grad=True)
    out = pairwise_ranking_loss(
        scores, *(torch.tensor(x, device=device) for x in ([2, 1], [0, 2])), backend=backend
    )
    expected = [-math.log(0.75), 1.0, 1.0, math.log(3)]
    assert [t.item() for t in out] == pytest.approx(expected, rel=1e-6)
    out.loss.backward()
    assert scores.grad.tolist() == pytest.approx([0.25, -0.25], rel=1e-6)
    assert out.loss.requires_grad and not any(t.requires_grad for t in out[1:])


def test_without_a_strict_pair_all_is_zero(backend, device):
    scores, ranks, offsets = pack([([1.0, 2.0], [1, 1]), ([3.0], [0]), ([], [])], device)
    out = pairwise_ranking_loss(scores, ranks, offsets, backend=backend)
    out.loss.backward()
    assert [t.item() for t in out] == [0, 0, 0, 0] and not bool(scores.grad.any())


def test_large_margins_do_not_overflow(backend, device):
    scores, ranks, offsets = pack([([1000.0, -1000.0, 0.0], [3, 1, 2])], device)
    out = pairwise_ranking_loss(scores, ranks, offsets, backend=backend)
    out.loss.backward()
    assert out.loss.item() == pytest.approx((2000 + 1000 + 1000) / 3) and out.accuracy.item() == 0
    assert scores.grad.tolist() == pytest.approx([2 / 3, -2 / 3, 0], abs=1e-6)


def test_gradcheck(torch_only):
    scores, ranks, offsets = pack(
        [([0.3, -0.2, 1.0], [2, 1, 1]), ([0.5, 0.1], [0, 1])], "cpu", torch.float64
    )
    for reduction in ("prompts", "pairs"):
        assert torch.autograd.gradcheck(
            lambda s, r=reduction: pairwise_ranking_loss(s, ranks, offsets, reduction=r).loss,
            (scores,),
        )


def test_mistakes_are_named(torch_only):
    scores, ranks, offsets = pack([([1.0, 2.0], [0, 1])], "cpu")
    with pytest.raises(
        ValueError, match=r"ranks: got int64\[1\] on cpu, expected an integer or float tensor"
    ):
        pairwise_ranking_loss(scores, ranks[:1], offsets)
    with pytest.raises(
        ValueError, match=r"prompt_offsets: got int64\[1\] on cpu, expected an integer tensor"
    ):
        pairwise_ranking_loss(scores, ranks, offsets[:1])
    with pytest.raises(
        ValueError, match="reduction: got 'mean', expected one of 'prompts', 'pairs'"
    ):
        pairwise_ranking_loss(scores, ranks, offsets, reduction="mean")
