"""Decode steps as CUDA graphs: one per bucket of rows and cache length, captured at first use.

Everything that a step reads or writes is a tensor of the slot group at a fixed address: newest
tokens, positions, ids, cache, and which rows are active. A replay therefore depends on no Python
value of the time of the capture. Inactive rows decode token 0 at position 0 of their own cache
row, which a prompt overwrites before it is read. Not supported: graphs that contain collectives
(tensor or pipeline parallelism).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from fastrlhf.generation.slots import SlotGroup
from fastrlhf.parallel.mesh import Mesh

Tensor = torch.Tensor
MIN_CACHE_LENGTH = 128
"""Cache length of the smallest bucket; each further bucket is twice as long."""


class Graph(Protocol):
    """A recording of the kernels that `step` launches, replayed on the same addresses."""

    def capture(self, step: Callable[[], Tensor]) -> Tensor:
        """Record `step` and return the tensor that every replay fills.

        An implementation may run `step` any number of times.
        """
        ...

    def replay(self) -> None:
        """Launch the recorded kernels again."""
        ...


class CudaGraph:
    """`Graph` on a GPU."""

    def __init__(self) -> None:
        self.graph = torch.cuda.CUDAGraph()

    def capture(self, step: Callable[[], Tensor]) -> Tensor:
        # Libraries allocate workspaces in their first call, which is an error during a capture:
        # run the step once before.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(self.graph):
            return step()

    def replay(self) -> None:
        self.graph.replay()


def can_capture(mesh: Mesh) -> bool:
    """Return whether decode steps on this mesh can be captured: a GPU and no collectives."""
    return mesh.device.type == "cuda" and mesh.tensor_size == 1 and mesh.pipeline_size == 1


class DecodeGraphs:
    """The graphs of one slot group.

    `step(rows, length)` decodes the group's first `rows` rows, advances their state in place and
    returns the sampled tokens and log-probabilities, [rows, 2].
    """

    def __init__(self, group: SlotGroup, step: Callable[[int, int], Tensor]) -> None:
        self.group = group
        self.step = step
        self.captured: dict[tuple[int, int], tuple[Graph, Tensor]] = {}

    def __call__(self, rows: int, length: int) -> Tensor:
        """Replay a step over the first `rows` rows that attends to at most `length` positions.

        All of these rows must be active. Returns [rows, 2].
        """
        bucket = (
            _bucket_size(rows, 1, self.group.slots),
            _bucket_size(length, MIN_CACHE_LENGTH, self.group.cache.length),
        )
        if bucket not in self.captured:
            self.captured[bucket] = self._capture(*bucket)
        graph, sampled = self.captured[bucket]
        graph.replay()
        return sampled[:rows]

    def _capture(self, rows: int, length: int) -> tuple[Graph, Tensor]:
        before = [state.clone() for state in self.group.state]
        graph = CudaGraph()
        sampled = graph.capture(lambda: self.step(rows, length))
        # Undo the step's effect on the state. Its cache entries are rewritten by the replay.
        for state, value in zip(self.group.state, before, strict=True):
            state.copy_(value)
        return graph, sampled


def _bucket_size(number: int, smallest: int, largest: int) -> int:
    """Return the first of smallest, 2 smallest, 4 smallest, ... >= `number`, at most `largest`."""
    size = smallest
    while size < number:
        size *= 2
    return min(size, largest)
