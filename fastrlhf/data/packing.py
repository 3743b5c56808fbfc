"""Assignment of samples to micro-batches: pure functions of their lengths, equal on every rank.

`assign_micro_batches` balances the tokens of a global batch over the data-parallel ranks and cuts
each rank's samples into micro-batches under a token budget (`first_fit`). Samples of a micro-batch
do not attend to each other (batches.py), so packing does not change the loss.

Not supported: cutting a sample to fill a gap.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from fastrlhf.errors import UserError


def first_fit(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Pack samples first-fit decreasing: longest first, each into the first list with room for it.

    Returns lists that together hold every index of `lengths` (tokens, each at least 1) once; the
    indices are ascending inside a list. There are at most 11/9 of the fewest possible lists, plus
    one (Johnson 1973). Takes O(n log n): the first list with room is found in a tree of maxima.
    Raises UserError if a single sample is above `max_tokens`.
    """
    _check_budget(lengths, max_tokens)
    leaves = 1 << max(len(lengths) - 1, 0).bit_length()
    # Free tokens: node i holds the larger of nodes 2i and 2i + 1; the last `leaves` are the lists.
    room = [max_tokens] * (2 * leaves)
    lists: list[list[int]] = [[] for _ in range(leaves)]
    for index in _longest_first(lengths):
        length, node = lengths[index], 1
        while node < leaves:
            node = 2 * node + (room[2 * node] < length)
        lists[node - leaves].append(index)
        room[node] -= length
        while node := node // 2:
            room[node] = max(room[2 * node], room[2 * node + 1])
    return [sorted(indices) for indices in lists if indices]


def balance(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Split samples into `parts` index lists with about equal tokens.

    Each sample, longest first, goes to the list with the fewest tokens so far. The largest list is
    at most 4/3 of the best possible (Graham 1969), in practice within the shortest sample of it. No
    list is empty if there are at least `parts` samples.
    """
    lists: list[list[int]] = [[] for _ in range(parts)]
    loads = [(0, 0, part) for part in range(parts)]
    for index in _longest_first(lengths):
        tokens, samples, part = loads[0]
        lists[part].append(index)
        heapq.heapreplace(loads, (tokens + lengths[index], samples + 1, part))
    return [sorted(indices) for indices in lists]


def assign_micro_batches(
    lengths: Sequence[int], ranks: int, max_tokens: int
) -> list[list[list[int]]]:
    """Return each rank's micro-batches as lists of indices into `lengths`.

    Every index is in one micro-batch, and no micro-batch is above `max_tokens`. Ranks have about
    equal tokens, but their numbers of micro-batches may differ. With fewer samples than ranks, some
    ranks have none. Raises UserError if a single sample is above `max_tokens`.
    """
    _check_budget(lengths, max_tokens)
    by_rank = []
    for samples in balance(lengths, ranks):
        micro_batches = first_fit([lengths[index] for index in samples], max_tokens)
        by_rank.append([[samples[i] for i in micro_batch] for micro_batch in micro_batches])
    return by_rank


def efficiency(
    lengths: Sequence[int], by_rank: Sequence[Sequence[Sequence[int]]], max_tokens: int
) -> float:
    """Return the filled share of the token budget of all micro-batches; 1 if each is full."""
    return sum(lengths) / (max_tokens * sum(len(micro_batches) for micro_batches in by_rank))


def _longest_first(lengths: Sequence[int]) -> list[int]:
    # The sort is stable, so equal lengths keep their order.
    return sorted(range(len(lengths)), key=lambda index: -lengths[index])


def _check_budget(lengths: Sequence[int], max_tokens: int) -> None:
    longest = max(lengths, default=0)
    if longest > max_tokens:
        raise UserError(
            f"a sample has {longest} tokens, above train.max_tokens_per_micro_batch {max_tokens}; "
            f"raise it to at least {longest}, or lower the limits in the data section"
        )
