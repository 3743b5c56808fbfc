"""Deterministic micro-batches for data-parallel training, resumable at any sample under any layout.

Every rank computes the same permutation of an epoch from (seed, epoch). Global batch b is permutation[b*G : (b+1)*G],
cut into micro-batches in order; data-parallel rank r takes the r-th contiguous block of them. So neither the samples
of a step nor the composition of a micro-batch depends on the data-parallel size. With a token budget the micro-batches
are packed and balanced over the ranks instead (packing.py): the samples of a step stay the same, what shares a
micro-batch does not. Left out on purpose: worker processes (samples are already tokens in memory, and packing a
micro-batch takes well under a millisecond).
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import numpy as np

from fastrlhf.data import packing
from fastrlhf.errors import UserError

log = logging.getLogger(__name__)

Sample = TypeVar("Sample")
MicroBatch = TypeVar("MicroBatch")


class Loader(Generic[Sample, MicroBatch]):
    """Iterate over steps; each is the list of this rank's collated micro-batches.

    `epochs=None` never ends. `drop_last=True` leaves out the samples of an epoch that do not fill a global batch
    (others each epoch, as each is shuffled anew); with False the last step is short, and a rank may get fewer
    micro-batches, even none. Iterating goes on from the current state; make a new Loader to start again.

    `max_tokens` replaces `micro_batch_size`: a micro-batch has as many samples as fit under it by `cost`, the tokens of
    a sample; every rank has a micro-batch at least in a whole step, and ranks may have different numbers of them.
    `order(seed, epoch, shuffle)` gives an epoch's indices, one for each sample, where a permutation is not what is
    wanted (blends).
    """

    def __init__(
        self,
        dataset: Sequence[Sample],
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
        unit = micro_batch_size if max_tokens is None else None
        _check_sizes(len(dataset), global_batch_size, unit, data_size, drop_last)
        if not 0 <= data_rank < data_size:
            raise ValueError(f"data_rank {data_rank} is outside 0..{data_size - 1}")
        self.dataset = dataset
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.micro_batches_per_rank = global_batch_size // (
            micro_batch_size * data_size
        )  # without max_tokens
        self.data_rank = data_rank
        self.data_size = data_size
        self.max_tokens = max_tokens
        self.cost = cost
        self.seed = seed
        self.collate = collate
        self.shuffle = shuffle
        self.epochs = epochs
        self._own_order = order
        self.drop_last = drop_last
        self.epoch = 0
        self.cursor = 0  # samples of this epoch already given out, over all ranks
        self._permutation: tuple[int, np.ndarray] | None = None
        self._efficiency: float | None = None

    def __len__(self) -> int:
        """Steps in a whole epoch."""
        whole, rest = divmod(len(self.dataset), self.global_batch_size)
        return whole if self.drop_last or rest == 0 else whole + 1

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        while True:
            left = len(self.dataset) - self.cursor
            if left < (self.global_batch_size if self.drop_last else 1):
                self.epoch, self.cursor = self.epoch + 1, 0
            if self.epochs is not None and self.epoch >= self.epochs:
                return
            indices = self._order()[self.cursor : self.cursor + self.global_batch_size]
            # Moved on before the batch is handed out: a checkpoint written in the loop's body counts this step as done.
            self.cursor += len(indices)
            yield [
                self.collate([self.dataset[int(i)] for i in micro]) for micro in self._own(indices)
            ]

    def _own(self, indices: np.ndarray) -> list[np.ndarray]:
        if self.max_tokens is not None and self.cost is not None:
            lengths = [self.cost(self.dataset[int(i)]) for i in indices]
            shares = packing.share(lengths, self.data_size, self.max_tokens)
            self._packed(lengths, shares, self.max_tokens)
            return [indices[micro] for micro in shares[self.data_rank]]
        size = self.micro_batch_size
        micro_batches = [indices[start : start + size] for start in range(0, len(indices), size)]
        first = self.data_rank * self.micro_batches_per_rank
        return micro_batches[first : first + self.micro_batches_per_rank]

    def _packed(
        self, lengths: Sequence[int], shares: Sequence[Sequence[Sequence[int]]], max_tokens: int
    ) -> None:
        first = self._efficiency is None
        self._efficiency = packing.efficiency(lengths, shares, max_tokens)
        if first:
            log.info(
                "packing: %d samples of %d tokens in %d micro-batches of at most %d, %.1f%% of their room used",
                len(lengths),
                sum(lengths),
                sum(len(micro_batches) for micro_batches in shares),
                max_tokens,
                100 * self._efficiency,
            )

    def metrics(self) -> dict[str, float]:
        """After the last step, over all ranks: epoch, the passes over the data made, and with a token budget
        packing_efficiency, the share of the micro-batches' room that tokens fill.
        """
        packing = {} if self._efficiency is None else {"packing_efficiency": self._efficiency}
        return {"epoch": self.epoch + self.cursor / len(self.dataset), **packing}

    def _order(self) -> np.ndarray:
        if self._permutation is None or self._permutation[0] != self.epoch:
            self._permutation = (self.epoch, self._drawn(self.epoch))
        return self._permutation[1]

    def _drawn(self, epoch: int) -> np.ndarray:
        if self._own_order is not None:
            return self._own_order(self.seed, epoch, self.shuffle)
        return permutation(len(self.dataset), self.seed, epoch, self.shuffle)

    def state_dict(self) -> dict[str, Any]:
        """Where the next step starts, counted in samples: it holds for any data-parallel, micro- and global batch
        size.
        """
        return {
            "epoch": self.epoch,
            "cursor": self.cursor,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "samples": len(self.dataset),
            # Another blend of the same sources would go on elsewhere in silence.
            "order": 0 if self._own_order is None else zlib.crc32(self._drawn(0).tobytes()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken; UserError when the data set, the seed or the order is another one."""
        here = self.state_dict()
        for name in ("samples", "seed", "shuffle", "order"):
            if state[name] != here[name]:
                raise UserError(
                    f"cannot resume the data order: the checkpoint has {name} {state[name]}, this run {here[name]}; "
                    "use the same data and train.seed, or start a new output_dir"
                )
        self.epoch, self.cursor = state["epoch"], state["cursor"]


