"""Deterministic micro-batches for data-parallel training, resumable at any sample with any layout.

Every rank computes the same permutation of an epoch from (seed, epoch). Global batch b is
permutation[b*G : (b+1)*G], cut into micro-batches in order; data-parallel rank r takes the r-th
contiguous block of them. So neither the samples of a step nor the composition of a micro-batch
depends on the data-parallel size. With a token budget the micro-batches are packed and balanced
over the ranks instead (packing.py): the samples of a step stay the same, the composition of a
micro-batch does not.

Not supported: worker processes. Samples are already tokens in memory, and packing a micro-batch
takes well under a millisecond.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from fastrlhf.data import packing
from fastrlhf.errors import UserError

logger = logging.getLogger(__name__)

Sample = TypeVar("Sample")
SampleCo = TypeVar("SampleCo", covariant=True)
MicroBatch = TypeVar("MicroBatch")


class Dataset(Protocol[SampleCo]):
    """Samples by index, from 0 to len - 1: a list, or a class that makes each sample on demand."""

    def __len__(self) -> int:
        """Return the number of samples."""

    def __getitem__(self, index: int) -> SampleCo:
        """Return sample `index`."""


class Loader(Generic[Sample, MicroBatch]):
    """An iterator over steps; each step is the list of this rank's collated micro-batches.

    - `epochs`: None iterates without end.
    - `drop_last`: True drops the samples of an epoch that do not fill a global batch (different
      ones in each epoch, since each is shuffled). With False the last step of an epoch is short,
      and a rank may get fewer micro-batches in it, even none.
    - `max_tokens`: replaces `micro_batch_size`. A micro-batch holds as many samples as fit, where
      `cost` returns the tokens of a sample. In a full step every rank has at least one micro-batch;
      the number may differ between ranks.
    - `order`: a function of (seed, epoch, shuffle) that returns an epoch's indices, as many as
      there are samples. It replaces the permutation (used for blends).

    Iteration continues from the current state; make a new Loader to start again.
    """

    def __init__(
        self,
        dataset: Dataset[Sample],
        *,
        global_batch_size: int,
        micro_batch_size: int,
        data_rank: int,
        data_size: int,
        seed: int,
        collate: Callable[[list[Sample]], MicroBatch],
        shuffle: bool = True,
        epochs: int | None = None,
        drop_last: bool = True,
        max_tokens: int | None = None,
        cost: Callable[[Sample], int] | None = None,
        order: Callable[[int, int, bool], np.ndarray] | None = None,
    ) -> None:
        if (max_tokens is None) != (cost is None):
            raise ValueError("max_tokens and cost go together: give both, or neither")
        size = micro_batch_size if max_tokens is None else None
        _check_sizes(len(dataset), global_batch_size, size, data_size, drop_last)
        if not 0 <= data_rank < data_size:
            raise ValueError(f"data_rank {data_rank} is outside 0..{data_size - 1}")
        self.dataset = dataset
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        # Used without max_tokens only.
        self.micro_batches_per_rank = global_batch_size // (micro_batch_size * data_size)
        self.data_rank = data_rank
        self.data_size = data_size
        self.max_tokens = max_tokens
        self.cost = cost
        self.seed = seed
        self.collate = collate
        self.shuffle = shuffle
        self.epochs = epochs
        self.order = order
        self.drop_last = drop_last
        self.epoch = 0
        self.cursor = 0  # samples of this epoch already used, over all ranks
        self._permutation: tuple[int, np.ndarray] | None = None
        self._efficiency: float | None = None

    def __len__(self) -> int:
        """Return the number of steps in an epoch."""
        full, rest = divmod(len(self.dataset), self.global_batch_size)
        return full if self.drop_last or rest == 0 else full + 1

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        while True:
            left = len(self.dataset) - self.cursor
            if left < (self.global_batch_size if self.drop_last else 1):
                self.epoch, self.cursor = self.epoch + 1, 0
            if self.epochs is not None and self.epoch >= self.epochs:
                return
            indices = self._current_order()[self.cursor : self.cursor + self.global_batch_size]
            # Advanced before the yield, so that a checkpoint written in the body of the training
            # loop counts this step as done.
            self.cursor += len(indices)
            yield [
                self.collate([self.dataset[int(i)] for i in micro])
                for micro in self._micro_batches(indices)
            ]

    def _micro_batches(self, indices: np.ndarray) -> list[np.ndarray]:
        """Return the indices of each of this rank's micro-batches of a global batch."""
        if self.max_tokens is not None and self.cost is not None:
            lengths = [self.cost(self.dataset[int(i)]) for i in indices]
            by_rank = packing.assign_micro_batches(lengths, self.data_size, self.max_tokens)
            self._record_efficiency(lengths, by_rank, self.max_tokens)
            return [indices[micro] for micro in by_rank[self.data_rank]]
        size = self.micro_batch_size
        micro_batches = [indices[start : start + size] for start in range(0, len(indices), size)]
        first = self.data_rank * self.micro_batches_per_rank
        return micro_batches[first : first + self.micro_batches_per_rank]

    def _record_efficiency(
        self, lengths: Sequence[int], by_rank: Sequence[Sequence[Sequence[int]]], max_tokens: int
    ) -> None:
        first = self._efficiency is None
        self._efficiency = packing.efficiency(lengths, by_rank, max_tokens)
        if first:
            logger.info(
                "packing: %d samples with %d tokens in total, in %d micro-batches "
                "of at most %d tokens, %.1f%% full",
                len(lengths),
                sum(lengths),
                sum(len(micro_batches) for micro_batches in by_rank),
                max_tokens,
                100 * self._efficiency,
            )

    def metrics(self) -> dict[str, float]:
        """Return the metrics of the last step, over all ranks.

        `epoch` is the number of passes over the data. With a token budget, `packing_efficiency` is
        the share of the budget of all micro-batches that is filled with tokens.
        """
        packing = {} if self._efficiency is None else {"packing_efficiency": self._efficiency}
        return {"epoch": self.epoch + self.cursor / len(self.dataset), **packing}

    def _current_order(self) -> np.ndarray:
        if self._permutation is None or self._permutation[0] != self.epoch:
            self._permutation = (self.epoch, self._draw_order(self.epoch))
        return self._permutation[1]

    def _draw_order(self, epoch: int) -> np.ndarray:
        if self.order is not None:
            return self.order(self.seed, epoch, self.shuffle)
        return permutation(len(self.dataset), self.seed, epoch, self.shuffle)

    def state_dict(self) -> dict[str, Any]:
        """Return where the next step starts.

        It is counted in samples, so it is valid for any data-parallel size, micro-batch size and
        global batch size.
        """
        return {
            "epoch": self.epoch,
            "cursor": self.cursor,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "samples": len(self.dataset),
            # With another blend of the same sources, a resumed run would silently use other
            # samples.
            "order": 0 if self.order is None else zlib.crc32(self._draw_order(0).tobytes()),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume where `state` was taken.

        Raises UserError if the data set, the seed, shuffling or the order differs.
        """
        here = self.state_dict()
        for name in ("samples", "seed", "shuffle", "order"):
            if state[name] != here[name]:
                raise UserError(
                    f"cannot resume the data order: the checkpoint has {name} {state[name]}, "
                    f"this run {here[name]}; "
                    "use the same data and train.seed, or start a new output_dir"
                )
        self.epoch, self.cursor = state["epoch"], state["cursor"]


def permutation(n: int, seed: int, epoch: int, shuffle: bool = True) -> np.ndarray:
    """Return the order of n samples in one epoch, int64 [n]; the same on every machine.

    It is the argsort of raw Philox words. NumPy keeps its bit streams stable between versions, but
    not its shuffles.
    """
    if not shuffle:
        return np.arange(n)
    words = np.random.Philox(key=np.array([seed % 2**64, epoch], dtype=np.uint64)).random_raw(n)
    return np.argsort(words, kind="stable")


def _check_sizes(
    samples: int, global_batch: int, micro_batch: int | None, data_size: int, drop_last: bool
) -> None:
    """Raise UserError if the batch sizes are impossible for `samples` and `data_size`.

    `micro_batch` is None if micro-batches are cut by tokens. Then each rank needs only one sample,
    and no size has to divide another.
    """
    if min(global_batch, micro_batch or 1, data_size) < 1:
        raise UserError(
            "batch sizes must be at least 1: "
            f"global batch {global_batch}, micro-batch {micro_batch}"
        )
    if micro_batch is None and global_batch < data_size:
        raise UserError(
            f"the global batch size {global_batch} is smaller than the data-parallel size "
            f"{data_size}; every rank needs a sample: use {data_size} or more"
        )
    unit = (micro_batch or 1) * data_size
    if micro_batch is not None and global_batch % unit:
        below, above = global_batch // unit * unit, -(-global_batch // unit) * unit
        use = f"{above}" if below == 0 else f"{below} or {above}"
        raise UserError(
            f"the global batch size {global_batch} is not divisible by "
            f"micro-batch size {micro_batch} x data-parallel size {data_size} = {unit}; use {use}"
        )
    if samples == 0:
        raise UserError(
            "the data set is empty; check its path, and the counts of dropped records above"
        )
    if drop_last and samples < global_batch:
        raise UserError(
            f"the data set has {samples} samples, fewer than the global batch size {global_batch}; "
            "add data, or set train.global_batch_size (of PPO: ppo.batch_size) "
            f"to {samples} or less"
        )
