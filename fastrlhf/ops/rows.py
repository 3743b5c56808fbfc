"""How the vocabulary ops see logits: a [B, L, V] view with unit stride in V, so `logits[:, :-1]` is never copied."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, overload

from torch import Tensor

from fastrlhf.ops import checks
from fastrlhf.ops.collectives import rank_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Elements of logits that a torch body upcasts at a time: 16 MiB in fp32, about the size of a last-level cache.
BLOCK_ELEMENTS = 1 << 22


def as_rows(x: Tensor) -> Tensor:
    """View x [..., V] as [B, L, V] with unit stride in V; copies only what no such view can express."""
    overlapping = any(
        stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape, strict=True)
    )
    if overlapping or (x.stride(-1) != 1 and x.shape[-1] > 1):
        x = x.contiguous()
    if x.dim() <= 3:
        return x[(None,) * (3 - x.dim())]
    return x.reshape(-1, *x.shape[-2:]) if x.numel() else x.new_empty(0, *x.shape[-2:])


@overload
def flat(x: Tensor) -> Tensor: ...
@overload
def flat(x: None) -> None: ...
def flat(x: Tensor | None) -> Tensor | None:
    """A per-token tensor [...] as contiguous [N]."""
    return None if x is None else x.contiguous().view(-1)


def row_blocks(rows: Tensor, columns: int) -> Iterator[tuple[slice, slice]]:
    """Slices of the two leading dimensions that together cover [B, L], each of about BLOCK_ELEMENTS elements."""
    batch, length = rows.shape[:2]
    row_step = max(1, min(length, BLOCK_ELEMENTS // max(columns, 1)))
    batch_step = max(1, BLOCK_ELEMENTS // max(columns * length, 1)) if row_step == length else 1
    for b in range(0, batch, batch_step):
        for r in range(0, length, row_step):
            yield slice(b, b + batch_step), slice(r, r + row_step)


def local_columns(
    width: int, vocab_start: int | None, vocab_size: int | None, group: ProcessGroup | None
) -> tuple[int, int]:
    """(first vocabulary index of this shard, how many of its `width` columns are real vocabulary)."""
    start = rank_of(group) * width if vocab_start is None else vocab_start
    checks.require(start >= 0, "vocab_start", start, "0 or more")
    if vocab_size is None:
        return start, width
    checks.require(vocab_size > 0, "vocab_size", vocab_size, "the true vocabulary size, above 0")
    columns = max(0, min(width, vocab_size - start))
    if group is None:
        checks.require(columns > 0, "vocab_start", start, f"less than vocab_size ({vocab_size})")
    return start, columns
