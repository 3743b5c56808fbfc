"""First-fit packing and balancing: complete, within the budget, close to the best possible."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastrlhf.data.packing import assign_micro_batches, balance, efficiency, first_fit
from fastrlhf.errors import UserError

LENGTHS = st.lists(st.integers(1, 100), max_size=60)


def reference_first_fit(lengths: list[int], max_tokens: int) -> list[list[int]]:
    """Pack by the textbook loop, O(n^2)."""
    lists: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        for samples in lists:
            if sum(lengths[i] for i in samples) + lengths[index] <= max_tokens:
                samples.append(index)
                break
        else:
            lists.append([index])
    return [sorted(samples) for samples in lists]


@given(lengths=LENGTHS, max_tokens=st.integers(100, 300))
def test_first_fit_is_the_textbook_algorithm(lengths: list[int], max_tokens: int) -> None:
    assert first_fit(lengths, max_tokens) == reference_first_fit(lengths, max_tokens)


@given(lengths=LENGTHS, ranks=st.integers(1, 7), max_tokens=st.integers(100, 300))
def test_shares_hold_each_sample_once_within_the_budget(
    lengths: list[int], ranks: int, max_tokens: int
) -> None:
    shares = assign_micro_batches(lengths, ranks, max_tokens)
    assert len(shares) == ranks
    assert sorted(i for samples in shares for micro in samples for i in micro) == list(
        range(len(lengths))
    )
    assert all(
        0 < sum(lengths[i] for i in micro) <= max_tokens for samples in shares for micro in samples
    )
    loads = [sum(lengths[i] for micro in samples for i in micro) for samples in shares]
    assert max(loads) - min(loads) <= max(lengths, default=0)
    if len(lengths) >= ranks:
        assert all(shares)


def test_hand_computed_examples() -> None:
    assert first_fit([5, 3, 6, 2, 4], 10) == [[2, 4], [0, 1, 3]]
    assert balance([5, 3, 6, 2, 4], 2) == [[1, 2, 3], [0, 4]]
    assert assign_micro_batches([4] * 6, 3, 8) == [[[0, 3]], [[1, 4]], [[2, 5]]]
    assert assign_micro_batches([4, 4], 3, 8) == [[[0]], [[1]], []]
    assert efficiency([5, 3, 6, 2, 4], [[[2, 4], [0, 1, 3]]], 10) == 1.0
    assert efficiency([6, 6], [[[0]], [[1]]], 8) == 0.75
    assert first_fit([], 8) == []


def test_real_lengths_pack_tightly_and_evenly() -> None:
    """Log-normal lengths, like demonstrations: over 95 % full, ranks within 0.1 %."""
    draw = random.Random(0)
    lengths = [min(2048, max(8, round(draw.lognormvariate(5.5, 0.8)))) for _ in range(4096)]
    shares = assign_micro_batches(lengths, 8, 8192)
    loads = [sum(lengths[i] for micro in samples for i in micro) for samples in shares]
    assert max(loads) / (sum(loads) / 8) < 1.001
    assert efficiency(lengths, shares, 8192) > 0.95


def test_a_sample_above_the_budget_names_its_length_and_the_key() -> None:
    with pytest.raises(
        UserError,
        match=r"a sample has 9 tokens, above train.max_tokens_per_micro_batch 8; raise it",
    ):
        assign_micro_batches([3, 9, 4], 2, 8)
