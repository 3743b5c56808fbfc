"""The mesh of ranks: start-up, megatron's process groups, and the collectives that trainers use.

Ranks are started by torchrun and communicate with NCCL or gloo. They are ordered tensor-fastest,
then data, then pipeline (megatron's "tp-cp-ep-dp-pp" order). Every other package receives a `Mesh`;
none reads megatron's global state.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import itertools
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from fastrlhf.config import ParallelConfig
from fastrlhf.errors import UserError
from fastrlhf.parallel import cpu, rendezvous
from fastrlhf.parallel.exit import mark_groups_joined
from fastrlhf.parallel.watchdog import set_group_timeouts

Group = dist.ProcessGroup


@dataclass(frozen=True)
class Mesh:
    """This rank's coordinates in the mesh, and its groups.

    The sizes multiply to the world size (context parallelism is 1).
    """

    device: torch.device
    rank: int
    world_size: int
    tensor_rank: int
    tensor_size: int
    pipeline_rank: int
    pipeline_size: int
    data_rank: int
    data_size: int
    sequence_parallel: bool
    tensor_group: Group
    pipeline_group: Group
    data_group: Group
    groups: ProcessGroupCollection
    """All of megatron's groups, for megatron's classes."""

    @property
    def is_first_stage(self) -> bool:
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline_rank == self.pipeline_size - 1

    @property
    def vocab_group(self) -> Group | None:
        """The group over which the vocabulary is sharded; None if it is not sharded."""
        return self.tensor_group if self.tensor_size > 1 else None

    def sum_over_data(self, value: torch.Tensor) -> torch.Tensor:
        """Sum `value` over the data-parallel ranks in place and return it."""
        if self.data_size > 1:
            dist.all_reduce(value, group=self.data_group)
        return value

    def max_over_data(self, value: torch.Tensor) -> torch.Tensor:
        """Take the maximum of `value` over the data-parallel ranks in place and return it."""
        if self.data_size > 1:
            dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self.data_group)
        return value

    def from_last_stage(self, tensor: torch.Tensor | None) -> torch.Tensor:
        """Broadcast the last stage's tensor, with its shape and dtype, to every pipeline stage.

        The other stages pass None.
        """
        if self.pipeline_size == 1:
            assert tensor is not None
            return tensor
        source = dist.get_global_rank(self.pipeline_group, self.pipeline_size - 1)
        meta = [(tuple(tensor.shape), tensor.dtype) if tensor is not None else None]
        dist.broadcast_object_list(meta, src=source, group=self.pipeline_group)
        assert meta[0] is not None
        shape, dtype = meta[0]
        if not self.is_last_stage:
            tensor = torch.empty(shape, dtype=dtype, device=self.device)
        assert tensor is not None
        tensor = tensor.contiguous()
        dist.broadcast(tensor, src=source, group=self.pipeline_group)
        return tensor

    def gather_over_data(self, tensor: torch.Tensor) -> torch.Tensor:
        """Concatenate the rows of all data-parallel ranks in rank order.

        [n, ...] -> [data_size * n, ...]. The shape must be the same on every rank.
        """
        if self.data_size == 1:
            return tensor
        # gloo does not gather bool tensors.
        row = tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor.contiguous()
        parts = [torch.empty_like(row) for _ in range(self.data_size)]
        dist.all_gather(parts, row, group=self.data_group)
        return torch.cat(parts).to(tensor.dtype)

    def sum_metrics(
        self,
        rows: Sequence[Mapping[str, torch.Tensor | float]],
        names: Sequence[str],
        largest: Sequence[str] = (),
    ) -> dict[str, float]:
        """Sum the last stage's metrics over micro-batches and data-parallel ranks, for every rank.

        `rows` has one mapping per micro-batch, with some of `names`, which are the same on every
        rank. Losses have the denominator of the global batch, so their sum is the loss of the
        global batch under any layout. A metric that a micro-batch lacks counts as 0. The maximum is
        taken of metrics named in `largest`.
        """
        table = torch.zeros(len(rows), len(names), dtype=torch.float64, device=self.device)
        for i, row in enumerate(rows):
            assert row.keys() <= set(names), f"metrics {sorted(row)} are not all in {names}"
            for j, name in enumerate(names):
                table[i, j] = row.get(name, 0.0)
        # Stages before the last have no rows; they receive the sums.
        sums = self.sum_over_data(table.sum(0))
        if largest:
            top = self.max_over_data(table.max(0).values if rows else torch.zeros_like(sums))
            sums = torch.where(
                torch.tensor([name in largest for name in names], device=self.device), top, sums
            )
        if self.pipeline_size > 1:
            source = dist.get_global_rank(self.pipeline_group, self.pipeline_size - 1)
            dist.broadcast(sums, src=source, group=self.pipeline_group)
        return dict(zip(names, sums.tolist(), strict=True))


def initialize(parallel: ParallelConfig, seed: int) -> Mesh:
    """Join the process group, build megatron's groups and seed every generator.

    The process group is torchrun's, or a group of one process. Seeds differ by data-parallel rank
    and pipeline stage and are equal in a tensor-parallel group, except for the generator of
    megatron's tensor-parallel regions, which differs on each of its ranks. A second call in the
    same process, possibly with other sizes, builds new groups. Collectives have
    `parallel.startup_timeout_s` until `Watchdog.end_start_up`.

    Raises UserError if the world size is not divisible by tensor * pipeline.
    """
    if parallel.tensor > 1:
        # megatron needs a single hardware queue, so that kernels that overlap communication and
        # computation start in launch order. CUDA reads the variable at start-up.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        cpu.install()
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    model_parallel = parallel.tensor * parallel.pipeline
    if world_size % model_parallel:
        raise UserError(
            f"{world_size} processes cannot be split into groups of "
            f"parallel.tensor={parallel.tensor} * parallel.pipeline={parallel.pipeline} = "
            f"{model_parallel}: launch a multiple of {model_parallel} (torchrun --nproc-per-node "
            f"{model_parallel} -m fastrlhf ...) or change the sizes"
        )
    device = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if on_gpu
        else torch.device("cpu")
    )
    if on_gpu:
        torch.cuda.set_device(device)
    _join("nccl" if on_gpu else "gloo", parallel.startup_timeout_s)
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        parallel.tensor,
        parallel.pipeline,
        distributed_timeout_minutes=parallel.startup_timeout_s / 60,
        create_gloo_process_groups=False,  # only megatron's own checkpoints use them
    )
    set_group_timeouts(parallel.startup_timeout_s)
    mesh = build_mesh(device, parallel)
    seed_generators(mesh, seed)
    return mesh


@contextlib.contextmanager
def joined(parallel: ParallelConfig, seed: int) -> Iterator[Mesh]:
    """Initialize a mesh for a `with` block and leave its groups at the end.

    After an exception the groups are left only if there is a single process: other ranks may be in
    a different collective.
    """
    mesh = initialize(parallel, seed)
    try:
        yield mesh
    except BaseException:
        if mesh.world_size == 1:
            finalize()
        raise
    finalize()


def _join(backend: str, timeout_s: float) -> None:
    if dist.is_initialized():
        return
    mark_groups_joined()
    session = rendezvous.join(timeout_s)
    # With the same prefix, a later mesh would read the addresses of this one's ranks.
    store = dist.PrefixStore(f"mesh{next(_mesh_number)}", session.store)
    dist.init_process_group(
        backend,
        store=store,
        rank=session.rank,
        world_size=session.world_size,
        timeout=datetime.timedelta(seconds=timeout_s),
    )


_mesh_number = itertools.count()


def build_mesh(device: torch.device, parallel: ParallelConfig) -> Mesh:
    """Return the mesh of megatron's groups, which must be initialized."""
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return Mesh(
        device=device,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tensor_rank=groups.tp.rank(),
        tensor_size=groups.tp.size(),
        pipeline_rank=groups.pp.rank(),
        pipeline_size=groups.pp.size(),
        data_rank=groups.dp.rank(),
        data_size=groups.dp.size(),
        sequence_parallel=parallel.sequence and parallel.tensor > 1,
        tensor_group=groups.tp,
        pipeline_group=groups.pp,
        data_group=groups.dp,
        groups=groups,
    )


