"""Run one case (op, mode, shape, dtype): load providers, check them against float64, time them."""

from __future__ import annotations

import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

import bench.rivals  # registers the other libraries
from bench import machine
from bench.cases import Inputs, Op, Outputs, Shape, shape_text
from bench.machine import Limits
from bench.providers import PROVIDERS, Function, Provider
from bench.results import Row
from bench.stats import Spread
from bench.timing import Candidate, Effort, clocks_of, interleaved, peak_extra_bytes

__all__ = ["Session", "bench", "foreign_errors", "run_case"]

# Rounding of inputs is not counted (the reference reads the rounded ones); that of logits, dlogits
# and results is.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}
SEED = 20220304
T = TypeVar("T")


@dataclass
class Session:
    """State shared by all cases of a run."""

    device: torch.device
    threads: int
    effort: Effort
    limits: Limits
    about: dict[str, Any]
    only: tuple[str, ...] = ()
    """name the providers to run, by any part of their names; empty: all"""
    deadline: float = float("inf")
    """time.monotonic() after which nothing new is started"""
    clocks: tuple[str, ...] = ()
    patience_s: float = 300.0
    """for a provider to compile and tune itself at one shape"""
    checked: dict[Any, tuple[Function | None, str, str]] = field(default_factory=dict)

    def wants(self, provider: Provider) -> bool:
        return not self.only or any(part.lower() in provider.name.lower() for part in self.only)

    def late(self) -> bool:
        return time.monotonic() > self.deadline


