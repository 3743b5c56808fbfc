"""What the linear ops share: which rows count, how many go through at a time, and the GEMMs of one chunk of rows.

Left out on purpose: tiles along the vocabulary. A chunk of rows holds whole logits, so its gradient needs one pass.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import TypeVar, overload

import torch
from torch import Tensor

from fastrlhf.ops import checks, collectives
from fastrlhf.ops.dispatch import has_cpu_body
from fastrlhf.ops.masked import true_places

MIB = 1 << 20
BUDGET_VARIABLE = "FASTRLHF_LINEAR_BUDGET_MB"
# cuBLAS runs at full speed from some 4,096 rows on: dW [V, H] is read and written once a chunk, and so amortised.
GPU_ROWS = 4096
CPU_ROWS, CPU_BUDGET = 1024, 256 * MIB
KEPT_ON_CPU = 1024 * MIB

Item = TypeVar("Item")


def budget_override() -> int | None:
    """FASTRLHF_LINEAR_BUDGET_MB in bytes: how much of the logits may be held at a time (MiB, a fraction will do)."""
    text = os.environ.get(BUDGET_VARIABLE, "")
    if not text:
        return None
    try:
        megabytes = float(text)
    except ValueError:
        megabytes = float("nan")
    if not 0 < megabytes < float("inf"):
        raise ValueError(
            f"{BUDGET_VARIABLE}: got {text!r}, expected a number of MiB above 0, such as 512"
        )
    return max(1, int(megabytes * MIB))


def free_memory(device: torch.device) -> int:
    """Bytes that this process could still take on a GPU: the driver's free ones and the allocator's unused ones; for a
    graph (compiled or captured), which outlives what is free now, half of all.
    """
    if torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
        return torch.cuda.get_device_properties(device).total_memory // 2
    free, _ = torch.cuda.mem_get_info(device)  # asks the driver, waits for no kernel
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def chunk_rows(hidden: Tensor, tokens: int, width: int, shared: bool = False) -> int:
    """Rows in a chunk, for `tokens` rows whose logits are `width` columns wide in hidden's dtype.

    The override alone decides when it is set. Otherwise at most GPU_ROWS or CPU_ROWS, fewer where their logits would
    take more than a sixteenth of a GPU's free memory, or CPU_BUDGET. Equal chunks, not full ones and a remainder.
    `shared`: ranks must cut alike, so what differs from rank to rank (free memory) has no say; width 0: not known.
    """
    budget, on_gpu = budget_override(), hidden.is_cuda
    most = GPU_ROWS if on_gpu else CPU_ROWS
    row_bytes = width * hidden.element_size()
    if budget is not None and width:
        rows = budget // row_bytes
    elif on_gpu:
        rows = (
            most
            if shared or not width
            else min(most, free_memory(hidden.device) // 16 // row_bytes)
        )
    else:
        rows = min(most, CPU_BUDGET // row_bytes) if width else most
    parts = -(-tokens // max(1, rows))
    return -(-tokens // max(1, parts))


def logits_fit(hidden: Tensor, tokens: int, width: int) -> bool:
    """Whether to keep [tokens, width] logits: within the override, a quarter of a GPU's free memory, or 1 GiB."""
    budget = budget_override()
    if budget is None and not hidden.is_cuda:
        budget = KEPT_ON_CPU
    if budget is None:
        budget = free_memory(hidden.device) // 4
    return tokens * width * hidden.element_size() <= budget


def as_matrix(hidden: Tensor) -> Tensor:
    return hidden.reshape(-1, hidden.shape[-1])


def readable(mask: Tensor) -> bool:
    """Whether the host can read the mask without waiting for a device."""
    return not mask.is_cuda