def seed_generators(mesh: Mesh, seed: int) -> None:
    """Seed torch's, megatron's, NumPy's and Python's generators for this rank of the mesh."""
    own = rank_seed(seed, mesh.data_rank, mesh.pipeline_rank)
    torch.manual_seed(own)
    random.seed(own)
    np.random.seed(own % 2**32)
    model_parallel_cuda_manual_seed(own, force_reset_rng=True)


def rank_seed(seed: int, data_rank: int, pipeline_rank: int) -> int:
    """Return the seed of a rank: `seed` itself at the first coordinates, otherwise a hash.

    Runs with different seeds share no random stream.
    """
    if data_rank == pipeline_rank == 0:
        return seed
    return hashed_seed(seed, data_rank, pipeline_rank)


def hashed_seed(*parts: object) -> int:
    """Return a seed of 56 bits from a hash of `parts`.

    Similar parts do not share a random stream. 56 bits, because megatron adds to the seed and torch
    accepts at most 64.
    """
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:7], "little")


def finalize() -> None:
    """Leave the process groups; `initialize` may be called again, also with other sizes.

    Groups that a model still refers to keep their threads: see `parallel.exit`. Do not call it on
    several ranks after a failure: a group that ends waits for its collectives, which the other
    ranks may never join.
    """
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
    cpu.uninstall()