def foreign_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions that a provider or its compiler may raise.

    A provider that fails is reported, and the others continue.
    """
    errors: list[type[Exception]] = [
        ArithmeticError,
        AssertionError,
        AttributeError,
        ImportError,
        LookupError,
        MemoryError,
        NameError,
        OSError,
        RuntimeError,
        TypeError,
        ValueError,
    ]
    triton_errors = sys.modules.get("triton.errors") or sys.modules.get("triton.compiler.errors")
    for name in ("TritonError", "CompilationError"):
        if hasattr(triton_errors, name):
            errors.append(getattr(triton_errors, name))
    cutlass = sys.modules.get("cutlass.base_dsl.common")
    if hasattr(cutlass, "DSLBaseError"):
        errors.append(cutlass.DSLBaseError)  # type: ignore[union-attr]
    return tuple(errors)


def _too_slow(*_: object) -> None:
    raise TimeoutError("not ready in the time it was given to compile and tune")


def attempt(what: str, call: Callable[[], T], limit_s: float) -> tuple[T | None, str]:
    """Return (result, "") of a call, or (None, the reason) if it failed.

    The traceback goes to stderr. Python code is stopped after `limit_s`.
    """
    before = signal.signal(signal.SIGALRM, _too_slow)
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    try:
        return call(), ""
    except foreign_errors() as error:
        print(f"--- {what} failed", file=sys.stderr)
        traceback.print_exc()
        first = str(error).strip().splitlines()
        return None, f"{type(error).__name__}: {first[0] if first else ''}"[:200]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# --- running a provider -------------------------------------------------------------------------


def with_leaves(op: Op, inputs: Inputs) -> Inputs:
    return {k: v.detach().requires_grad_() if k in op.leaves else v for k, v in inputs.items()}


def upstream_of(op: Op, outputs: Outputs) -> list[Tensor]:
    """Return random upstream gradients, the same for every provider.

    Ones would not detect a wrong scale per row.
    """
    generator = torch.Generator().manual_seed(SEED)
    ones = [
        torch.randn(o.shape, generator=generator) if o.dim() else torch.ones(()) for o in outputs
    ]
    return [u.to(o.device, o.dtype) for u, o in zip(ones, outputs, strict=True)]


def gradients(
    op: Op, inputs: Inputs, outputs: Outputs, upstream: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    cast = [
        u.to(o.dtype) if u.dtype != o.dtype else u for u, o in zip(upstream, outputs, strict=True)
    ]
    return torch.autograd.grad(outputs, [inputs[n] for n in op.leaves], cast)


def relative_error(got: Tensor, exact: Tensor) -> float:
    """Return || got - exact || / || exact ||; infinite for a NaN or another shape."""
    if got.shape != exact.shape:
        return float("inf")
    error = torch.linalg.vector_norm(got.double() - exact) / torch.linalg.vector_norm(exact).clamp(
        min=1e-30
    )
    return float("inf") if torch.isnan(error) else float(error)


def check(
    op: Op, function: Function, shape: Shape, dtype: torch.dtype, device: torch.device
) -> str:
    """Return "" if outputs and gradients at a small shape are right to the dtype's rounding.

    Otherwise the message says what is wrong.
    """
    torch.manual_seed(SEED)
    plain = op.make(op.check_shape(shape), dtype, device)
    exact_in = with_leaves(
        op, {k: v.double() if v.is_floating_point() else v for k, v in plain.items()}
    )
    exact = op.reference(exact_in)
    upstream = upstream_of(op, exact)
    inputs = with_leaves(op, {k: v.clone() for k, v in plain.items()})
    got = function(inputs)
    pairs = list(zip(op.outputs, got, exact, strict=True))
    if op.leaves:
        names = [f"gradient of {n}" for n in op.leaves]
        exact_grads = gradients(op, exact_in, exact, upstream)
        pairs += list(zip(names, gradients(op, inputs, got, upstream), exact_grads, strict=True))
    for name, ours, truth in pairs:
        error = relative_error(ours.detach(), truth.detach())
        if error > TOLERANCE[dtype]:
            return f"{name} off by {error:.1e} of its norm"
    return ""


def candidate(
    op: Op, provider: Provider, function: Function, shared: Inputs, mode: str
) -> Candidate:
    inputs = with_leaves(
        op, {k: v.clone() if k in provider.mutates else v for k, v in shared.items()}
    )
    example: list[list[Tensor]] = []

    def upstream(outputs: Outputs) -> list[Tensor]:
        if not example:
            example.append(upstream_of(op, outputs))
        return example[0]

    def restore() -> None:
        with torch.no_grad():
            for name in provider.mutates:
                inputs[name].copy_(shared[name])

    def forward(_: Any) -> Outputs:
        with torch.no_grad():
            return function(inputs)

    def graph() -> Outputs:
        restore()
        outputs = function(inputs)
        upstream(outputs)
        return outputs

    def backward(outputs: Outputs) -> tuple[Tensor, ...]:
        return gradients(op, inputs, outputs, upstream(outputs))

    def both(_: Any) -> Any:
        if provider.kind == "floor":
            return function(inputs)
        outputs = function(inputs)
        return outputs, gradients(op, inputs, outputs, upstream(outputs))

    prepare = graph if mode == "bwd" else restore
    return Candidate(
        provider.name, prepare, {"fwd": forward, "bwd": backward, "fwd+bwd": both}[mode]
    )


# --- a case -------------------------------------------------------------------------------------


def row(
    session: Session,
    op: Op,
    provider: Provider,
    mode: str,
    shape: Shape,
    dtype: torch.dtype,
    **more: Any,
) -> Row:
    return Row(
        op=op.name,
        mode=mode,
        provider=provider.name,
        kind=provider.kind,
        shape=shape_text(shape),
        dtype=str(dtype).removeprefix("torch."),
        provider_version=machine.version_of(provider.package),
        copy_gb_s=round(session.limits.copy_gb_s, 1),
        matmul_tflop_s=round(session.limits.matmul_tflop_s.get(dtype, 0.0), 3),
        **session.about,
        **more,
    )


def _ready(
    session: Session, op: Op, provider: Provider, shape: Shape, dtype: torch.dtype
) -> tuple[Function | None, str, str]:
    """Return (function, "", "") of a provider that loads and is right, else (None, status, note).

    Checked once per dtype.
    """
    key = (provider.op, provider.name, op.check_shape(shape), dtype)
    if key not in session.checked:
        session.checked[key] = _load_and_check(session, op, provider, shape, dtype)
    return session.checked[key]


def _load_and_check(
    session: Session, op: Op, provider: Provider, shape: Shape, dtype: torch.dtype
) -> tuple[Function | None, str, str]:
    if session.device.type not in provider.devices:
        return None, "not for this device", f"runs on {', '.join(provider.devices)}"
    if session.late():
        return None, "skipped", "out of time"
    try:
        function = provider.load()
    except ImportError as error:
        return None, "not installed", str(error).strip().splitlines()[0][:200]
    except foreign_errors() as error:
        return None, "failed", f"does not load: {error}"[:200]
    if provider.kind == "floor":
        return function, "", ""
    what = f"{provider.name}: check of {op.name}"
    wrong, why = attempt(
        what, lambda: check(op, function, shape, dtype, session.device), session.patience_s
    )
    if wrong is None:
        return None, "failed", why
    return (None, "wrong", wrong) if wrong else (function, "", "")


def _right_ones(
    session: Session, op: Op, mode: str, shape: Shape, dtype: torch.dtype
) -> tuple[list[tuple[Provider, Function]], list[Row]]:
    """Return the providers that are right, and rows that say why the others are not."""
    right, rows = [], []
    for provider in PROVIDERS[op.name]:
        if not session.wants(provider) or mode not in provider.modes:
            continue
        function, status, note = _ready(session, op, provider, shape, dtype)
        if function is None:
            rows.append(row(session, op, provider, mode, shape, dtype, status=status, note=note))
        else:
            right.append((provider, function))
    return right, rows


def _timed_row(
    session: Session,
    op: Op,
    provider: Provider,
    mode: str,
    shape: Shape,
    dtype: torch.dtype,
    clock: str,
    time_ms: Spread,
    peak: int,
    sm_clock: str,
) -> Row:
    moved, flops = op.least(mode, shape, dtype)
    floor = session.limits.floor_ms(moved, flops, dtype)
    return row(
        session,
        op,
        provider,
        mode,
        shape,
        dtype,
        status="ok",
        clock=clock,
        median_ms=time_ms.median,
        p20_ms=time_ms.p20,
        p80_ms=time_ms.p80,
        samples=time_ms.samples,
        gb_per_s=moved / time_ms.median / 1e6,
        tflop_per_s=flops / time_ms.median / 1e9,
        pct_sol=100 * floor / time_ms.median,
        peak_extra_mb=peak / 1e6,
        load=machine.load(),
        sm_clock_mhz=sm_clock,
    )


def run_case(session: Session, op: Op, mode: str, shape: Shape, dtype: torch.dtype) -> list[Row]:
    """Return rows for every provider of `op`, one per clock for those that were timed."""
    right, rows = _right_ones(session, op, mode, shape, dtype)
    if not right or session.late():
        return rows + [
            row(session, op, p, mode, shape, dtype, status="skipped", note="out of time")
            for p, _ in right
        ]
    torch.manual_seed(SEED)
    shared = op.make(shape, dtype, session.device)
    candidates, owners, peaks = [], [], []
    for provider, function in right:
        one = candidate(op, provider, function, shared, mode)

        def measure(one: Candidate = one) -> int:
            one.call(one.prepare())  # compile, and make the buffers that are kept
            return peak_extra_bytes(one, session.device)

        what = f"{provider.name}: {op.name} {mode} at {shape_text(shape)}"
        peak, why = attempt(what, measure, session.patience_s)
        if peak is None:
            rows.append(row(session, op, provider, mode, shape, dtype, status="failed", note=why))
            continue
        candidates.append(one)
        owners.append(provider)
        peaks.append(peak)
    before, timed = machine.sm_clock_mhz(session.device), []
    for clock in session.clocks or clocks_of(session.device):
        if not candidates or session.late():
            break
        timed.append((clock, interleaved(candidates, session.device, clock, session.effort)))
    sm_clock = f"{before}-{machine.sm_clock_mhz(session.device)}" if before else ""
    for clock, times in timed:
        for provider, peak, time_ms in zip(owners, peaks, times, strict=True):
            rows.append(
                _timed_row(
                    session, op, provider, mode, shape, dtype, clock, time_ms, peak, sm_clock
                )
            )
    return rows
