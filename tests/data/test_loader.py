"""The order of samples is complete, the same with every layout, and resumes exactly."""

from __future__ import annotations

from itertools import islice
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastrlhf.data.loader import Loader, permutation
from fastrlhf.errors import UserError

GOLDEN = [
    [8, 9, 7, 3, 0, 1, 4, 2, 5, 6],
    [0, 9, 5, 6, 4, 2, 8, 1, 7, 3],
]


def loader(
    samples: int, G: int, micro: int, rank: int = 0, size: int = 1, **options: Any
) -> Loader[int, list[int]]:
    arguments: dict[str, Any] = {"seed": 7, "collate": list, **options}
    return Loader(
        range(samples),
        global_batch_size=G,
        micro_batch_size=micro,
        data_rank=rank,
        data_size=size,
        **arguments,
    )


def all_ranks(samples: int, G: int, micro: int, size: int, **options: Any) -> list[list[list[int]]]:
    """Return the micro-batches of each step, the ranks' blocks joined in rank order."""
    ranks = [list(loader(samples, G, micro, rank, size, **options)) for rank in range(size)]
    return [
        [micro_batch for rank in step for micro_batch in rank] for step in zip(*ranks, strict=True)
    ]


def test_golden_order() -> None:
    """A change of this order would break resuming every existing run."""
    assert permutation(10, seed=1234, epoch=0).tolist() == GOLDEN[0]
    assert permutation(10, seed=1234, epoch=1).tolist() == GOLDEN[1]
    assert permutation(4, seed=1234, epoch=0, shuffle=False).tolist() == [0, 1, 2, 3]


def test_ranks_take_contiguous_blocks_of_the_global_batch() -> None:
    steps = list(loader(12, 12, 2, rank=1, size=3, shuffle=False, epochs=1))
    assert steps == [[[4, 5], [6, 7]]]


@given(
    extra=st.integers(0, 11),
    steps=st.integers(1, 4),
    micro=st.sampled_from([1, 2]),
    seed=st.integers(-3, 2**63),
)
def test_any_layout_gives_the_same_micro_batches_with_each_sample_once(
    extra: int, steps: int, micro: int, seed: int
) -> None:
    G = 12
    layouts = [
        all_ranks(steps * G + extra, G, micro, size, seed=seed, epochs=2) for size in (1, 2, 3)
    ]
    assert layouts[0] == layouts[1] == layouts[2]
    assert len(layouts[0]) == 2 * steps
    for epoch in (layouts[0][:steps], layouts[0][steps:]):
        seen = [sample for step in epoch for micro_batch in step for sample in micro_batch]
        assert len(set(seen)) == len(seen) == steps * G
    whole = all_ranks(steps * G + extra, G, micro, 3, seed=seed, epochs=1, drop_last=False)
    seen = [sample for step in whole for micro_batch in step for sample in micro_batch]
    assert sorted(seen) == list(range(steps * G + extra))
    assert len(whole) == len(loader(steps * G + extra, G, micro, drop_last=False))


def test_epochs_and_seeds_give_different_orders() -> None:
    first, second = (
        [s for step in epoch for micro in step for s in micro] for epoch in _epochs(seed=1)
    )
    other = [s for step in next(iter(_epochs(seed=2))) for micro in step for s in micro]
    assert sorted(first) == sorted(second) == sorted(other) == list(range(24))
    assert first != second
    assert first != other


def _epochs(seed: int) -> list[list[list[list[int]]]]:
    steps = list(loader(24, 6, 3, seed=seed, epochs=2))
    return [steps[:4], steps[4:]]


@given(done=st.integers(0, 6), before=st.sampled_from([1, 2, 3]), after=st.sampled_from([1, 2, 3]))
def test_resuming_continues_at_the_exact_sample_with_any_layout(
    done: int, before: int, after: int
) -> None:
    everything = all_ranks(41, 12, 2, 1, epochs=2)
    started = loader(41, 12, 1, rank=before - 1, size=before, epochs=2)
    for _ in islice(started, done):
        pass
    state = started.state_dict()
    ranks = []
    for rank in range(after):
        resumed = loader(41, 12, 2, rank, after, epochs=2)
        resumed.load_state_dict(state)
        ranks.append(list(resumed))
    joined = [[micro for rank in step for micro in rank] for step in zip(*ranks, strict=True)]
    assert joined == everything[done:]


def test_a_checkpoint_inside_the_loop_counts_the_step_as_done() -> None:
    running = loader(8, 4, 2, epochs=None)
    steps = iter(running)
    next(steps)
    assert running.state_dict()["cursor"] == 4
    resumed = loader(8, 4, 2, epochs=None)
    resumed.load_state_dict(running.state_dict())
    assert list(islice(resumed, 5)) == list(islice(steps, 5))


def test_resuming_with_another_global_batch_continues_after_the_samples_seen() -> None:
    running = loader(24, 6, 1, epochs=1)
    seen = [s for step in islice(running, 2) for micro in step for s in micro]
    resumed = loader(24, 4, 1, epochs=1)
    resumed.load_state_dict(running.state_dict())
    rest = [s for step in resumed for micro in step for s in micro]
    assert sorted(seen + rest) == list(range(24))


