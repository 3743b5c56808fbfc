"""Sides that do the same steps in turn: built, warmed up, compared and timed.

A failure of one side leaves the others unaffected. A step takes seconds, so one clock, the host's
with the device waited for, is enough; kernels are timed in timing.py. Out of scope: what the steps
are (trainers.py, plain.py), and the use of the times.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from bench.machine import Limits, timed
from bench.run import foreign_errors
from bench.stats import turns
from bench.trainers import Metrics, RandomParts, Steps
from fastrlhf.errors import UserError

T = TypeVar("T")
AGREE = {"fp32": 1e-3, "bf16": 1e-1, "fp16": 5e-2}
"""Relative difference of first losses and gradient norms above which two sides do different work.

Half precision leaves room for gradients that one side sums in fp32 and the other in its weights'
dtype."""
OTHERS = 3
"""Times that a part of a step is timed by itself."""


@dataclass
class Session:
    """State shared by all parts of a run."""

    args: argparse.Namespace
    parts: RandomParts
    limits: Limits
    about: dict[str, Any]
    deadline: float = float("inf")
    """time.monotonic() after which nothing new is begun"""
    sm_clock: str = ""
    """MHz of a GPU before and after the steps that were timed last"""

    @property
    def device(self) -> torch.device:
        return self.parts.mesh.device

    def late(self) -> bool:
        return time.monotonic() > self.deadline


@dataclass
class Side:
    """How one side's step is built, and its measurements."""

    mode: str
    provider: str
    build: Callable[[], Steps]
    steps: Steps | None = None
    status: str = ""
    note: str = ""
    peak: int | None = None
    """Most bytes held on a GPU, models and optimizers included."""
    first: Metrics = field(default_factory=dict)
    times: list[dict[str, float]] = field(default_factory=list)
    """Of each step: seconds of the whole as "", and of its phases."""
    others: dict[str, list[float]] = field(default_factory=dict)
    """Seconds of what is timed by itself."""
    failures: dict[str, tuple[str, str]] = field(default_factory=dict)
    """(status, note) of what could not be."""

    @property
    def kind(self) -> str:
        return "ours" if self.provider == "fastrlhf" else "rival"

    def seconds(self, phase: str = "") -> list[float]:
        return [times[phase] for times in self.times]


def guarded(what: str, call: Callable[[], T]) -> tuple[T | None, str, str]:
    """Return (result, "ok", "") of a call, or (None, "out of memory" or "failed", reason).

    The traceback goes to stderr.
    """
    try:
        return call(), "ok", ""
    except (*foreign_errors(), UserError) as error:
        text = (str(error).strip().splitlines() or [""])[0]
        # The CPU's allocator has no error of its own.
        full = isinstance(
            error, (torch.OutOfMemoryError, MemoryError)
        ) or "can't allocate memory" in str(error)
        if not full:
            print(f"--- {what} failed", file=sys.stderr)
            traceback.print_exc()
        return None, "out of memory" if full else "failed", f"{type(error).__name__}: {text}"[:200]


def release(device: torch.device) -> None:
    """Free unreferenced memory; models have reference cycles, so this runs the collector."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def begin(sides: Sequence[Side], session: Session, warmup: int, *, same: bool) -> None:
    """Build and warm up each side; `same` says that their first steps must have equal losses."""
    device, provider, before = session.device, "", 0
    for side in sides:
        if session.late():
            side.status, side.note = "skipped", "out of time"
            continue
        if (
            side.provider != provider
        ):  # what comes before is another's memory; one's own learner may serve two sides
            provider, before = side.provider, _allocated(device)
        call = _starting(side, before, warmup, device)
        _, side.status, side.note = guarded(f"{side.provider}, {side.mode}", call)
        if side.status == "ok" and same and side.kind == "rival" and sides[0].first:
            side.note = disagreement(sides[0].first, side.first, session.args.dtype)
            side.status = "wrong" if side.note else "ok"
        if side.status != "ok":
            side.steps = None
            release(device)


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _starting(side: Side, before: int, warmup: int, device: torch.device) -> Callable[[], None]:
    def call() -> None:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        side.steps = side.build()
        metrics = [side.steps.step() for _ in range(warmup)]
        side.first = metrics[0]
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            side.peak = torch.cuda.max_memory_allocated(device) - before

    return call


def disagreement(mine: Metrics, theirs: Metrics, dtype: str) -> str:
    """Return "" if two first steps had the same loss and gradient norm, else the difference."""
    for name in ("loss", "grad_norm"):
        if not abs(mine[name] - theirs[name]) <= AGREE[dtype] * abs(mine[name]):
            return (
                f"{name} of the first step is {theirs[name]:.5g}, and {mine[name]:.5g} in fastrlhf"
            )
    return ""


def race(sides: Sequence[Side], session: Session, rounds: int) -> None:
    """Time steps in turn. A side that fails drops out and keeps its measurements."""
    release(session.device)
    gc.disable()
    try:
        for index in turns(len(sides), rounds):
            side = sides[index]
            if side.status != "ok" or (session.late() and side.times):
                continue
            what = f"{side.provider}, {side.mode}"
            _, status, note = guarded(what, lambda s=side: _one_step(s, session.device))  # type: ignore[misc]
            if status != "ok":
                side.status, side.note, side.steps = status, note, None
                release(session.device)
    finally:
        gc.enable()


def _one_step(side: Side, device: torch.device) -> None:
    assert side.steps is not None
    metrics, seconds = timed(side.steps.step, device)
    phases = {
        name.removeprefix("seconds_"): value
        for name, value in metrics.items()
        if name.startswith("seconds_")
    }
    side.times.append({"": seconds, **phases})


def time_others(side: Side, calls: dict[str, Callable[[], Any]], session: Session) -> None:
    """Time parts of a step separately, each after an untimed call; past the deadline once."""
    for name, call in calls.items():
        for repeat in range(OTHERS + 1):
            if session.late() and repeat > 1:
                break
            result, status, note = guarded(name, lambda c=call: timed(c, session.device))  # type: ignore[misc]
            if result is None:
                side.failures[name] = (status, note)
                break
            if repeat:
                side.others.setdefault(name, []).append(result[1])
