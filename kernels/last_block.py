"""A sum over all blocks of one launch: each stores its partial sums, and the last one to finish adds them up in order.

The order of addition is fixed, so results do not change from run to run, as atomic additions of floats would let them.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
import triton
import triton.language as tl
from torch import Tensor


def _zero(like: Tensor) -> Tensor:
    return torch.zeros(1, dtype=torch.int32, device=like.device)


def _zero_on(stream: torch.cuda.Stream, like: Tensor) -> Tensor:
    with torch.cuda.stream(stream):
        return _zero(like)


_COUNTERS: dict[torch.cuda.Stream, Tensor] = {}


def arrivals(like: Tensor) -> Tensor:
    """A zeroed counter that the last block zeroes again; one a stream, as launches on one stream never overlap.

    A CUDA graph gets its own, which each replay zeroes: it may be replayed on any stream, before or after other graphs.
    """
    if not like.is_cuda or torch.cuda.is_current_stream_capturing():
        return _zero(like)
    stream = torch.cuda.current_stream(like.device)
    if stream not in _COUNTERS:
        # In another thread: when torch.compile warms up a CUDA graph, what this one allocates lies in the graph's
        # memory pool, and nothing there may outlive the call.
        with ThreadPoolExecutor(1) as other:
            _COUNTERS[stream] = other.submit(_zero_on, stream, like).result()
    return _COUNTERS[stream]


@triton.jit
def arrive(counter_ptr, blocks):
    """True in the last block to call this, once all others' stores can be read; it also resets the counter."""
    tl.debug_barrier()  # every thread's stores come before this block's arrival
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel") == blocks - 1
    if last:
        tl.store(counter_ptr, 0)
    return last


@triton.jit
def add_up(partials_ptr, blocks, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Sums [8] of partials_ptr[0 : ROWS, 0 : blocks] in a fixed order, past the first-level cache that other blocks did
    not write to. One pass for all rows, at most 8: one after the other, each would wait for memory anew."""
    rows = tl.arange(0, 8)[:, None]
    lanes = tl.arange(0, BLOCK)[None, :]
    total = tl.zeros([8, BLOCK], dtype=tl.float32)
    for start in range(0, blocks, BLOCK):
        live = (rows < ROWS) & (start + lanes < blocks)
        total += tl.load(
            partials_ptr + rows * blocks + start + lanes, mask=live, other=0.0, cache_modifier=".cg"
        )
    return tl.sum(total, 1)


@triton.jit
def element(x, k: tl.constexpr):
    """x[k] of a vector."""
    return tl.sum(tl.where(tl.arange(0, x.shape[0]) == k, x, 0.0), 0)
