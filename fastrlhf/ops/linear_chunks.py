"""Shared parts of the linear ops: the rows that count, their chunks, and the GEMMs of one chunk.

Not supported: tiles along the vocabulary. A chunk of rows holds complete logits, so that their
gradient needs one pass.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple, TypeVar, overload

import torch
from torch import Tensor

from fastrlhf.ops import checks, collectives
from fastrlhf.ops.dispatch import has_cpu_implementation
from fastrlhf.ops.masked import true_places
from fastrlhf.ops.rows import RowSlice
from fastrlhf.ops.scalars import Number

MIB = 1 << 20
BUDGET_VARIABLE = "FASTRLHF_LINEAR_BUDGET_MB"
# cuBLAS reaches full speed at about 4,096 rows: dW [V, H], read and written once a chunk, is
# amortized.
GPU_ROWS = 4096
CPU_ROWS, CPU_BUDGET = 1024, 256 * MIB
KEPT_ON_CPU = 1024 * MIB

Item = TypeVar("Item")


class LinearHead(NamedTuple):
    """Operands of the LM head: logits = hidden @ weight.T + bias."""

    hidden: Tensor
    """[..., H]"""
    weight: Tensor
    """[V, H]"""
    bias: Tensor | None
    """[V]"""

    def chunk_logits(self, hidden: Tensor, out: Tensor) -> Tensor:
        """Write the logits of a chunk of hidden states into `out`."""
        if self.bias is None:
            return torch.mm(hidden, self.weight.T, out=out)
        return torch.addmm(self.bias, hidden, self.weight.T, out=out)


class LinearTokens(NamedTuple):
    """Labels of the rows of a LinearHead, and which of them count."""

    labels: Tensor
    mask: Tensor | None
    num_counted: int | None
    """The number of True positions of the mask, or a larger one; None if unknown."""


def budget_override() -> int | None:
    """Return FASTRLHF_LINEAR_BUDGET_MB in bytes: how much of the logits may be held at a time.

    The variable is in MiB, a fraction is allowed; None if it is not set. Raises ValueError on
    other text.
    """
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
    """Return the bytes that this process can still allocate on a GPU.

    These are the driver's free bytes and the allocator's unused ones. For a graph (compiled or
    captured), which outlives what is free now, half of the GPU's memory.
    """
    if torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
        return torch.cuda.get_device_properties(device).total_memory // 2
    free, _ = torch.cuda.mem_get_info(device)  # asks the driver, waits for no kernel
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def chunk_rows(hidden: Tensor, tokens: int, width: int, shared: bool = False) -> int:
    """Return the rows of a chunk, for `tokens` rows of `width` logits in hidden's dtype.

    The override alone decides if it is set. Otherwise at most GPU_ROWS or CPU_ROWS, fewer where
    their logits would take more than a sixteenth of a GPU's free memory, or CPU_BUDGET. Chunks are
    of equal size, not full ones and a remainder. `shared`: ranks must cut alike, so free memory,
    which differs between ranks, is ignored. `width` 0: unknown.
    """
    budget, on_gpu = budget_override(), hidden.is_cuda
    most = GPU_ROWS if on_gpu else CPU_ROWS
    row_bytes = width * hidden.element_size()
    if budget is not None and width:
        rows = budget // row_bytes
    elif not width or (on_gpu and shared):
        rows = most
    else:
        allowed = free_memory(hidden.device) // 16 if on_gpu else CPU_BUDGET
        rows = min(most, allowed // row_bytes)
    parts = -(-tokens // max(1, rows))
    return -(-tokens // max(1, parts))


def logits_fit(hidden: Tensor, tokens: int, width: int) -> bool:
    """Return whether to keep [tokens, width] logits for the backward.

    The limit is the override, a quarter of a GPU's free memory, or 1 GiB on a CPU.
    """
    budget = budget_override()
    if budget is None and not hidden.is_cuda:
        budget = KEPT_ON_CPU
    if budget is None:
        budget = free_memory(hidden.device) // 4
    return tokens * width * hidden.element_size() <= budget


def as_matrix(hidden: Tensor) -> Tensor:
    return hidden.reshape(-1, hidden.shape[-1])


def readable(mask: Tensor) -> bool:
    """Return whether the host can read the mask without waiting for a device."""
    return not mask.is_cuda


class CountedRows:
    """The rows of hidden [N, H] that `mask` [N] counts, in chunks.

    The other rows are never touched if the number of True positions is known without waiting: on a
    CPU always, on a GPU if the caller passes it (`num_counted`, or a larger number). Otherwise all
    rows of a GPU are processed, the masked ones as zeros.
    """

    def __init__(
        self,
        hidden_NH: Tensor,
        mask_N: Tensor | None,
        width: int,
        shared: bool = False,
        num_counted: int | None = None,
        sequence: int | None = None,
    ) -> None:
        """Choose the rows. `sequence`: keep all rows, and cut chunks of whole sequences of it."""
        self.hidden, self.mask, self.index = hidden_NH, mask_N, None
        if sequence is not None:
            num_counted = None
        elif mask_N is not None and readable(mask_N):
            self.mask = None
            self.index = None if bool(mask_N.all()) else true_places(mask_N, None)
        elif mask_N is not None and num_counted is not None and num_counted < len(hidden_NH):
            # the mask stays: `num_counted` may be more than its True positions
            self.index = true_places(mask_N, num_counted)
        self.count = len(hidden_NH if self.index is None else self.index)
        enough = num_counted is None or self.mask is not None or self.count <= num_counted
        expected = f"no less than the mask's True positions ({self.count})"
        checks.require(enough, "num_counted", num_counted, expected)
        self.step = chunk_rows(hidden_NH, self.count, width, shared)
        if sequence is not None:
            self.step = max(sequence, self.step // sequence * sequence)

    def __iter__(self) -> Iterator[RowSlice]:
        for start in range(0, self.count, max(1, self.step)):
            yield slice(start, min(start + self.step, self.count))

    @overload
    def take(self, x: Tensor, at: RowSlice) -> Tensor: ...
    @overload
    def take(self, x: None, at: RowSlice) -> None: ...
    @overload
    def take(self, x: Tensor | None, at: RowSlice) -> Tensor | None: ...
    def take(self, x: Tensor | None, at: RowSlice) -> Tensor | None:
        """Return the rows of x [N, ...] that chunk `at` holds."""
        if x is None:
            return None
        return x[at] if self.index is None else x[self.index[at]]

    def put(self, total: Tensor, at: RowSlice, x: Tensor) -> None:
        """Write x [..., rows] to the chunk's rows of total [..., N]."""
        total[..., at if self.index is None else self.index[at]] = x

    def chunk(self, at: RowSlice) -> Tensor:
        """Return the chunk's hidden states, with zeros in the masked rows.

        A NaN in one of those would reach dW as 0 * NaN.
        """
        hidden, mask = self.take(self.hidden, at), self.take(self.mask, at)
        return hidden if mask is None else hidden.masked_fill(~mask[:, None], 0.0)

    def max_abs(self, x: Tensor) -> Tensor:
        """Return max |x| [N] over the rows that count (at least one), fp32, 0-dim."""
        everything = slice(0, self.count)
        size, mask = self.take(x, everything).float().abs(), self.take(self.mask, everything)
        return (size if mask is None else torch.where(mask, size, 0.0)).amax()


