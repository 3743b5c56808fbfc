"""Decode steps as CUDA graphs, one for each bucket of rows and of cache length, captured when first needed.

Everything that a step reads or writes is a tensor of the group of slots at a fixed address: newest tokens, positions,
ids, cache, and which rows are active. So a replay depends on nothing that Python held when the step was captured. Rows
that are not active decode token 0 at position 0 of their own cache row, which a prompt overwrites before it is read.
Left out on purpose: graphs with collectives in them (tensor or pipeline parallelism).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from fastrlhf.generation.slots import SlotGroup
from fastrlhf.parallel.mesh import Mesh

Tensor = torch.Tensor
SHORTEST = 128
"""Cache length of the smallest bucket; the others are its doubles."""


class Graph(Protocol):
    """Records the kernels that `step` launches; `replay` launches them again, on the same addresses."""

    def capture(self, step: Callable[[], Tensor]) -> Tensor:
        """The tensor that every replay fills. Whether `step` runs meanwhile, and how often, is left open."""
        ...

    def replay(self) -> None: ...


class CudaGraph:
    def __init__(self) -> None:
        self.graph = torch.cuda.CUDAGraph()

    def capture(self, step: Callable[[], Tensor]) -> Tensor:
        # Libraries allocate their workspaces at the first call, which a capture forbids: so one call before it.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(self.graph):
            return step()

    def replay(self) -> None:
        self.graph.replay()


def possible(mesh: Mesh) -> bool:
    """Whether a step of a model on this mesh can be captured: a GPU, and no collective inside."""
    return mesh.device.type == "cuda" and mesh.tensor_size == 1 and mesh.pipeline_size == 1


class DecodeGraphs:
    """The graphs of one group. `step(rows, length)` decodes the group's first rows, advances their state in place, and
    returns what it drew, [rows, 2].
    """

    def __init__(self, group: SlotGroup, step: Callable[[int, int], Tensor]) -> None:
        self.group = group
        self.step = step
        self.captured: dict[tuple[int, int], tuple[Graph, Tensor]] = {}

    def __call__(self, rows: int, length: int) -> Tensor:
        """A step over the group's first `rows` rows, all of them active, that attends to `length` positions at most."""
        bucket = (
            _up_to(rows, 1, self.group.slots),
            _up_to(length, SHORTEST, self.group.cache.length),
        )
        if bucket not in self.captured:
            self.captured[bucket] = self._capture(*bucket)
        graph, drawn = self.captured[bucket]
        graph.replay()
        return drawn[:rows]

    def _capture(self, rows: int, length: int) -> tuple[Graph, Tensor]:
        before = [state.clone() for state in self.group.state]
        graph = CudaGraph()
        drawn = graph.capture(lambda: self.step(rows, length))
        # As if the step had not run. What it wrote to the cache, the replay will write again.
        for state, value in zip(self.group.state, before, strict=True):
            state.copy_(value)
        return graph, drawn


def _up_to(number: int, smallest: int, largest: int) -> int:
    """The least of smallest, 2 smallest, 4 smallest, ... that is not below `number`; never above `largest`."""
    size = smallest
    while size < number:
        size *= 2
    return min(size, largest)
