"""The sampler against plain softmaxes: frequencies, truncation, log-probabilities, streams."""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrlhf.generation.sampling import BLOCK, Sampler, SamplingParams, exponentials, row_keys
from fastrlhf.parallel.mesh import Mesh

VOCAB = 300


def probabilities(cases: ModuleType, temperature: float = 1.0) -> torch.Tensor:
    hidden, weight = cases.target()
    return torch.softmax((hidden @ weight[:VOCAB].T)[0].double() / temperature, -1)


def chi_square(counts: torch.Tensor, p: torch.Tensor) -> float:
    """Return the standard deviations by which Pearson's statistic exceeds its mean.

    Rare tokens (< 5 expected) are pooled.
    """
    expected = p * counts.sum()
    rare = expected < 5
    observed = torch.cat([counts[~rare], counts[rare].sum()[None]]).double()
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    keep = expected > 0
    statistic = ((observed - expected)[keep] ** 2 / expected[keep]).sum().item()
    freedom = int(keep.sum()) - 1
    return (statistic - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies(cases: ModuleType, mesh: Mesh, temperature: float) -> None:
    """Token frequencies follow the softmax; test_layouts.py compares sharded samples with these."""
    counts = torch.tensor(cases.histogram(mesh, temperature=temperature))
    assert chi_square(counts, probabilities(cases, temperature)) < 4
    assert chi_square(counts, probabilities(cases, temperature * 1.3)) > 8  # the test has power


@pytest.mark.parametrize(
    ("top_k", "top_p"), [(1, 1.0), (9, 1.0), (0, 0.6), (0, 0.95), (40, 0.5), (1000, 1.0)]
)
def test_truncation(cases: ModuleType, mesh: Mesh, top_k: int, top_p: float) -> None:
    """Samples come from the smallest set of likeliest top_k tokens with probability top_p."""
    p, order = probabilities(cases).sort(descending=True)
    kept = p[: top_k or None] / p[: top_k or None].sum()
    size = int((kept.cumsum(0) < top_p).sum()) + 1
    kept = kept[:size] / kept[:size].sum()
    counts = torch.tensor(cases.histogram(mesh, top_k=top_k, top_p=top_p))[order]
    assert counts[kept.numel() :].sum() == 0
    if kept.numel() > 1:
        assert chi_square(counts[: kept.numel()], kept) < 4


def test_logprobs_of_truncated_samples_are_untruncated(cases: ModuleType) -> None:
    hidden, weight = cases.target()
    ids = torch.arange(50)
    sampler = Sampler(SamplingParams(top_k=5, temperature=0.8), weight, VOCAB, None, 0)
    tokens, logprobs = sampler(hidden.expand(50, -1), ids, ids)
    torch.testing.assert_close(
        logprobs, probabilities(cases, 0.8).log()[tokens].float(), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize(
    "params", [SamplingParams(), SamplingParams(top_k=50), SamplingParams(temperature=0.0)]
)
def test_stop_token_is_suppressed(params: SamplingParams, cases: ModuleType) -> None:
    """The stop token is never sampled before its position; log-probabilities still count it."""
    hidden, weight = cases.target()
    p = probabilities(cases)
    eos = int(p.argmax())
    sampler = Sampler(params, weight, VOCAB, None, eos)
    ids = torch.arange(2000)
    positions = torch.where(ids < 1000, 4, 5)
    tokens, logprobs = sampler(hidden.expand(2000, -1), ids, positions, torch.full_like(ids, 5))
    assert not (tokens[:1000] == eos).any()
    assert (tokens[1000:] == eos).any()
    torch.testing.assert_close(logprobs, p.log()[tokens].float(), atol=1e-5, rtol=1e-5)


def test_a_sample_depends_on_seed_id_and_position_alone(cases: ModuleType) -> None:
    hidden, weight = cases.target()
    ids, positions = torch.arange(200), torch.arange(200) % 7

    def draw(seed: int, rows: torch.Tensor, later: int = 0) -> torch.Tensor:
        sampler = Sampler(SamplingParams(seed=seed), weight, VOCAB, None, 0)
        return sampler(hidden.expand(rows.numel(), -1), ids[rows], positions[rows] + later)[0]

    shuffled = torch.randperm(200)
    assert torch.equal(draw(1, ids)[shuffled], draw(1, shuffled))
    assert torch.equal(draw(1, ids)[150:153], draw(1, ids[150:153]))
    assert (draw(1, ids) != draw(2, ids)).float().mean() > 0.5
    assert (draw(1, ids) != draw(1, ids, later=1)).float().mean() > 0.5
    assert draw(1, torch.zeros_like(ids)).unique().numel() == 1


@settings(max_examples=25, deadline=None)
@given(st.integers(-(2**70), 2**70), st.integers(0, 2**40), st.integers(0, 2**20))
def test_noise_is_positive_finite_and_standard(seed: int, identity: int, position: int) -> None:
    keys = row_keys(seed, torch.tensor([identity]), torch.tensor([position]))
    noise = exponentials(keys, torch.arange(20_000))
    assert noise.dtype == torch.float64
    assert noise.isfinite().all()
    assert (noise > 0).all()
    assert abs(noise.mean().item() - 1) < 0.06  # 8 standard errors
    assert abs(noise.var().item() - 1) < 0.2


def test_streams_are_unique_per_seed_id_and_position() -> None:
    """Neighbouring ids under neighbouring seeds do not share a stream either."""
    ids, positions = torch.arange(100).repeat_interleave(50), torch.arange(50).repeat(100)
    keys = torch.stack([row_keys(seed, ids, positions) for seed in (-1, 0, 1, 2, 3)])
    assert keys.unique().numel() == keys.numel()


def test_streams_do_not_correlate() -> None:
    ids = torch.arange(64)
    noise = exponentials(row_keys(0, ids, torch.zeros_like(ids)), torch.arange(2000))
    later = exponentials(row_keys(0, ids, torch.ones_like(ids)), torch.arange(2000))
    both = torch.corrcoef(torch.cat([noise, later])) - torch.eye(128)
    assert both.abs().max() < 6 / math.sqrt(2000)


def test_extreme_logits() -> None:
    """Sampling is exact with one dominating logit and with a vocabulary of one token."""
    weight = torch.zeros(2 * BLOCK, 1)
    weight[200] = 1e4
    for params in (SamplingParams(), SamplingParams(temperature=0.01), SamplingParams(top_p=0.5)):
        tokens, logprobs = Sampler(params, weight, 250, None, 0)(
            torch.ones(3, 1), torch.arange(3), torch.arange(3)
        )
        assert tokens.tolist() == [200] * 3
        assert logprobs.tolist() == [0.0] * 3
        tokens, logprobs = Sampler(params, weight, 1, None, 0)(
            torch.ones(3, 1), torch.arange(3), torch.arange(3)
        )
        assert tokens.tolist() == [0] * 3
        assert logprobs.tolist() == [0.0] * 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens 0"),
        ({"max_new_tokens": 4, "min_new_tokens": 5}, "min_new_tokens 5"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"stop": ("",)}, "empty string"),
    ],
)
def test_params_are_checked(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(**changes)
