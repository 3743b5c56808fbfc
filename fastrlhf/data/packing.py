"""Which samples go into which micro-batch: pure functions of their lengths, the same on every rank.

`share` gives data-parallel ranks token-balanced shares of a global batch and cuts each into micro-batches under a token
budget by `first_fit`. Samples of a micro-batch stay apart in attention (batches.py), so packing changes no loss. Left
out on purpose: cutting a sample to fill a gap.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from fastrlhf.errors import UserError


def first_fit(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """First-fit decreasing: each sample, longest first, into the first micro-batch with room for it.

    Returns index lists that hold every index of `lengths` (tokens, each at least 1) once, ascending inside a list. At
    most 11/9 of the fewest lists possible, plus one (Johnson 1973). O(n log n): the first list with room is found in a
    tree of the largest rooms. UserError when a sample alone is above `max_tokens`.
    """
    _check_budget(lengths, max_tokens)
    leaves = 1 << max(len(lengths) - 1, 0).bit_length()
    room = [max_tokens] * (
        2 * leaves
    )  # of node i, the larger of nodes 2i and 2i + 1; lists are the last `leaves`
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
    """`parts` index lists of about equal tokens: each sample, longest first, to the list with the fewest so far.

    The largest list is at most 4/3 of the best possible (Graham 1969), in practice within the shortest sample of it.
    Every list has a sample when there are at least `parts`.
    """
    lists: list[list[int]] = [[] for _ in range(parts)]
    loads = [(0, 0, part) for part in range(parts)]
    for index in _longest_first(lengths):
        tokens, samples, part = loads[0]
        lists[part].append(index)
        heapq.heapreplace(loads, (tokens + lengths[index], samples + 1, part))
    return [sorted(indices) for indices in lists]


def share(lengths: Sequence[int], ranks: int, max_tokens: int) -> list[list[list[int]]]:
    """For each of `ranks`, its micro-batches as lists of indices into `lengths`.

    Every index is in one micro-batch, none is above `max_tokens`, and ranks have about equal tokens; their numbers of
    micro-batches may differ. With fewer samples than ranks, some ranks have none.
    """
    _check_budget(lengths, max_tokens)
    shares = []
    for own in balance(lengths, ranks):
        micro_batches = first_fit([lengths[index] for index in own], max_tokens)
        shares.append([[own[place] for place in places] for places in micro_batches])
    return shares


def efficiency(
    lengths: Sequence[int], shares: Sequence[Sequence[Sequence[int]]], max_tokens: int
) -> float:
    """Tokens over the room of all micro-batches of `shares`: 1 when each is full."""
    return sum(lengths) / (max_tokens * sum(len(micro_batches) for micro_batches in shares))


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(
        range(len(lengths)), key=lambda index: -lengths[index]
    )  # stable, so equal lengths keep their order


def _check_budget(lengths: Sequence[int], max_tokens: int) -> None:
    longest = max(lengths, default=0)
    if longest > max_tokens:
        raise UserError(
            f"a sample has {longest} tokens, above train.max_tokens_per_micro_batch {max_tokens}; raise it to the "
            f"longest sample at least, or shorten samples in the data section"
        )
