"""A sum over all blocks of one launch: each stores its partial sums, and the last one to finish adds them up in order.

The order of addition is fixed, so results do not change from run to run, as atomic additions of floats would let them.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor


@functools.cache
def _counter(device: torch.device, stream: int) -> Tensor:
    return torch.zeros(1, dtype=torch.int32, device=device)


def arrivals(like: Tensor) -> Tensor:
    """A zeroed counter that the last block zeroes again; one a stream, as launches on one stream never overlap."""
    stream = torch.cuda.current_stream(like.device).cuda_stream if like.is_cuda else 0
    return _counter(like.device, stream)


@triton.jit
def arrive(counter_ptr, blocks):
    """True in the last block to call this, once all others' stores can be read; it also resets the counter."""
    tl.debug_barrier()  # every thread's stores come before this block's arrival
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel") == blocks - 1
    if last:
        tl.store(counter_ptr, 0)
    return last


@triton.jit
def add_up(partials_ptr, blocks, BLOCK: tl.constexpr):
    """Sum partials_ptr[0 : blocks] in a fixed order, past the first-level cache that other blocks did not write to."""
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, blocks, BLOCK):
        total += tl.load(partials_ptr + start + lanes, mask=start + lanes < blocks, other=0.0, cache_modifier=".cg")
    return tl.sum(total, 0)
