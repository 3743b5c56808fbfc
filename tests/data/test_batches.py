"""Packing by hand-made examples and by property: sequences are independent of each other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastrlhf.data.batches import (
    TokenizedDemonstration,
    TokenizedRanking,
    pack,
    pack_demonstrations,
    pack_rankings,
    pack_windows,
)


def test_pack_two_demonstrations() -> None:
    batch = pack_demonstrations(
        [TokenizedDemonstration([5, 6, 7, 8, 9], 3), TokenizedDemonstration([1, 2], 1)]
    )
    assert batch.tokens.tolist() == [5, 6, 7, 8, 9, 1, 2]
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert batch.cu_seqlens.tolist() == [0, 5, 7]
    assert batch.labels.tolist() == [6, 7, 8, 9, -100, 2, -100]
    assert batch.loss_mask.tolist() == [False, False, True, True, False, True, False]
    assert (batch.num_sequences, batch.max_seqlen) == (2, 5)
    dtypes = [batch.tokens, batch.positions, batch.labels, batch.cu_seqlens, batch.loss_mask]
    assert [t.dtype for t in dtypes] == [
        torch.int64,
        torch.int64,
        torch.int64,
        torch.int32,
        torch.bool,
    ]


def test_a_prompt_of_no_tokens_counts_every_label() -> None:
    assert pack([[1, 2, 3], [4]], [0, 0]).loss_mask.tolist() == [True, True, False, False]


def test_rankings_keep_the_responses_of_a_prompt_together() -> None:
    batch = pack_rankings(
        [
            TokenizedRanking([1, 2], [[3, 0], [4, 5, 0], [6]], (2, 1, 2)),
            TokenizedRanking([7], [[8, 0], [9, 0]], (1, 2)),
        ]
    )
    assert batch.tokens.tolist() == [1, 2, 3, 0, 1, 2, 4, 5, 0, 1, 2, 6, 7, 8, 0, 7, 9, 0]
    assert batch.cu_seqlens.tolist() == [0, 4, 9, 12, 15, 18]
    assert batch.last_index.tolist() == [3, 8, 11, 14, 17]
    assert batch.ranks.tolist() == [2, 1, 2, 1, 2]
    assert batch.prompt_offsets.tolist() == [0, 3, 5]
    assert batch.loss_mask[:4].tolist() == [False, True, True, False]
    assert [t.dtype for t in (batch.ranks, batch.prompt_offsets, batch.last_index)] == [
        torch.int64
    ] * 3
    assert pack_rankings([TokenizedRanking([1], [[2], [3]], (1, 1.5))]).ranks.dtype == torch.float32


def test_windows_use_every_label() -> None:
    batch = pack_windows([[1, 2, 3, 4], [5, 6, 7, 8]])
    assert batch.tokens.tolist() == [1, 2, 3, 5, 6, 7]
    assert batch.labels.tolist() == [2, 3, 4, 6, 7, 8]
    assert batch.loss_mask.all()
    assert batch.cu_seqlens.tolist() == [0, 3, 6]


def test_to_moves_every_tensor_and_keeps_the_kind() -> None:
    batch = pack_rankings([TokenizedRanking([1, 2], [[3], [4, 5]], (1, 2))])
    moved = batch.to("meta")
    assert type(moved) is type(batch)
    assert moved.max_seqlen == 4
    names = [name for name, value in vars(moved).items() if isinstance(value, torch.Tensor)]
    assert len(names) == 8
    assert all(getattr(moved, name).device.type == "meta" for name in names)
    assert batch.tokens.device.type == "cpu"


def test_invalid_input_is_reported() -> None:
    with pytest.raises(ValueError, match="sequences is empty"):
        pack([], [])
    with pytest.raises(ValueError, match="sequence 1 is empty"):
        pack([[1], []], [0, 0])
    with pytest.raises(ValueError, match="prompt_lengths has 1 entries for 2 sequences"):
        pack([[1], [2]], [0])
    with pytest.raises(ValueError, match="ranking 0 has 1 ranks for 2 responses"):
        pack_rankings([TokenizedRanking([1], [[2], [3]], (1,))])


@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 9), min_size=1, max_size=9), st.integers(0, 9)),
        min_size=1,
        max_size=6,
    )
)
def test_every_sequence_is_as_if_packed_alone(rows: list[tuple[list[int], int]]) -> None:
    sequences, prompts = [row[0] for row in rows], [row[1] for row in rows]
    together = pack(sequences, prompts)
    ends = together.cu_seqlens.tolist()
    assert together.max_seqlen == max(map(len, sequences))
    for s, (sequence, prompt) in enumerate(rows):
        own = slice(ends[s], ends[s + 1])
        assert together.tokens[own].tolist() == sequence
        assert together.positions[own].tolist() == list(range(len(sequence)))
        assert together.labels[own].tolist() == [*sequence[1:], -100]
        counted = [prompt <= t + 1 < len(sequence) for t in range(len(sequence))]
        assert together.loss_mask[own].tolist() == counted
