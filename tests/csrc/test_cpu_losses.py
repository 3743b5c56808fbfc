"""GAE, PPO and ranking losses in C++ against torch in float64, under every instruction set."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fastrlhf.ops import gae, linear_cross_entropy, pairwise_ranking_loss, ppo_loss
from fastrlhf.ops.advantage import Rollout, TargetOptions, _gae_torch, _shaped_gae_torch
from fastrlhf.ops.layouts import PPOMetric, RankingMetric
from fastrlhf.ops.policy import PPOOptions
from fastrlhf.ops.ppo_kernels import PLAIN, PPOTokens, _ppo_loss_torch
from fastrlhf.ops.ranking import _ranking_loss_torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS = torch.finfo(torch.float32).eps


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def widened(*tensors: Tensor | None) -> list[Tensor | None]:
    return [t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in tensors]


# --- gae -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rewards_dtype", "values_dtype"), [*zip(DTYPES, DTYPES, strict=True), (DTYPES[0], DTYPES[1])]
)
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (9, 513), (3, 1100)])
def test_gae(
    cpu: SimpleNamespace,
    shape: tuple[int, int],
    rewards_dtype: torch.dtype,
    values_dtype: torch.dtype,
) -> None:
    g = generator()
    rewards, values = (
        torch.randn(shape, generator=g).to(rewards_dtype),
        torch.randn(shape, generator=g),
    )
    values = values.to(values_dtype)
    mask = torch.rand(shape, generator=g) < 0.7
    mask[0] = shape[1] % 2 == 0  # an empty row, or a full one
    rewards = rewards.masked_fill(~mask, torch.nan)
    want = _gae_torch(*widened(rewards, values, mask), 0.99, 0.95)
    # errors decay by gamma lam a step: a geometric sum of a few roundings of the largest advantage
    bound = 8 * EPS / (1 - 0.99 * 0.95) * (1 + want[0].abs().max())
    for ours, truth in zip(cpu.gae(rewards, values, mask, 0.99, 0.95), want, strict=True):
        assert (
            ours.dtype == torch.float32
            and ((ours - truth).abs() <= bound).all()
            and (ours[~mask] == 0).all()
        )


def test_gae_by_hand(cpu: SimpleNamespace) -> None:
    rewards = torch.tensor([[1.0, 100.0, 2.0, 0.0]])
    values = torch.tensor([[0.5, 100.0, 1.0, 100.0]])
    mask = torch.tensor([[True, False, True, False]])
    advantages, returns = cpu.gae(rewards, values, mask, 0.5, 0.5)
    # last: 2 - 1 = 1.  first: 1 + 0.5 * 1 - 0.5 + 0.25 * 1 = 1.25
    assert advantages.tolist() == [[1.25, 0.0, 1.0, 0.0]]
    assert returns.tolist() == [[1.75, 0.0, 2.0, 0.0]]


def test_gae_without_rows_or_columns(cpu: SimpleNamespace) -> None:
    for shape in ((0, 5), (5, 0)):
        advantages, returns = cpu.gae(
            torch.ones(shape), torch.ones(shape), torch.ones(shape, dtype=torch.bool), 1, 1
        )
        assert advantages.shape == returns.shape == shape


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("estimator", "clip"), [("k1", None), ("k1", 0.1), ("abs", None), ("k2", 0.1), ("k3", None)]
)
def test_shaped_rewards_gae_and_moments(
    cpu: SimpleNamespace, estimator: str, clip: float | None, dtype: torch.dtype
) -> None:
    g, shape = generator(), (9, 601)
    logprobs, ref, values = ((torch.randn(shape, generator=g) * 0.3).to(dtype) for _ in range(3))
    mask = torch.rand(shape, generator=g) < 0.6
    mask[3] = False
    mask[4, 100:] = False
    logprobs, values = (t.masked_fill(~mask, torch.nan) for t in (logprobs, values))
    scores = torch.randn(9, generator=g).to(dtype)
    options = (0.2, clip, 0.99, 0.95, estimator)
    got = cpu.shaped_gae(scores, logprobs, ref, values, mask, None, *options)
    wide = widened(scores, logprobs, ref, values, mask)
    want = _shaped_gae_torch(Rollout(*wide), TargetOptions(*options))
    assert len(got) == len(want) == 5 and all(t.isfinite().all() for t in got)
    for ours, truth in zip(got, want, strict=True):
        # as for gae above; the squares of the moments double the relative error
        torch.testing.assert_close(ours.double(), truth.double(), rtol=64 * EPS, atol=1e3 * EPS)


# --- ppo -----------------------------------------------------------------------------------------


def plain_ppo(
    cpu: SimpleNamespace,
    inputs: list[Tensor | None],
    denominator: Tensor | None,
    *options: float,
) -> tuple[Tensor, ...]:
    """Call the kernel without the options that Schulman et al. 2017 do not have."""
    return cpu.ppo_loss(*inputs, None, None, denominator, *options, math.inf, 0.0, *PLAIN)


def ppo_inputs(n: int, dtype: torch.dtype, full: bool = True) -> list[Tensor | None]:
    g = generator(n)
    old = -3 * torch.rand(n, generator=g)
    near = old + 0.3 * torch.randn(n, generator=g)
    tensors = [
        near,
        old,
        *(torch.randn(n, generator=g) for _ in range(4)),
        torch.rand(n, generator=g),
    ]
    logprobs, old, advantages, values, old_values, returns, entropy = (t.to(dtype) for t in tensors)
    mask = torch.rand(n, generator=g) < 0.8
    logprobs, values = (t.masked_fill(~mask, torch.nan) for t in (logprobs, values))
    if not full:
        return [logprobs, old, advantages, mask, None, None, None, None]
    return [logprobs, old, advantages, mask, values, old_values, returns, entropy]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [0, 1, 15, 123, 1024, 1025, 20011])
@pytest.mark.parametrize("full", [True, False])
def test_ppo_loss(cpu: SimpleNamespace, n: int, full: bool, dtype: torch.dtype) -> None:
    inputs = ppo_inputs(n, dtype, full)
    options = (0.2, 0.2, 0.2, 0.7, 0.01)
    for denominator in (None, torch.tensor(37.0), torch.tensor(37)):
        got = plain_ppo(cpu, inputs, denominator, *options)
        wide = None if denominator is None else denominator.double()
        want = _ppo_loss_torch(PPOTokens(*widened(*inputs)), wide, PPOOptions(*options))
        # A ratio carries a rounding of log-probs up to 8 in size. A token at the edge of the clip
        # may fall on either side in fp32, which moves the two fractions by 1 / count: none does
        # with these seeds.
        for ours, truth in zip(got, want, strict=True):
            torch.testing.assert_close(ours.double(), truth, rtol=32 * EPS, atol=32 * EPS)


def test_ppo_loss_mixes_dtypes_and_takes_no_true_position(cpu: SimpleNamespace) -> None:
    inputs = ppo_inputs(50, torch.float32)
    inputs[1], inputs[2], inputs[4] = inputs[1].bfloat16(), inputs[2].double(), inputs[4].half()
    got = plain_ppo(cpu, inputs, None, 0.2, 0.2, 0.2, 1.0, 0.0)
    tokens, options = PPOTokens(*widened(*inputs)), PPOOptions(0.2, 0.2, 0.2, 1.0, 0.0)
    want = _ppo_loss_torch(tokens, None, options)
    for ours, truth in zip(got, want, strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=32 * EPS, atol=32 * EPS)
    inputs[3] = torch.zeros(50, dtype=torch.bool)
    metrics, d_logprobs, d_values = plain_ppo(cpu, inputs, None, 0.2, 0.2, 0.2, 1.0, 0.0)
    assert metrics.tolist() == [0.0] * 10 + [1.0] and not d_logprobs.any() and not d_values.any()


def test_approx_kl_does_not_cancel_for_tiny_steps(cpu: SimpleNamespace) -> None:
    # r - 1 - log r = d^2 / 2 + d^3 / 6 for small d: computed as written, fp32 returns noise of
    # 1e-7
    step = 2.0**-14
    logprobs, old = torch.full((64,), -step), torch.full((64,), -2 * step)
    mask = torch.ones(64, dtype=torch.bool)
    inputs = [logprobs, old, mask.float(), mask, None, None, None, None]
    metrics, _, _ = plain_ppo(cpu, inputs, None, 0.2, 0.2, 0.2, 1.0, 0.0)
    assert math.isclose(
        metrics[PPOMetric.APPROX_KL].item(), step**2 / 2 + step**3 / 6, rel_tol=1e-6
    )


def test_nan_where_it_counts_reaches_every_metric_it_should(cpu: SimpleNamespace) -> None:
    inputs = ppo_inputs(2000, torch.float32, full=False)
    inputs[3] = torch.ones(2000, dtype=torch.bool)
    inputs[0] = torch.nan_to_num(inputs[0])
    inputs[0][1500] = torch.nan
    metrics, d_logprobs, _ = plain_ppo(cpu, inputs, None, 0.2, 0.2, 0.2, 1.0, 0.0)
    spoiled = [
        PPOMetric.LOSS,
        PPOMetric.POLICY_LOSS,
        PPOMetric.APPROX_KL,
        PPOMetric.RATIO_MEAN,
        PPOMetric.RATIO_MAX,
    ]
    assert metrics[spoiled].isnan().all() and d_logprobs.isnan().nonzero().tolist() == [[1500]]


# --- ranking -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank_dtype", [torch.int64, torch.int32, torch.float32])
@pytest.mark.parametrize("per_prompt", [True, False])
@pytest.mark.parametrize("sizes", [(2,), (9,) * 7, (4, 0, 1, 9, 64, 17, 300)])
def test_ranking_loss(
    cpu: SimpleNamespace,
    sizes: tuple[int, ...],
    per_prompt: bool,
    rank_dtype: torch.dtype,
    dtype: torch.dtype,
) -> None:
    g, n = generator(sum(sizes)), sum(sizes)
    scores = (4 * torch.randn(n, generator=g)).to(dtype)
    ranks = torch.randint(0, 6, (n,), generator=g).to(rank_dtype)  # with ties
    ranks[:2] = torch.tensor([1, 2])
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    metrics, grad = cpu.ranking_loss(scores, ranks, offsets, per_prompt)
    want, want_grad = _ranking_loss_torch(scores.double(), ranks, offsets, per_prompt)
    torch.testing.assert_close(metrics.double(), want, rtol=16 * EPS, atol=16 * EPS)
    # a gradient is a sum of up to K - 1 sigmoids, each of a margin that was rounded once
    terms = 1 if per_prompt else max(sizes)
    torch.testing.assert_close(grad.double(), want_grad, rtol=16 * EPS, atol=16 * EPS * terms)


def test_ranking_loss_at_its_edges(cpu: SimpleNamespace) -> None:
    offsets = torch.tensor([0, 2], dtype=torch.int32)
    ranks = torch.tensor([1, 2])
    for gap, loss, slope in ((200.0, 0.0, 0.0), (-200.0, 200.0, -1.0), (0.0, math.log(2), -0.5)):
        metrics, grad = cpu.ranking_loss(torch.tensor([gap, 0.0]), ranks, offsets, True)
        assert math.isclose(metrics[RankingMetric.LOSS].item(), loss, rel_tol=1e-6, abs_tol=1e-30)
        assert grad.tolist() == pytest.approx([slope, -slope], abs=1e-30)
        assert metrics[1:].tolist() == [float(gap > 0), 1.0, gap, 1.0]
    tied, grad = cpu.ranking_loss(
        torch.tensor([1.0, torch.nan]), torch.tensor([3, 3]), offsets, True
    )
    assert tied.tolist() == [0.0, 0.0, 0.0, 0.0, 1.0] and grad.tolist() == [0.0, 0.0]
    huge = torch.tensor([2**62, 2**62 + 1])  # equal as floats
    assert cpu.ranking_loss(torch.zeros(2), huge, offsets, True)[0][RankingMetric.PAIRS] == 1
    with pytest.raises(
        RuntimeError, match="prompt_offsets must rise from 0 to the number of scores, 2"
    ):
        cpu.ranking_loss(torch.zeros(2), ranks, torch.tensor([0, 3]), True)


# --- all -----------------------------------------------------------------------------------------


def test_one_thread_and_two_give_the_same_bits(cpu: SimpleNamespace, two_threads: None) -> None:
    g = generator()
    rewards, values = torch.randn(70, 600, generator=g), torch.randn(70, 600, generator=g)
    scores, ranks = torch.randn(64 * 32, generator=g), torch.randint(0, 9, (64 * 32,), generator=g)

    def everything() -> list[Tensor]:
        out = [*cpu.gae(rewards, values, rewards < 1, 0.99, 0.95)]
        inputs = ppo_inputs(40001, torch.float32)
        out += plain_ppo(cpu, inputs, None, 0.2, 0.2, 0.2, 1.0, 0.1)
        return out + list(cpu.ranking_loss(scores, ranks, torch.arange(0, 64 * 32 + 1, 32), True))

    two = everything()
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(two, everything(), strict=True))


def test_through_the_public_ops(isa: str) -> None:
    results: dict[str, list[Tensor]] = {}
    inputs = ppo_inputs(500, torch.bfloat16)
    logprobs, old, advantages, mask, values, old_values, returns, entropy = inputs
    g = generator(1)
    scores, ranks = torch.randn(27, generator=g), torch.randint(0, 5, (27,), generator=g)
    rewards = torch.randn(6, 40, generator=g)
    for backend in ("cpu", "torch"):
        leaves = [t.detach().clone().requires_grad_() for t in (logprobs, values, entropy, scores)]
        loss = ppo_loss(
            leaves[0],
            old,
            advantages,
            mask,
            values=leaves[1],
            old_values=old_values,
            returns=returns,
            entropy=leaves[2],
            entropy_coef=0.1,
            backend=backend,
        )
        ranking = pairwise_ranking_loss(
            leaves[3], ranks, torch.tensor([0, 9, 9, 27]), backend=backend
        )
        (3 * loss.loss + ranking.loss).backward()
        found = [*loss, *ranking, *gae(rewards, rewards + 1, rewards < 1, backend=backend)]
        results[backend] = [t.detach() for t in found] + [
            leaf.grad for leaf in leaves if leaf.grad is not None
        ]
    assert len(results["cpu"]) == 10 + 4 + 2 + 4
    for ours, theirs in zip(*results.values(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_freed_outputs_are_used_again_and_live_ones_never(built: None) -> None:
    """Each is 1 MiB, so that the pool holds it. Inputs differ: a shared page is detected."""
    rewards = torch.randn(512, 512, generator=generator())
    everywhere = torch.ones(512, 512, dtype=torch.bool)

    def call(scale: float) -> tuple[Tensor, Tensor]:
        return torch.ops.fastrlhf_cpu.gae(scale * rewards, rewards, everywhere, 1.0, 0.95)

    expected = [[t.clone() for t in call(scale)] for scale in range(4)]
    with ThreadPoolExecutor(4) as threads:
        for _ in range(5):
            for got, wanted in zip(threads.map(call, range(4)), expected, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    first, second = call(1), call(1)
    addresses = {t.data_ptr() for t in (*first, *second)}
    assert len(addresses) == 4
    part = first[0][3:]  # a view keeps its storage
    del first, second
    again = [call(2), call(2)]
    assert part.data_ptr() - 3 * 512 * 4 not in {t.data_ptr() for pair in again for t in pair}
    assert len(addresses & {t.data_ptr() for pair in again for t in pair}) == 3
    assert torch.equal(part, expected[1][0][3:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loss_uses_the_pages_of_the_last_one_and_does_not_share_gradients(
    built: None, dtype: torch.dtype
) -> None:
    """The weight's gradient is 1 MiB in fp32, and so are the logits of 256 rows."""
    hidden, weight = torch.randn(256, 256).to(dtype), torch.randn(1024, 256).to(dtype)
    labels, mask = torch.arange(256), torch.ones(256, dtype=torch.bool)

    def gradient() -> Tensor:
        leaf = weight.detach().requires_grad_()
        linear_cross_entropy(hidden, leaf, labels, mask, backend="cpu").backward()
        assert leaf.grad is not None
        return leaf.grad

    first = gradient()
    kept = first.clone()
    second = gradient()
    assert first.data_ptr() != second.data_ptr()
    assert torch.equal(first, kept) and torch.equal(second, kept)
    if dtype == torch.float32:  # in bf16 it is scaled and rounded into new memory
        address = second.data_ptr()
        del second
        assert gradient().data_ptr() == address
    torch.ops.fastrlhf_cpu.release()
    assert torch.equal(gradient(), first)


def test_a_bad_size_of_the_pool_is_named(built: None, root: Path) -> None:
    code = (
        "import torch, fastrlhf.ops as o; x = torch.ones(512, 512);"
        " o.gae(x, x, x > 0, backend='cpu')"
    )
    environment = {**os.environ, "FASTRLHF_POOL_MB": "12MB", "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert "FASTRLHF_POOL_MB=12MB: expected a whole number of MiB, 0 to keep nothing" in done.stderr
