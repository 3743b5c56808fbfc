"""The mesh of ranks: start-up under torchrun (NCCL or gloo), megatron's process groups, and the few collectives
trainers use.

Ranks are laid out tensor-fastest, then data, then pipeline (megatron's "tp-cp-ep-dp-pp" order). Every other package is
handed a `Mesh`; none reads megatron's global state.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
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
from fastrlhf.parallel import cpu
from fastrlhf.parallel.exit import mark_groups_joined

Group = dist.ProcessGroup


@dataclass(frozen=True)
class Mesh:
    """This rank's place in the mesh and its groups. Sizes multiply to the world size (context parallelism is 1)."""

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
    """All of megatron's groups, for the megatron classes that take them."""

    @property
    def is_first_stage(self) -> bool:
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline_rank == self.pipeline_size - 1

    @property
    def vocab_group(self) -> Group | None:
        """The group over which the vocabulary is sharded; None when it is whole on this rank."""
        return self.tensor_group if self.tensor_size > 1 else None

    def sum_over_data(self, value: torch.Tensor) -> torch.Tensor:
        """Sums `value` over the data-parallel ranks, in place; returns it."""
        if self.data_size > 1:
            dist.all_reduce(value, group=self.data_group)
        return value

    def max_over_data(self, value: torch.Tensor) -> torch.Tensor:
        """Maximum of `value` over the data-parallel ranks, in place; returns it."""
        if self.data_size > 1:
            dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self.data_group)
        return value

    def from_last_stage(self, tensor: torch.Tensor | None) -> torch.Tensor:
        """Gives every pipeline stage the last stage's tensor (other stages pass None; shape and dtype travel along)."""
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
        """Rows of all data-parallel ranks, [n, ...] -> [data_size * n, ...], in rank order; same shape on every
        rank.
        """
        if self.data_size == 1:
            return tensor
        # gloo gathers no bool tensors.
        row = tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor.contiguous()
        parts = [torch.empty_like(row) for _ in range(self.data_size)]
        dist.all_gather(parts, row, group=self.data_group)
        return torch.cat(parts).to(tensor.dtype)

    def sum_metrics(
        self, rows: Sequence[Mapping[str, torch.Tensor | float]], largest: Sequence[str] = ()
    ) -> dict[str, float]:
        """Adds up per-micro-batch metrics of the last stage over micro-batches and data-parallel ranks, for every rank.

        Losses are sums over a globally known denominator, so their sum is the loss of the global batch whatever the
        layout. A metric that a micro-batch lacks counts as 0. Those named in `largest` are maxima instead.
        """
        names = sorted({name for row in rows for name in row})
        if self.world_size > self.tensor_size:
            # Stages before the last have no rows, and data-parallel ranks may differ in kinds of micro-batches.
            everyone: list[list[str]] = [[] for _ in range(self.world_size)]
            dist.all_gather_object(everyone, names)
            names = sorted({name for some in everyone for name in some})
        table = torch.zeros(len(rows), len(names), dtype=torch.float64, device=self.device)
        for i, row in enumerate(rows):
            for j, name in enumerate(names):
                table[i, j] = row.get(name, 0.0)
        sums = self.sum_over_data(table.sum(0))
        if largest:
            top = self.max_over_data(table.max(0).values if rows else torch.zeros_like(sums))
            sums = torch.where(
                torch.tensor([name in largest for name in names], device=self.device), top, sums
            )
        sums = self.from_last_stage(sums if self.is_last_stage else None)
        return dict(zip(names, sums.tolist(), strict=True))


def initialize(parallel: ParallelConfig, seed: int) -> Mesh:
    """Joins the process group (torchrun's, or a group of one), builds megatron's groups and seeds every generator.

    Dropout and sampling seeds differ by data-parallel rank and pipeline stage and agree inside a tensor-parallel group,
    but for megatron's tensor-parallel region, whose generator differs on each of its ranks.

    May be called again in the same process, also with other sizes: the groups are built anew.
    Raises `UserError` when the world size is not divisible by tensor * pipeline.
    """
    if parallel.tensor > 1:
        # megatron asks for one queue of GPU work, in whose order communication overlaps with computation; CUDA reads
        # the variable when it starts.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        cpu.install()
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    model_parallel = parallel.tensor * parallel.pipeline
    if world_size % model_parallel:
        raise UserError(
            f"{world_size} processes cannot be split into groups of parallel.tensor={parallel.tensor} * "
            f"parallel.pipeline={parallel.pipeline} = {model_parallel}: launch a multiple of {model_parallel} "
            f"(torchrun --nproc-per-node {model_parallel} -m fastrlhf ...) or change the sizes"
        )
    device = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if on_gpu
        else torch.device("cpu")
    )
    if on_gpu:
        torch.cuda.set_device(device)
    timeout = datetime.timedelta(seconds=parallel.timeout_s)
    _join("nccl" if on_gpu else "gloo", timeout)
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        parallel.tensor,
        parallel.pipeline,
        distributed_timeout_minutes=parallel.timeout_s / 60,
        create_gloo_process_groups=False,  # for megatron's own checkpoints, which are not used
    )
    mesh = _describe(device, parallel)
    seed_generators(mesh, seed)
    return mesh


@contextlib.contextmanager
def joined(parallel: ParallelConfig, seed: int) -> Iterator[Mesh]:
    """Initialize a mesh for a block, and leave its groups at the end.

    After an exception only a single process leaves them: with several, the others may be anywhere.
    """
    mesh = initialize(parallel, seed)
    try:
        yield mesh
    except BaseException:
        if mesh.world_size == 1:
            finalize()
        raise
    finalize()


def _join(backend: str, timeout: datetime.timedelta) -> None:
    if dist.is_initialized():
        return
    mark_groups_joined()
    if "RANK" in os.environ:
        store, rank, world_size = _rendezvous()
        # torchrun's store outlives a mesh, and with --max-restarts the processes: under one prefix, the next mesh would
        # read the addresses of the last one's ranks.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"attempt{attempt}.mesh{next(_joined)}", store)
    else:
        store, rank, world_size = dist.HashStore(), 0, 1
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


_joined = itertools.count()


@functools.cache
def _rendezvous() -> tuple[dist.Store, int, int]:
    """torchrun's store, this rank and the world size. Kept: a second server could not have the same port."""
    return next(dist.rendezvous("env://"))


def _describe(device: torch.device, parallel: ParallelConfig) -> Mesh:
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
    """Seeds torch's, megatron's, NumPy's and Python's generators for this rank's place in the mesh."""
    place = place_seed(seed, mesh.data_rank, mesh.pipeline_rank)
    torch.manual_seed(place)
    random.seed(place)
    np.random.seed(place % 2**32)
    model_parallel_cuda_manual_seed(place, force_reset_rng=True)


def place_seed(seed: int, data_rank: int, pipeline_rank: int) -> int:
    """The seed of a place in the mesh: `seed` itself at the first, elsewhere a hash, so that no two runs of different
    seeds share a stream.
    """
    if data_rank == pipeline_rank == 0:
        return seed
    return hashed_seed(seed, data_rank, pipeline_rank)


def hashed_seed(*parts: object) -> int:
    """A seed in 56 bits (megatron adds to it, and torch takes no more than 64) that other parts, however near, share no
    stream with.
    """
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:7], "little")


def finalize() -> None:
    """Leaves the process groups (a second `initialize` may follow, with other sizes).

    Groups that a model still refers to keep their threads: see `parallel.exit`. Not for several ranks after a failure:
    a group that ends waits for its collectives, and the other ranks may never join those.
    """
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
    cpu.uninstall()
