"""Reading and writing long rows at full vector width, whatever the alignment of their start.

A row of odd length leaves the next one unaligned, and a mask on a load keeps Triton from vectorising it. So each row is
walked in three parts: a masked head up to the next 16-byte boundary, whole blocks without a mask, a masked tail.
Left out on purpose: anything that depends on how many rows there are; no argument here is specialised or a constexpr.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


def row_options(rows: Tensor, columns: int) -> dict[str, int]:
    """Launch options for one program a row: 16 elements a thread, 64 KiB in flight at 8 blocks a processor."""
    vector = 16 // rows.element_size()
    if columns <= 2048:
        return {"VECTOR": vector, "BLOCK": 1024, "num_warps": 4}
    return {"VECTOR": vector, "BLOCK": 4096, "num_warps": 8}


def in_step(a: Tensor, b: Tensor) -> bool:
    """Whether rows of [B, L, V] views `a` and `b` always start at the same offset modulo 16 bytes."""
    vector = 16 // a.element_size()
    return all((x - y) % vector == 0 for x, y in zip(a.stride()[:2], b.stride()[:2], strict=True))


@triton.jit
def row_offset(row, length, stride_b, stride_l):
    """Element offset of row (row // length, row % length); 64-bit, for N * V passes 2^31 at 16.7k tokens of a 128k
    vocabulary."""
    return (row // length).to(tl.int64) * stride_b + (row % length).to(tl.int64) * stride_l


@triton.jit
def head_length(offset, VECTOR: tl.constexpr):
    """Elements from `offset` to the next 16-byte boundary."""
    return ((VECTOR - offset % VECTOR) % VECTOR).to(tl.int32)


@triton.jit
def fill_zero(out_ptr, offset, end, VECTOR: tl.constexpr, BLOCK: tl.constexpr):
    """Zeros to out_ptr[offset : end]."""
    zeros = tl.zeros([BLOCK], dtype=out_ptr.dtype.element_ty)
    lanes = tl.arange(0, BLOCK)
    few = tl.arange(0, VECTOR)
    body = offset + head_length(offset, VECTOR)
    in_head = offset + few < tl.minimum(body, end)
    tl.store(out_ptr + offset + few, tl.zeros([VECTOR], dtype=out_ptr.dtype.element_ty), mask=in_head)
    blocks = tl.maximum(end - body, 0) // BLOCK
    for i in range(blocks):
        tl.store(out_ptr + tl.multiple_of(body + i * BLOCK, VECTOR) + lanes, zeros)
    rest = body + blocks * BLOCK + lanes
    tl.store(out_ptr + rest, zeros, mask=rest < end)


@triton.jit
def load_where(ptr, inside, keep):
    """fp32 values, 0 where not `keep`; loaded wherever `inside`, not to wait for the load that `keep` comes from."""
    return tl.where(keep, tl.load(ptr, mask=inside, other=0.0).to(tl.float32), 0.0)