def empty_pooled(like: Tensor, rows: int, columns: int) -> Tensor:
    """Return an uninitialized [rows, columns] of like's dtype and device.

    On a CPU it reuses pages that an earlier call freed: clearing fresh ones costs a loss about a
    tenth of its GEMMs.
    """
    if has_cpu_implementation("empty_pooled", like):
        return torch.ops.fastrlhf_cpu.empty_pooled(like, rows, columns)
    return like.new_empty(rows, columns)


def grad_scale(
    rows: CountedRows, *upstream: Tensor | None, at_least: tuple[Number, ...] = ()
) -> Tensor | None:
    """Return the power of two just below the largest |upstream| [N] of a row that counts, or 1.

    `at_least`: upstreams that are the same for all rows.

    Half-precision gradients of the logits are computed divided by it and multiplied by it after
    the GEMMs: an upstream of 1 / denominator would underflow in fp16 (smallest subnormal 6e-8). A
    power of two rounds nothing. None in fp32 and wider, which need no scale.
    """
    if rows.hidden.element_size() > 2:
        return None
    largest = torch.zeros((), device=rows.hidden.device)
    for size in at_least:
        if isinstance(size, Tensor):
            largest = torch.maximum(largest, size.abs().to(largest.dtype))
        else:
            largest = largest.clamp(min=abs(size))
    for x in upstream if rows.count else ():
        if x is not None:
            largest = torch.maximum(largest, rows.max_abs(x))
    return torch.where(largest > 0, largest.log2().floor().exp2(), 1.0)


def div(x: Tensor | None, scale: Tensor | None) -> Tensor | None:
    """Return x / scale; None for either means 0 or 1."""
    return x if x is None or scale is None else x / scale


def mul_to(x: Tensor, factor: Tensor | None, dtype: torch.dtype, consume: bool = False) -> Tensor:
    """Return x * factor, computed in fp32 or wider, in `dtype`.

    `consume`: no backward reads x again. A CPU then returns x itself if the factor is the usual 1,
    which it can read without waiting; a GPU overwrites x, since a second dW may not fit.
    """
    if factor is None:
        return x.to(dtype)
    traced = type(x) is not Tensor  # it has no values, and a graph may run more than once
    # 1-dim, since a 0-dim factor would be rounded to x's fp16 first
    factor_1 = factor.reshape(1)
    if consume and not traced and x.dtype == dtype:
        if x.is_cuda:
            return x.detach().mul_(factor_1)
        if float(factor) == 1.0:
            return x.detach()
    return (x * factor_1).to(dtype)


def saved_tensors_are_final() -> bool:
    """Return whether this backward is the last to read the saved tensors."""
    keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return keeps_graph is not None and not keeps_graph()


class HeadGradients(NamedTuple):
    """Gradients of a LinearHead, empty [0] where not needed."""

    d_hidden: Tensor
    """[N, H] or [..., H], in hidden's dtype."""
    d_weight: Tensor
    """[V, H], in the compute dtype."""
    d_bias: Tensor
    """[V], in the compute dtype."""


class GradientSums:
    """Accumulates the gradients of a LinearHead over the chunks of its rows."""

    def __init__(self, rows: CountedRows, weight_VH: Tensor, needs: list[bool]) -> None:
        hidden_NH, dtype = rows.hidden, checks.compute_dtype(rows.hidden)
        self.rows, self.weight_VH = rows, weight_VH
        self.needs_hidden, self.needs_weight, self.needs_bias = needs
        # zeros where some rows do not count; otherwise each row is written once
        make = torch.empty if rows.index is None else torch.zeros
        shape = hidden_NH.shape if self.needs_hidden else (0,)
        self.d_hidden = make(shape, dtype=hidden_NH.dtype, device=hidden_NH.device)
        self.d_weight = hidden_NH.new_zeros(0, dtype=dtype)
        if self.needs_weight:
            # the first chunk's product is written, not added: no pass to zero it
            size_VH = weight_VH.shape
            self.d_weight = (
                empty_pooled(self.d_weight, *size_VH)
                if rows.count
                else self.d_weight.new_zeros(size_VH)
            )
        size = weight_VH.shape[0] if self.needs_bias else 0
        self.d_bias = torch.zeros(size, dtype=dtype, device=weight_VH.device)

    def add(self, at: RowSlice, d_logits: Tensor, hidden_chunk: Tensor) -> None:
        """Add the gradients of chunk `at` from those of its logits."""
        if self.needs_hidden:
            if self.rows.index is None:
                torch.mm(d_logits, self.weight_VH, out=self.d_hidden[at])
            else:
                self.d_hidden[self.rows.index[at]] = d_logits @ self.weight_VH
        if self.needs_weight:
            _add_product_(self.d_weight, d_logits, hidden_chunk, keep=at.start > 0)
        if self.needs_bias:
            self.d_bias += d_logits.sum(0, dtype=self.d_bias.dtype)

    def add_hidden(self, at: RowSlice, share: Tensor) -> None:
        """Add to the gradient of the chunk's hidden states."""
        index = at if self.rows.index is None else self.rows.index[at]
        self.d_hidden[index] = (self.d_hidden[index] + share).to(self.d_hidden.dtype)

    def reduce(self, group_name: str) -> HeadGradients:
        """Sum dh over the vocabulary's shards; dW and db belong to this shard alone."""
        if self.needs_hidden:
            collectives.reduce_sum_(self.d_hidden, group_name)
        return HeadGradients(self.d_hidden, self.d_weight, self.d_bias)


def _add_product_(total: Tensor, left: Tensor, right: Tensor, keep: bool) -> None:
    """Set total (fp32) = left^T right, plus its old value if `keep`.

    The product is never rounded to the inputs' dtype, which would bias training.
    """
    if left.is_cuda and left.dtype != total.dtype:
        torch.addmm(total, left.T, right, beta=int(keep), out_dtype=total.dtype, out=total)
    else:
        total.addmm_(left.T.to(total.dtype), right.to(total.dtype), beta=int(keep))


def prefetch_one(items: Iterator[Item]) -> Iterator[Item]:
    """Yield each item once the next is made: its collective overlaps the next one's GEMM."""
    for previous in items:
        for item in items:
            yield previous
            previous = item
        yield previous
