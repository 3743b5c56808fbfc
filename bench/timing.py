"""Time candidates in turn, and measure the memory that a call needs in addition to its inputs.

A candidate is two functions: `prepare` makes the inputs of one call (untimed), `call` is timed on
them.

There are three clocks on a GPU: "cold" (device time, L2 flushed before each call), "hot" (device
time, no flush) and "wall" (host time per call when many follow each other). Device clocks hold the
GPU back until the host has queued everything, so that slow launching is not counted there; it shows
in "wall". On a CPU there is only "wall". A call shorter than a millisecond is timed twenty times in
a row: waking threads that slept during another candidate's turn takes as long as such a call.
"""

from __future__ import annotations

import gc
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench.machine import synchronize
from bench.stats import Spread, spread, turns
from fastrlhf.ops import backends

FLUSH_BYTES = 256 << 20  # several times the L2 cache of any GPU so far
GPU_CLOCKS = ("cold", "hot", "wall")
CPU_CLOCKS = ("wall",)
HOLD_CYCLES_PER_MS = 2_000_000  # torch.cuda._sleep counts cycles, at most 2 GHz


@dataclass(frozen=True)
class Candidate:
    name: str
    prepare: Callable[[], Any]
    call: Callable[[Any], Any]


@dataclass(frozen=True)
class Effort:
    """How long to measure: whole rounds until the budget is spent, between two bounds."""

    budget_s: float
    min_rounds: int = 5
    max_rounds: int = 100
    warmup: int = 2


def clocks_of(device: torch.device) -> tuple[str, ...]:
    return GPU_CLOCKS if device.type == "cuda" else CPU_CLOCKS


def _host_ms(candidate: Candidate, device: torch.device) -> float:
    state = candidate.prepare()
    synchronize(device)
    start = time.perf_counter()
    result = candidate.call(state)
    synchronize(device)
    elapsed = 1e3 * (time.perf_counter() - start)
    del result, state
    return elapsed


def _queue_ms(candidate: Candidate, device: torch.device) -> float:
    """Return how long the host needs to queue one call; on a GPU it has yet to run then."""
    state = candidate.prepare()
    synchronize(device)
    start = time.perf_counter()
    result = candidate.call(state)
    elapsed = 1e3 * (time.perf_counter() - start)
    synchronize(device)
    del result, state
    return elapsed


def _device_ms(candidate: Candidate, hold_ms: float, flush: torch.Tensor | None) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    state = candidate.prepare()
    if flush is not None:
        flush.zero_()
    torch.cuda._sleep(int(hold_ms * HOLD_CYCLES_PER_MS))
    start.record()
    result = candidate.call(state)
    end.record()
    torch.cuda.synchronize()
    del result, state
    return start.elapsed_time(end)


def _back_to_back_ms(candidate: Candidate, device: torch.device, calls: int) -> float:
    """Return the host time per call of `calls` in a row, as a training loop pays it."""
    states = [candidate.prepare() for _ in range(calls)]
    synchronize(device)
    start = time.perf_counter()
    for state in states:
        candidate.call(state)
    synchronize(device)
    return 1e3 * (time.perf_counter() - start) / calls


def _samplers(
    candidates: Sequence[Candidate], device: torch.device, clock: str, warmup: int
) -> list[Callable[[], float]]:
    """Return one function per candidate that takes one sample in ms, after a warm-up."""
    first = []
    for candidate in candidates:
        times = [_host_ms(candidate, device) for _ in range(max(warmup, 1))]
        first.append(min(times))
    if clock == "wall":
        # many states at once would not fit for big calls, and launching is no cost there
        calls = [20 if ms < 1 else 1 for ms in first]
        return [
            lambda c=c, n=n: _back_to_back_ms(c, device, n)
            for c, n in zip(candidates, calls, strict=True)
        ]
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) if clock == "cold" else None
    holds = [min(5.0, 0.05 + 1.5 * min(_queue_ms(c, device) for _ in range(2))) for c in candidates]
    return [
        lambda c=c, h=h: _device_ms(c, h, flush) for c, h in zip(candidates, holds, strict=True)
    ]


def interleaved(
    candidates: Sequence[Candidate], device: torch.device, clock: str, effort: Effort
) -> list[Spread]:
    """Return milliseconds of each candidate, in turns so that a disturbance hits all of them."""
    samplers = _samplers(candidates, device, clock, effort.warmup)
    times: list[list[float]] = [[] for _ in candidates]
    deadline = time.perf_counter() + effort.budget_s
    gc.collect()
    gc.disable()
    try:
        order = turns(len(candidates), effort.max_rounds)
        for _ in range(effort.max_rounds):
            for _ in candidates:
                index = next(order)
                times[index].append(samplers[index]())
            if time.perf_counter() > deadline and len(times[0]) >= effort.min_rounds:
                break
    finally:
        gc.enable()
    return [spread(t) for t in times]


def peak_extra_bytes(candidate: Candidate, device: torch.device) -> int:
    """Return the peak of torch's allocator during one call, above its level before.

    Memory that the C++ kernels keep from earlier calls is freed first, or it would not count.
    """
    state = candidate.prepare()
    synchronize(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = candidate.call(state)
        synchronize(device)
        del result
        return torch.cuda.max_memory_allocated(device) - before
    if backends()["cpu"]["available"]:
        torch.ops.fastrlhf_cpu.release()
    with profile(
        activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as recorded:
        result = candidate.call(state)
    del result
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        events = [
            e for e in json.loads(path.read_text())["traceEvents"] if e.get("name") == "[memory]"
        ]
    held = peak = 0
    for event in sorted(events, key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak
