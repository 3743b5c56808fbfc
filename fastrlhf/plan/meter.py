"""Bytes that a piece of code holds, counted on fake tensors: no memory is used for them."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Tensor = torch.Tensor


class StorageMeter(TorchDispatchMode):
    """A block in which the bytes of all storages that operators create are counted.

    `held` is what is alive now and `peak` the most that was alive at once. Storages that existed
    before the block are not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held = 0
        self.peak = 0
        self._known: set[int] = set()

    def ignore(self, tensors: Sequence[Tensor]) -> None:
        """Do not count the storages of `tensors`, which must outlive the block."""
        self._known.update(tensor.untyped_storage()._cdata for tensor in tensors)

    def __torch_dispatch__(
        self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict | None = None
    ) -> object:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        size = storage.nbytes()
        self.held += size
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.held -= size

    def mark(self) -> int:
        """Return the bytes held now, and restart the peak from there."""
        self.peak = self.held
        return self.held


@contextlib.contextmanager
def metered() -> Iterator[StorageMeter]:
    """Run the block on fake tensors and yield the meter of what it holds."""
    # Tensors made before the block (seeds, tables) may be real ones.
    with FakeTensorMode(allow_non_fake_inputs=True), StorageMeter() as meter:
        yield meter
