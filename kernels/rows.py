"""Read and write long rows at full vector width, whatever the alignment of their start.

A row of odd length leaves the next one unaligned, and a mask on a load keeps Triton from
vectorizing it. So a row is processed in three parts: a masked head up to the next 16-byte boundary,
full blocks without a mask, a masked tail.
The number of rows and their addresses are never specialized nor constexpr, so that neither a batch
size nor a slice of a larger tensor compiles a kernel again.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import Protocol

import triton
import triton.language as tl
from torch import Tensor


class Kernel(Protocol):
    """A jitted function: `kernel[grid](...)` launches it."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., object]: ...


def jit(*counts: str) -> Callable[[Callable[..., None]], Kernel]:
    """Apply triton.jit, compiling once for all values of `counts` and pointer alignments."""

    def decorate(function: Callable[..., None]) -> Kernel:
        pointers = [name for name in function.__code__.co_varnames if name.endswith("_ptr")]
        return triton.jit(
            function, do_not_specialize=counts, do_not_specialize_on_alignment=pointers
        )

    return decorate


def index(member: IntEnum) -> tl.constexpr:
    """Return a layout's index as a constant that kernels can read."""
    return tl.constexpr(int(member))


def row_options(rows: Tensor, columns: int, capped: bool = False) -> dict[str, int]:
    """Return the launch options of one program per row: 16 elements per thread.

    `capped`: 8, as the tanh of a softcap takes registers that more would spill (fp32 on sm_100).
    """
    vector = 16 // rows.element_size()
    if columns <= 2048:
        return {"VECTOR": vector, "BLOCK": 1024, "num_warps": 4}
    return {"VECTOR": vector, "BLOCK": 2048 if capped else 4096, "num_warps": 8}


def same_alignment(a: Tensor, b: Tensor) -> bool:
    """Return whether rows of the [B, L, V] views start at the same address modulo 16 bytes."""
    vector = 16 // a.element_size()
    strides = zip(a.stride()[:2], b.stride()[:2], strict=True)
    return (a.data_ptr() - b.data_ptr()) % 16 == 0 and all(
        (x - y) % vector == 0 for x, y in strides
    )


@triton.jit
def row_start(ptr, row, length, stride_b, stride_l):
    """Return the start of row (row // length, row % length).

    The offset is 64-bit: N * V passes 2^31 at 16.7k tokens of a 128k vocabulary.
    """
    return ptr + (row // length).to(tl.int64) * stride_b + (row % length).to(tl.int64) * stride_l


@triton.jit
def head_length(ptr, VECTOR: tl.constexpr):
    """Return the number of elements from `ptr` to the next 16-byte boundary."""
    element = ptr.to(tl.int64) // (16 // VECTOR)
    return ((VECTOR - element % VECTOR) % VECTOR).to(tl.int32)


@triton.jit
def fill_zero(ptr, count, VECTOR: tl.constexpr, BLOCK: tl.constexpr):
    """Write zeros to ptr[0 : count]."""
    zeros = tl.zeros([BLOCK], dtype=ptr.dtype.element_ty)
    lanes = tl.arange(0, BLOCK)
    few = tl.arange(0, VECTOR)
    head = head_length(ptr, VECTOR)
    tl.store(
        ptr + few,
        tl.zeros([VECTOR], dtype=ptr.dtype.element_ty),
        mask=few < tl.minimum(head, count),
    )
    blocks = tl.maximum(count - head, 0) // BLOCK
    aligned = tl.multiple_of(ptr + head, 16)
    for i in range(blocks):
        tl.store(aligned + i * BLOCK + lanes, zeros)
    rest = head + blocks * BLOCK + lanes
    tl.store(ptr + rest, zeros, mask=rest < count)


@triton.jit
def masked_load(ptr, inside, keep):
    """Load fp32 values, 0 where not `keep`.

    The load itself is masked by `inside` only, so that it need not wait for the load of `keep`.
    """
    return tl.where(keep, tl.load(ptr, mask=inside, other=0.0).to(tl.float32), 0.0)


@triton.jit
def scalar(x, ON_DEVICE: tl.constexpr):
    """Return a scalar option as fp32: passed by value, or as a pointer to a 0-dim tensor."""
    if ON_DEVICE:
        return tl.load(x).to(tl.float32)
    return x


def on_device(*values: float | Tensor) -> bool:
    """Return whether the scalar options of a launch are 0-dim tensors, not numbers."""
    return isinstance(values[0], Tensor)