class CountedRows:
    """The rows of hidden [N, H] that `mask` [N] counts, in chunks.

    Those that do not count are never touched, where their number is known without waiting: on a CPU always, on a GPU
    when the caller says how many count (`num_counted`, or a number above). Otherwise all rows of a
    GPU go through, those
    masked out as zeros.
    """

    def __init__(
        self,
        hidden_NH: Tensor,
        mask_N: Tensor | None,
        width: int,
        shared: bool = False,
        num_counted: int | None = None,
    ) -> None:
        self.hidden, self.mask, self.index = hidden_NH, mask_N, None
        if mask_N is not None and readable(mask_N):
            self.mask = None
            self.index = None if bool(mask_N.all()) else true_places(mask_N, None)
        elif mask_N is not None and num_counted is not None and num_counted < len(hidden_NH):
            self.index = true_places(
                mask_N, num_counted
            )  # the mask stays, since `num_counted` may be more than there are
        self.count = len(hidden_NH if self.index is None else self.index)
        expected = f"no less than the mask's True positions ({self.count})"
        checks.require(
            num_counted is None or self.mask is not None or self.count <= num_counted,
            "num_counted",
            num_counted,
            expected,
        )
        self.step = chunk_rows(hidden_NH, self.count, width, shared)

    def __iter__(self) -> Iterator[slice]:
        for start in range(0, self.count, max(1, self.step)):
            yield slice(start, min(start + self.step, self.count))

    @overload
    def take(self, x: Tensor, at: slice) -> Tensor: ...
    @overload
    def take(self, x: None, at: slice) -> None: ...
    def take(self, x: Tensor | None, at: slice) -> Tensor | None:
        """Those of x [N, ...] that chunk `at` holds."""
        if x is None:
            return None
        return x[at] if self.index is None else x[self.index[at]]

    def put(self, total: Tensor, at: slice, x: Tensor) -> None:
        """total [..., N] at the chunk's rows = x [..., rows]."""
        total[..., at if self.index is None else self.index[at]] = x

    def chunk(self, at: slice) -> Tensor:
        """The chunk's hidden states; rows masked out as zeros, or a NaN in one would reach dW as 0 * NaN."""
        hidden, mask = self.take(self.hidden, at), self.take(self.mask, at)
        return hidden if mask is None else hidden.masked_fill(~mask[:, None], 0.0)

    def largest(self, x: Tensor) -> Tensor:
        """max |x| [N] over the rows that count, fp32, 0-dim; there must be any."""
        everything = slice(0, self.count)
        size, mask = self.take(x, everything).float().abs(), self.take(self.mask, everything)
        return (size if mask is None else torch.where(mask, size, 0.0)).amax()


def reused(like: Tensor, rows: int, columns: int) -> Tensor:
    """An uninitialised [rows, columns] of like's dtype and device, a CPU's on pages that an earlier call gave back:
    clearing fresh ones costs a loss about as much as a tenth of its GEMMs.
    """
    if has_cpu_body("reused", like):
        return torch.ops.fastrlhf_cpu.reused(like, rows, columns)
    return like.new_empty(rows, columns)


def head(hidden: Tensor, weight_VH: Tensor, bias_V: Tensor | None, out: Tensor) -> Tensor:
    """Logits of a chunk, into `out`."""
    if bias_V is None:
        return torch.mm(hidden, weight_VH.T, out=out)
    return torch.addmm(bias_V, hidden, weight_VH.T, out=out)


def unit_of(rows: CountedRows, *upstream: Tensor | None, at_least: float = 0.0) -> Tensor | None:
    """The power of two just below the largest |upstream| [N] of a row that counts, or 1; None in fp32 and wider.

    Half-precision gradients of the logits are computed divided by it, and multiplied by it after the GEMMs: an
    upstream of 1 / denominator would else drown in fp16's 6e-8. A power of two, so that nothing is rounded.
    """
    if rows.hidden.element_size() > 2:
        return None
    largest = torch.full((), at_least, device=rows.hidden.device)
    for x in upstream if rows.count else ():
        if x is not None:
            largest = torch.maximum(largest, rows.largest(x))
    return torch.where(largest > 0, largest.log2().floor().exp2(), 1.0)


def divided(x: Tensor | None, unit: Tensor | None) -> Tensor | None:
    return x if x is None or unit is None else x / unit


def scaled(x: Tensor, factor: Tensor | None, dtype: torch.dtype, spare: bool = False) -> Tensor:
    """x * factor in fp32 or wider, then to `dtype`; 1-dim, since a 0-dim factor would be rounded to x's fp16 first.

    `spare`: no backward reads x again. On a CPU it is handed on where the factor is the usual 1, which can be read
    there without waiting; on a GPU it is overwritten, since a second dW may not fit.
    """
    if factor is None:
        return x.to(dtype)
    traced = type(x) is not Tensor  # it has no values, and a graph may run more than once
    if spare and not traced and x.dtype == dtype:
        if x.is_cuda:
            return x.detach().mul_(factor.reshape(1))
        if float(factor) == 1.0:
            return x.detach()
    return (x * factor.reshape(1)).to(dtype)


def saved_are_spare() -> bool:
    """In a backward: whether this is the only one through its graph, so that what was saved is read no more."""
    keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return keeps_graph is not None and not keeps_graph()


class Gradients:
    """dh [N, H] in hidden's dtype, dW [V, H] and db [V] in the compute dtype; empty where not needed."""

    def __init__(self, rows: CountedRows, weight_VH: Tensor, needs: Iterable[bool]) -> None:
        hidden_NH, dtype = rows.hidden, checks.compute_dtype(rows.hidden)
        self.rows, self.needs = rows, tuple(needs)
        # zeros where rows are left out; otherwise each row is written once
        make = torch.empty if rows.index is None else torch.zeros
        shape = hidden_NH.shape if self.needs[0] else (0,)
        self.hidden = make(shape, dtype=hidden_NH.dtype, device=hidden_NH.device)
        self.weight = hidden_NH.new_zeros(0, dtype=dtype)
        if self.needs[1]:
            # the first chunk's product is written, not added: no pass to zero it
            shape = weight_VH.shape
            self.weight = (
                reused(self.weight, *shape) if rows.count else self.weight.new_zeros(shape)
            )
        self.bias = torch.zeros(
            weight_VH.shape[0] if self.needs[2] else 0, dtype=dtype, device=weight_VH.device
        )

    def add(self, at: slice, d_logits: Tensor, hidden_chunk: Tensor, weight_VH: Tensor) -> None:
        if self.needs[0]:
            if self.rows.index is None:
                torch.mm(d_logits, weight_VH, out=self.hidden[at])
            else:
                self.hidden[self.rows.index[at]] = d_logits @ weight_VH
        if self.needs[1]:
            _add_product_(self.weight, d_logits, hidden_chunk, keep=at.start > 0)
        if self.needs[2]:
            self.bias += d_logits.sum(0, dtype=self.bias.dtype)

    def reduced(self, group_name: str) -> tuple[Tensor, Tensor, Tensor]:
        """Sum dh over the vocabulary's shards; dW and db belong to this shard alone."""
        if self.needs[0]:
            collectives.reduce_sum_(self.hidden, group_name)
        return self.hidden, self.weight, self.bias


def _add_product_(total: Tensor, left: Tensor, right: Tensor, keep: bool) -> None:
    """total (fp32) = left^T right + (what it held, if `keep`), never rounding a product to the inputs' dtype: that
    would bias training.
    """
    if left.is_cuda and left.dtype != total.dtype:
        torch.addmm(total, left.T, right, beta=int(keep), out_dtype=total.dtype, out=total)
    else:
        total.addmm_(left.T.to(total.dtype), right.to(total.dtype), beta=int(keep))


def one_behind(items: Iterator[Item]) -> Iterator[Item]:
    """Yield each item once the next one is made, so that its collective runs beside the next one's GEMM."""
    for previous in items:
        for item in items:
            yield previous
            previous = item
        yield previous
