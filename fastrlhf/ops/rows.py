"""Views of logits as rows [B, L, V] and of per-token tensors as [N]; the shard of the vocabulary.

A row has unit stride in V and any strides in B and L, so `logits[:, :-1]` is never copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple, TypeAlias, TypeVar, overload

from torch import Tensor

from fastrlhf.ops import checks
from fastrlhf.ops.collectives import check_group, name_of, rank_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

RowSlice: TypeAlias = "slice[int, int, int]"
Group = TypeVar("Group", bound=tuple[Tensor | None, ...])

# Elements of logits that a torch implementation upcasts at a time: 16 MiB in fp32, about the size
# of a last-level cache.
BLOCK_ELEMENTS = 1 << 22


class VocabShard(NamedTuple):
    """The part of the vocabulary that one rank's logits hold."""

    vocab_start: int
    """Vocabulary index of the first column."""
    columns: int
    """Number of columns that are vocabulary; those after them are padding."""
    group_name: str
    """Name of the process group that the vocabulary is sharded over; "" if it is not."""

    @property
    def sharded(self) -> bool:
        return bool(self.group_name)


def vocab_shard(
    width: int, vocab_start: int | None, vocab_size: int | None, group: ProcessGroup | None
) -> VocabShard:
    """Return this rank's shard, `width` columns wide, of a vocabulary of `vocab_size`.

    `vocab_start` defaults to rank * width. Raises ValueError if the shard of an unsharded
    vocabulary holds padding only, or if a shard without `vocab_start` is exactly as wide as the
    complete vocabulary. A wider one is possible: rows of a padded table.
    """
    check_group(group)
    start = rank_of(group) * width if vocab_start is None else vocab_start
    checks.require(start >= 0, "vocab_start", start, "0 or more")
    if vocab_size is None:
        return VocabShard(start, width, name_of(group))
    checks.require(vocab_size > 0, "vocab_size", vocab_size, "the true vocabulary size, above 0")
    columns = max(0, min(width, vocab_size - start))
    if group is not None:
        cut = width != vocab_size or vocab_start is not None or group.size() == 1
        expected = (
            f"this rank's shard of the {vocab_size} columns, since there is a group of"
            f" {group.size()} (or group=None for all of them)"
        )
        checks.require(cut, "columns of this rank", width, expected)
    else:
        checks.require(columns > 0, "vocab_start", start, f"less than vocab_size ({vocab_size})")
    return VocabShard(start, columns, name_of(group))


def as_rows(x: Tensor) -> Tensor:
    """View x [..., V] as [B, L, V] with unit stride in V; copy only if no such view exists."""
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
@overload
def flat(x: Tensor | None) -> Tensor | None: ...
def flat(x: Tensor | None) -> Tensor | None:
    """Return a per-token tensor [...] as contiguous [N]."""
    return None if x is None else x.contiguous().view(-1)


def map_tensors(function: Callable[[Tensor | None], Tensor | None], group: Group) -> Group:
    """Apply `function` to each tensor of a NamedTuple such as SavedRow, None included."""
    return type(group)(*map(function, group))  # type: ignore[arg-type]  # the bound of a NamedTuple


def row_blocks(rows: Tensor, columns: int) -> Iterator[tuple[RowSlice, RowSlice]]:
    """Cover [B, L] with slices of both dimensions, each of about BLOCK_ELEMENTS logits."""
    batch, length = rows.shape[:2]
    row_step = max(1, min(length, BLOCK_ELEMENTS // max(columns, 1)))
    batch_step = max(1, BLOCK_ELEMENTS // max(columns * length, 1)) if row_step == length else 1
    for b in range(0, batch, batch_step):
        for r in range(0, length, row_step):
            yield slice(b, b + batch_step), slice(r, r + row_step)
