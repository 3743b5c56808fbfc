"""Reading and writing long rows at full vector width, whatever the alignment of their start.

A row of odd length leaves the next one unaligned, and a mask on a load keeps Triton from vectorising it. So each row is
walked in three parts: a masked head up to the next 16-byte boundary, whole blocks without a mask, a masked tail.
Left out on purpose: what depends on how many rows there are or where they begin. No such argument is specialised
or a constexpr, so that neither a batch size nor a slice of a larger tensor compiles a kernel again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl
from torch import Tensor


def jit(*counts: str) -> Callable[[Callable[..., Any]], Any]:
    """triton.jit that compiles once for all values of the arguments named, and for pointers of any alignment."""

    def decorate(function: Callable[..., Any]) -> Any:
        pointers = [name for name in function.__code__.co_varnames if name.endswith("_ptr")]
        return triton.jit(
            function, do_not_specialize=counts, do_not_specialize_on_alignment=pointers
        )

    return decorate


def row_options(rows: Tensor, columns: int) -> dict[str, int]:
    """Launch options for one program a row: 16 elements a thread."""
    vector = 16 // rows.element_size()
    if columns <= 2048:
        return {"VECTOR": vector, "BLOCK": 1024, "num_warps": 4}
    return {"VECTOR": vector, "BLOCK": 4096, "num_warps": 8}


def in_step(a: Tensor, b: Tensor) -> bool:
    """Whether rows of [B, L, V] views `a` and `b` always start at the same address modulo 16 bytes."""
    vector = 16 // a.element_size()
    strides = zip(a.stride()[:2], b.stride()[:2], strict=True)
    return (a.data_ptr() - b.data_ptr()) % 16 == 0 and all(
        (x - y) % vector == 0 for x, y in strides
    )


@triton.jit
def row_start(ptr, row, length, stride_b, stride_l):
    """Where row (row // length, row % length) begins; a 64-bit offset, for N * V passes 2^31 at 16.7k tokens of a 128k
    vocabulary."""
    return ptr + (row // length).to(tl.int64) * stride_b + (row % length).to(tl.int64) * stride_l


@triton.jit
def head_length(ptr, VECTOR: tl.constexpr):
    """Elements from `ptr` to the next 16-byte boundary."""
    element = ptr.to(tl.int64) // (16 // VECTOR)
    return ((VECTOR - element % VECTOR) % VECTOR).to(tl.int32)


@triton.jit
def fill_zero(ptr, count, VECTOR: tl.constexpr, BLOCK: tl.constexpr):
    """Zeros to ptr[0 : count]."""
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
    body = tl.multiple_of(ptr + head, 16)
    for i in range(blocks):
        tl.store(body + i * BLOCK + lanes, zeros)
    rest = head + blocks * BLOCK + lanes
    tl.store(ptr + rest, zeros, mask=rest < count)


@triton.jit
def load_where(ptr, inside, keep):
    """fp32 values, 0 where not `keep`; loaded wherever `inside`, not to wait for the load that `keep` comes from."""
    return tl.where(keep, tl.load(ptr, mask=inside, other=0.0).to(tl.float32), 0.0)
