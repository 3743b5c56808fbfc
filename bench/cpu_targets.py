"""python -m bench cpu-targets: the ratios that the CPU kernels are held to, measured in one run.

  logprobs with entropy   at least 8x eager log_softmax + gather + entropy; one [N, V] buffer
  gae                     at least 30x a Python loop over time
  pairwise_ranking_loss   at least 20x a Python loop over pairs
  linear_cross_entropy, linear_ppo_loss        at most 1.10x three bare GEMMs
  linear_logprobs with recompute               at most 1.10x four bare GEMMs

Forward and backward (gae: forward), medians, candidates in turn. A ratio's range is p20 over p80 to
p80 over p20. If eager can be written two ways (bf16 logits upcast or not), the target refers to the
faster one.
"""

from __future__ import annotations

import argparse
import csv
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bench import machine, results
from bench.cases import OPS, Shape, parse_shape, shape_text
from bench.results import Row, append_csv
from bench.run import Session, run_case
from bench.timing import Effort

HERE = Path(__file__).parent
PER_TOKEN_BYTES = (
    64  # statistics, outputs and labels of one token: negligible compared with V logits
)


@dataclass(frozen=True)
class Target:
    op: str
    shape: Shape
    quick: Shape
    dtype: torch.dtype
    against: tuple[str, ...]
    """providers that the target is held against: the fastest of them"""
    also: tuple[str, ...] = ()
    """providers measured along, for comparison"""
    at_least: float | None = None
    at_most: float | None = None
    memory: bool = False


@dataclass(frozen=True)
class Outcome:
    op: str
    shape: str
    dtype: str
    measured: str
    versus: str
    ours_ms: float | None
    versus_ms: float | None
    ratio: float | None
    low: float | None
    high: float | None
    target: str
    reached: str


F32, BF16 = torch.float32, torch.bfloat16
LOGITS, HEAD = (2048, 50257), (2048, 768, 50257)
EAGER = ("eager", "eager, no upcast")
TARGETS = (
    Target("logprobs_entropy", LOGITS, (32, 5003), F32, ("eager",), at_least=8, memory=True),
    Target("logprobs_entropy", LOGITS, (32, 5003), BF16, EAGER, at_least=8, memory=True),
    Target("gae", (512, 1024), (16, 64), F32, ("Python loop over time",), at_least=30),
    Target(
        "pairwise_ranking_loss",
        (64, 9),
        (8, 9),
        F32,
        ("Python loop over pairs",),
        ("eager",),
        at_least=20,
    ),
    Target(
        "linear_cross_entropy",
        HEAD,
        (32, 64, 1009),
        F32,
        ("3 bare GEMMs",),
        ("eager", "F.linear_cross_entropy"),
        at_most=1.10,
    ),
    Target(
        "linear_ppo_loss", HEAD, (32, 64, 1009), F32, ("3 bare GEMMs",), ("eager",), at_most=1.10
    ),
    Target(
        "linear_logprobs_recompute",
        HEAD,
        (32, 64, 1009),
        F32,
        ("4 bare GEMMs",),
        ("eager",),
        at_most=1.10,
    ),
)


def _ratio(target: Target, versus: Row, ours: Row) -> tuple[float, float, float]:
    """Return (ratio of the medians, lowest, highest).

    The ratio says how many times faster ours is; against GEMMs, how many times slower.
    """
    a, b = (versus, ours) if target.at_least else (ours, versus)
    assert a.median_ms and b.median_ms and a.p20_ms and a.p80_ms and b.p20_ms and b.p80_ms
    return a.median_ms / b.median_ms, a.p20_ms / b.p80_ms, a.p80_ms / b.p20_ms


def _reached(target: Target, ratio: float) -> str:
    held = ratio >= target.at_least if target.at_least else ratio <= (target.at_most or 0.0)
    return "yes" if held else "no"