def test_a_state_of_other_data_is_rejected() -> None:
    state = loader(24, 6, 1).state_dict()
    with pytest.raises(
        UserError, match="the checkpoint has samples 24, this run 30; use the same data"
    ):
        loader(30, 6, 1).load_state_dict(state)
    with pytest.raises(UserError, match="the checkpoint has seed 7, this run 8"):
        loader(24, 6, 1, seed=8).load_state_dict(state)


def test_errors_about_sizes_name_the_numbers() -> None:
    message = (
        "the global batch size 30 is not divisible by "
        "micro-batch size 4 x data-parallel size 2 = 8; use 24 or 32"
    )
    with pytest.raises(UserError, match=message):
        loader(100, 30, 4, size=2)
    with pytest.raises(UserError, match="= 8; use 8"):
        loader(100, 4, 4, size=2)
    with pytest.raises(
        UserError, match="has 10 samples, fewer than the global batch size 32; add data, or set"
    ):
        loader(10, 32, 4)
    with pytest.raises(UserError, match="the data set is empty"):
        loader(0, 4, 4, drop_last=False)
    with pytest.raises(UserError, match="at least 1"):
        loader(10, 0, 1)
    assert len(loader(10, 32, 4, drop_last=False)) == 1


def packed(samples: int, G: int, size: int, **options: Any) -> list[list[list[list[int]]]]:
    """Return [step][rank] lists of micro-batches of at most 20 tokens; sample i has 1 + i % 9."""
    arguments: dict[str, Any] = {"max_tokens": 20, "cost": _cost, **options}
    return [
        list(step)
        for step in zip(
            *(loader(samples, G, 1, r, size, **arguments) for r in range(size)), strict=True
        )
    ]


def _cost(sample: int) -> int:
    return 1 + sample % 9


@given(size=st.sampled_from([1, 2, 3]), drop_last=st.booleans(), seed=st.integers(0, 2**32))
def test_packed_steps_have_the_samples_of_unpacked_ones(
    size: int, drop_last: bool, seed: int
) -> None:
    options: dict[str, Any] = {"seed": seed, "epochs": 2, "drop_last": drop_last}
    steps = packed(41, 13, size, **options)
    plain = all_ranks(41, 13, 1, 1, **options)
    assert len(steps) == len(plain)
    for step, unpacked in zip(steps, plain, strict=True):
        assert all(sum(map(_cost, micro)) <= 20 for rank in step for micro in rank)
        seen = sorted(sample for rank in step for micro in rank for sample in micro)
        assert seen == sorted(sample for micro in unpacked for sample in micro)
        assert all(step) or len(seen) < size


@given(done=st.integers(0, 3), before=st.sampled_from([1, 2, 3]), after=st.sampled_from([1, 2, 3]))
def test_a_packed_epoch_resumes_with_another_layout(done: int, before: int, after: int) -> None:
    """Both runs together use each sample of the epoch once."""
    arguments: dict[str, Any] = {"max_tokens": 20, "cost": _cost, "epochs": 1, "drop_last": False}
    started = [loader(41, 11, 1, rank, before, **arguments) for rank in range(before)]
    first = [list(islice(one, done)) for one in started]
    assert len({str(one.state_dict()) for one in started}) == 1
    rest = []
    for rank in range(after):
        resumed = loader(41, 11, 1, rank, after, **arguments)
        resumed.load_state_dict(started[0].state_dict())
        rest.append(list(resumed))
    assert sorted(
        s for steps in first + rest for step in steps for micro in step for s in micro
    ) == list(range(41))


def test_a_token_budget_needs_a_sample_per_rank_and_a_cost() -> None:
    arguments: dict[str, Any] = {"max_tokens": 20, "cost": _cost}
    assert len(loader(100, 7, 4, size=3, **arguments)) == 14
    with pytest.raises(
        UserError, match="the global batch size 2 is smaller than the data-parallel size 3"
    ):
        loader(100, 2, 1, size=3, **arguments)
    with pytest.raises(
        UserError, match=r"a sample has 9 tokens, above train.max_tokens_per_micro_batch 8"
    ):
        list(loader(9, 9, 1, max_tokens=8, cost=_cost))
    with pytest.raises(ValueError, match="go together"):
        loader(9, 9, 1, max_tokens=8)


def test_the_efficiency_of_packing_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    """Nine samples of 1 to 9 tokens have 45 tokens.

    They take four micro-batches of 20 tokens on two ranks, three on one rank.
    """
    caplog.set_level("INFO", logger="fastrlhf")
    for size, efficiency in ((1, 45 / 60), (2, 45 / 80)):
        one = loader(9, 9, 1, 0, size, max_tokens=20, cost=_cost)
        assert one.metrics() == {"epoch": 0}
        steps = iter(one)
        next(steps), next(steps)
        assert one.metrics() == {"epoch": 2, "packing_efficiency": efficiency}
    assert caplog.messages[1:] == [
        "packing: 9 samples with 45 tokens in total, "
        "in 4 micro-batches of at most 20 tokens, 56.2% full"
    ]
    halves = loader(10, 4, 1)
    steps = iter(halves)
    assert [halves.metrics() for _ in (next(steps), next(steps), next(steps))] == [
        {"epoch": 1.4}
    ] * 3
