"""A rank of a world that does not exist: the product's own code at 1,024 ranks, in one process.

torch's "fake" process group answers every collective at once and moves nothing. Shapes, groups and
the order of calls are those of the real run; values are meaningless. Used by `fastrlhf plan` and by
the tests that record collectives.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

from fastrlhf.config import ParallelConfig
from fastrlhf.parallel import cpu
from fastrlhf.parallel.mesh import Mesh, build_mesh, seed_generators


@contextlib.contextmanager
def simulated_rank(parallel: ParallelConfig, rank: int, world_size: int) -> Iterator[Mesh]:
    """Yield the mesh of rank `rank` of `world_size` on this process's CPU.

    Objects that ranks gather are this rank's own, once for each rank. The process must not have
    joined a process group, and has left the simulated one afterwards.
    """
    # A private module: torch registers the "fake" backend when it is imported.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    assert not dist.is_initialized(), "a simulated rank needs a process without a process group"
    cpu.install()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        with (
            mock.patch.object(dist, "all_gather_object", _gather_own),
            # It compares states of generators, which fake tensors do not have.
            mock.patch.object(CudaRNGStatesTracker, "fork", _no_fork),
        ):
            parallel_state.initialize_model_parallel(
                parallel.tensor, parallel.pipeline, create_gloo_process_groups=False
            )
            mesh = build_mesh(torch.device("cpu"), parallel)
            seed_generators(mesh, seed=1)
            yield mesh
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
        cpu.uninstall()


def _no_fork(
    _tracker: CudaRNGStatesTracker, name: str = ""
) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


def _gather_own(gathered: list[object], own: object, group: object = None) -> None:
    gathered[:] = [own] * len(gathered)


def first_rank_of_stage(parallel: ParallelConfig, stage: int, world_size: int) -> int:
    """Return the first rank of pipeline stage `stage`: tensor-fastest, then data, then pipeline."""
    return stage * (world_size // parallel.pipeline)