def judge(target: Target, rows: Sequence[Row]) -> list[Outcome]:
    """Return one line for the target's rival, one for each other provider, and one for memory."""
    timed = {r.provider: r for r in rows if r.median_ms is not None}
    ours = timed.get("fastrlhf[cpu]") or timed.get("fastrlhf[torch]")
    text = f">= {target.at_least:g}x" if target.at_least else f"<= {target.at_most:.2f}x"
    common: dict[str, Any] = {"op": target.op, "dtype": str(target.dtype).removeprefix("torch.")}
    shape = rows[0].shape if rows else shape_text(target.shape)
    if ours is None:
        why = "; ".join(f"{r.provider}: {r.status} {r.note}" for r in rows if r.kind == "ours")
        times: dict[str, Any] = dict.fromkeys(("ours_ms", "versus_ms", "ratio", "low", "high"))
        return [
            Outcome(
                **common,
                shape=shape,
                measured="nothing",
                versus=why,
                **times,
                target=text,
                reached="no",
            )
        ]
    outcomes = []
    held = [timed[name] for name in target.against if name in timed]
    fastest = min(held, key=lambda r: r.median_ms or 0.0, default=None)
    for versus in [*held, *(timed[name] for name in target.also if name in timed)]:
        ratio, low, high = _ratio(target, versus, ours)
        is_target = versus is fastest
        outcomes.append(
            Outcome(
                **common,
                shape=shape,
                measured=f"{ours.provider}, time",
                versus=versus.provider,
                ours_ms=ours.median_ms,
                versus_ms=versus.median_ms,
                ratio=ratio,
                low=low,
                high=high,
                target=text if is_target else "",
                reached=_reached(target, ratio) if is_target else "",
            )
        )
    if target.memory:
        tokens, vocab = parse_shape(shape)
        size = tokens * vocab * target.dtype.itemsize
        buffers = (ours.peak_extra_mb or 0.0) * 1e6 / size
        allowed = 1 + tokens * PER_TOKEN_BYTES / size
        outcomes.append(
            Outcome(
                **common,
                shape=shape,
                measured=f"{ours.provider}, peak extra memory",
                versus="one [N, V]",
                ours_ms=None,
                versus_ms=None,
                ratio=buffers,
                low=None,
                high=None,
                target="<= 1 buffer",
                reached="yes" if buffers <= allowed else "no",
            )
        )
    return outcomes


def table(outcomes: Sequence[Outcome]) -> str:
    """Return the outcomes as a Markdown table."""
    text = results.text_of
    lines = [
        (
            "| op | shape | dtype | measured | against | ours ms | theirs ms | ratio | range |"
            " target | reached |"
        ),
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for o in outcomes:
        between = f"{text(o.low)}-{text(o.high)}" if o.low is not None else ""
        cells = (
            o.op,
            o.shape,
            o.dtype,
            o.measured,
            o.versus,
            text(o.ours_ms, 4),
            text(o.versus_ms, 4),
            text(o.ratio),
            between,
            o.target,
            o.reached,
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def measure(session: Session, target: Target, quick: bool) -> list[Row]:
    ours = "fastrlhf[cpu]"
    session.only = (ours, *target.against, *target.also)
    op = OPS[target.op]
    mode = "fwd+bwd" if op.leaves else "fwd"
    shape = target.quick if quick else target.shape
    rows = run_case(session, op, mode, shape, target.dtype)
    if all(
        r.provider != ours or r.median_ms is None for r in rows
    ):  # no extension: the torch implementations are used
        session.only = ("fastrlhf[torch]", *target.against, *target.also)
        rows += [
            r for r in run_case(session, op, mode, shape, target.dtype) if r.median_ms is not None
        ]
    return rows


def main(argv: Sequence[str]) -> int:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python -m bench cpu-targets",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("ops", nargs="*", help="only these (default: all)")
    parser.add_argument("--threads", type=int, default=min(2, len(os.sched_getaffinity(0))))
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="timing budget of a case, at least 5 rounds"
    )
    parser.add_argument("--out", type=Path, default=HERE / "results" / "cpu")
    parser.add_argument(
        "--quick", action="store_true", help="tiny shapes: that it runs, not how fast"
    )
    args = parser.parse_args(argv)
    unknown = set(args.ops) - {t.op for t in TARGETS}
    if unknown:
        parser.error(
            f"no target for {', '.join(sorted(unknown))}: expected"
            f" {', '.join(t.op for t in TARGETS)}"
        )
    torch.set_num_threads(args.threads)
    device = torch.device("cpu")
    effort = (
        Effort(0.1, min_rounds=3, max_rounds=5, warmup=1)
        if args.quick
        else Effort(args.seconds, max_rounds=200)
    )
    limits = machine.measure_limits(device, (F32, BF16), args.quick)
    session = Session(device, args.threads, effort, limits, machine.describe(device, args.threads))
    began = machine.load()
    outcomes: list[Outcome] = []
    for target in TARGETS:
        if args.ops and target.op not in args.ops:
            continue
        print(f"{target.op} {target.dtype} ...", flush=True)
        rows = measure(session, target, args.quick)
        append_csv(args.out / results.CSV_NAME, rows)
        outcomes += judge(target, rows)
    about = (
        f"{machine.cpu_name()}, {args.threads} threads, torch {torch.__version__}, commit"
        f" {session.about['commit']}, copy {limits.copy_gb_s:.3g} GB/s, matmul"
        f" {limits.matmul_tflop_s[F32]:.3g} TFLOP/s fp32, load {began} at the start and"
        f" {machine.load()} at the end"
    )
    text = f"{about}\n\n{table(outcomes)}\n"
    print(f"\n{text}")
    write(args.out, outcomes, text)
    return 0


def write(out: Path, outcomes: Sequence[Outcome], text: str) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "targets.md").write_text(text)
    with (out / "targets.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(Outcome.__dataclass_fields__))
        writer.writeheader()
        writer.writerows(asdict(o) for o in outcomes)
