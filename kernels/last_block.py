"""Sums over all blocks of one launch: each stores partial sums, and the last to finish adds them.

The order of addition is fixed, so that results do not change from run to run, as they would with
atomic additions of floats.
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
    """Return a zeroed counter, which the last block zeroes again.

    Each stream has one, as launches on one stream never overlap. A CUDA graph gets its own, which
    each replay zeroes: it may be replayed on any stream, before or after other graphs.
    """
    if not like.is_cuda or torch.cuda.is_current_stream_capturing():
        return _zero(like)
    stream = torch.cuda.current_stream(like.device)
    if stream not in _COUNTERS:
        # In another thread: when torch.compile warms up a CUDA graph, this thread allocates from
        # the graph's memory pool, and nothing there may outlive the call.
        with ThreadPoolExecutor(1) as other:
            _COUNTERS[stream] = other.submit(_zero_on, stream, like).result()
    return _COUNTERS[stream]


@triton.jit
def last_block_arrives(counter_ptr, blocks):
    """Return True in the last block to call this, which can then read all others' stores.

    Resets the counter.
    """
    tl.debug_barrier()  # every thread's stores come before this block's arrival
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel") == blocks - 1
    if last:
        tl.store(counter_ptr, 0)
    return last


@triton.jit
def reduce_partials(partials_ptr, blocks, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Return the sums [8] of partials_ptr[0 : ROWS, 0 : blocks], added in a fixed order.

    Loads bypass the first-level cache, which other blocks did not write to. One pass for all rows,
    at most 8: one after the other, each row would wait for memory again.
    """
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
def extract(x, k: tl.constexpr):
    """Return x[k] of a vector."""
    return tl.sum(tl.where(tl.arange(0, x.shape[0]) == k, x, 0.0), 0)