def permutation(n: int, seed: int, epoch: int, shuffle: bool = True) -> np.ndarray:
    """The order of n samples in one epoch, int64 [n]; the same on every machine.

    Sorting raw Philox words keeps it the same under every NumPy too: its bit streams are frozen, its shuffles are not.
    """
    if not shuffle:
        return np.arange(n)
    words = np.random.Philox(key=np.array([seed % 2**64, epoch], dtype=np.uint64)).random_raw(n)
    return np.argsort(words, kind="stable")


def _check_sizes(
    samples: int, global_batch: int, micro_batch: int | None, data_size: int, drop_last: bool
) -> None:
    """`micro_batch` None: micro-batches are cut by tokens, so that a rank needs one sample and no division is exact."""
    if min(global_batch, micro_batch or 1, data_size) < 1:
        raise UserError(
            f"batch sizes must be at least 1: global batch {global_batch}, micro-batch {micro_batch}"
        )
    if micro_batch is None and global_batch < data_size:
        raise UserError(
            f"the global batch size {global_batch} is smaller than the data-parallel size {data_size}; every rank "
            f"needs a sample: use {data_size} or more"
        )
    unit = (micro_batch or 1) * data_size
    if micro_batch is not None and global_batch % unit:
        below, above = global_batch // unit * unit, -(-global_batch // unit) * unit
        use = f"{above}" if below == 0 else f"{below} or {above}"
        raise UserError(
            f"the global batch size {global_batch} is not divisible by micro-batch size {micro_batch} x data-parallel "
            f"size {data_size} = {unit}; use {use}"
        )
    if samples == 0:
        raise UserError(
            "the data set is empty; check its path, and the counts of dropped records above"
        )
    if drop_last and samples < global_batch:
        raise UserError(
            f"the data set has {samples} samples, fewer than the global batch size {global_batch}; add data, or set "
            f"train.global_batch_size (of PPO: ppo.batch_size) to {samples} or less"
        )
