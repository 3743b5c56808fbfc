"""python -m bench end-to-end: steps of SFT, reward model and PPO-ptx compared with Hugging Face.

The product's trainers (trainers.py) and the same work in transformers and torch (plain.py) take
turns on the same random weights and tokens of one device. Losses and gradient norms of the first
steps are compared before anything is timed.

A row has the median seconds of a step with the 20th and 80th percentiles, and the share of it that
the least possible time would be, at limits measured in the same run: the operations that the step
needs (flops.py) at the rate of a large matrix product, which gives the model FLOPs utilisation; for
decoding, the bytes that it must read at the rate of a copy. A part that fails or does not fit in
memory is listed as such and the others continue. On a GPU: GPT-3 1.3B in bf16. On a CPU: a tiny
model, about a minute. Not supported: several devices, and memory on a CPU, whose allocator keeps no
count.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from bench import flops, machine, results
from bench.flops import Work
from bench.machine import Limits
from bench.results import text_of
from bench.sides import Session, Side, begin, race, release, time_others
from bench.stats import quantile, spread
from bench.trainers import RandomParts, Steps, Trainers, make_task, ranking_batch
from fastrlhf.config import ParallelConfig
from fastrlhf.data.batches import pack_demonstrations
from fastrlhf.models.gpt import DTYPES
from fastrlhf.parallel import mesh as meshes

HERE = Path(__file__).parent
CSV_NAME = "end_to_end.csv"
PARTS = ("sft", "rm", "ppo")
SIZES: dict[str, dict[str, int]] = {
    "cuda": {
        "layers": 24,
        "hidden": 2048,
        "heads": 16,
        "vocab": 50257,
        "prompt": 256,
        "response": 256,
        "episodes": 64,
        "minibatch": 64,
        "ptx_per_episode": 1,
        "sft_batch": 32,
        "rankings": 16,
        "micro_tokens": 8192,
        "steps": 9,
        "iterations": 3,
        "warmup": 2,
    },
    "cpu": {
        "layers": 2,
        "hidden": 128,
        "heads": 2,
        "vocab": 4096,
        "prompt": 32,
        "response": 32,
        "episodes": 16,
        "minibatch": 16,
        "ptx_per_episode": 1,
        "sft_batch": 16,
        "rankings": 4,
        "micro_tokens": 1024,
        "steps": 5,
        "iterations": 3,
        "warmup": 2,
    },
}
HELP = {
    "prompt": "tokens of a prompt: PPO's; elsewhere the longest, the others down to a quarter of it",
    "response": "tokens of a response, likewise",
    "minibatch": "episodes in an update",
    "ptx_per_episode": "pretraining windows of prompt + response tokens for each episode",
    "sft_batch": "demonstrations in a step",
    "rankings": "prompts with 4 to 9 ranked responses in a step",
    "micro_tokens": "most tokens in a micro-batch",
    "steps": "timed steps of SFT and of the reward model",
    "iterations": "timed iterations of PPO",
    "warmup": "steps before those, which are not timed (of PPO's iterations: one)",
}


@dataclass(frozen=True)
class StepRow(results.Row):
    """A measurement; `op` is the stage, `mode` the step or a phase of it."""

    tokens_per_s: float | None = None
    rankings_per_s: float | None = None
    share_pct: float | None = None
    """of the iteration's time"""
    limit: str = ""
    """what pct_sol is of: "matmul", "copy" or "both" """
    peak_memory_mb: float | None = None
    """most memory of torch's allocator on a GPU, models and optimizers included, 10^6 bytes"""
    versus: str = ""
    ratio: float | None = None
    """median over the rounds of (seconds of `versus` / seconds of this)"""


class Least(NamedTuple):
    """The least operations and bytes of a step, for any implementation."""

    tokens: int
    """Counted for tokens a second."""
    operations: int
    moved: int = 0
    """Bytes that decoding must read."""
    decoding: int = 0
    """Those of the operations that wait for these bytes."""


# ---- the three parts ---------------------------------------------------------------------------


def sides_of(part: str, session: Session) -> list[Side]:
    parts = session.parts
    ours = Trainers(parts)
    mode = {"sft": "step", "rm": "prompts repeated", "ppo": "iteration"}[part]
    sides = {
        "sft": [Side(mode, "fastrlhf", ours.sft)],
        "rm": [
            Side("prompts shared", "fastrlhf", lambda: ours.rm(shared_prompt=True)),
            Side(mode, "fastrlhf", lambda: ours.rm(shared_prompt=False)),
        ],
        "ppo": [Side(mode, "fastrlhf", ours.ppo)],
    }[part]

    def theirs() -> Steps:
        from bench import plain

        return getattr(plain, part)(parts)

    return sides if session.args.alone else [*sides, Side(mode, "transformers", theirs)]


def run_part(part: str, session: Session) -> list[StepRow]:
    """Time all sides of a part in turn; their memory is free again afterwards."""
    sides, args, ppo = sides_of(part, session), session.args, part == "ppo"
    begin(
        sides, session, 1 if ppo else args.warmup, same=not ppo
    )  # PPO's sides sample different tokens
    before = machine.sm_clock_mhz(session.device)
    for side in sides:
        if side.steps is not None:
            time_others(side, side.steps.others, session)
    race(sides, session, args.iterations if ppo else args.steps)
    session.limits = machine.best(session.limits, measured_limits(session.args, session.device))
    session.sm_clock = f"{before}-{machine.sm_clock_mhz(session.device)}" if before else ""
    for side in sides:
        if side.steps is not None:
            time_others(side, side.steps.last, session)
    rows = [row for side in sides for row in rows_of(part, side, sides, session)]
    for side in sides:
        side.steps = None
        side.build = unbuilt
    return rows


def unbuilt() -> Steps:
    raise RuntimeError("this side has been measured, and its models are gone")


def least_of(part: str, mode: str, session: Session) -> dict[str, Least]:
    """Return the least work of the whole step, under "", and of its phases."""
    task, model = session.parts.task, session.parts.task.config.model
    if part == "sft":
        work = flops.work_of(pack_demonstrations(task.demonstrations))
        return {"": Least(work.tokens, flops.training_flops(model, work, task.vocab))}
    if part == "rm":
        work = flops.work_of(ranking_batch(task, shared_prompt=mode == "prompts shared"))
        return {"": Least(work.tokens, flops.training_flops(model, work, 1))}
    return ppo_least(session)


def ppo_least(session: Session) -> dict[str, Least]:
    """Return the least work of a PPO iteration and its phases, without the scalar heads."""
    task, model = session.parts.task, session.parts.task.config.model
    prompts, R, B = (
        [len(prompt) for prompt in task.prompts],
        session.args.response,
        len(task.prompts),
    )
    first, rest = flops.prefill(prompts), flops.decode(prompts, R)
    episodes = flops.prefill([P + R for P in prompts])
    body, policy = (
        Work(episodes.tokens, episodes.pairs),
        Work(episodes.tokens, episodes.pairs, B * R),
    )
    window = flops.prefill([len(window) - 1 for window in task.windows])
    ptx = Work(window.tokens, window.pairs, window.tokens) * -(-B // session.args.minibatch)
    prefill = Least(first.tokens, flops.forward_flops(model, first, task.vocab))
    read = flops.decode_bytes(model, prompts, R, task.vocab)
    spent = flops.forward_flops(model, rest, task.vocab)
    decode = Least(rest.tokens, spent, read, spent)
    rollout = Least(B * R, prefill.operations + spent, read, spent)
    scoring = flops.forward_flops(model, policy, task.vocab) + 2 * flops.forward_flops(
        model, body, 1
    )
    update = flops.training_flops(model, policy + ptx, task.vocab) + flops.training_flops(
        model, body, 1
    )
    return {
        "": Least(body.tokens, rollout.operations + scoring + update, read, spent),
        "rollout": rollout,
        "prefill": prefill,
        "decode": decode,
        "scoring": Least(body.tokens, scoring),
        "update": Least(body.tokens + ptx.tokens, update),
    }


# ---- rows --------------------------------------------------------------------------------------


def make_row(session: Session, part: str, side: Side, mode: str, **more: Any) -> StepRow:
    args = session.args
    shape = (
        f"{args.layers}x{args.hidden}x{args.heads}, V {args.vocab}, {args.prompt}+{args.response}"
    )
    counts = {
        "sft": args.sft_batch,
        "rm": args.rankings,
        "ppo": f"{args.episodes}, ptx {args.ptx_per_episode}",
    }
    dtype = DTYPES[args.dtype]
    return StepRow(
        op=part,
        mode=mode or side.mode,
        provider=side.provider,
        kind=side.kind,
        shape=f"{shape}, x{counts[part]}",
        dtype=str(dtype).removeprefix("torch."),
        provider_version=machine.version_of(side.provider),
        copy_gb_s=round(session.limits.copy_gb_s, 1),
        matmul_tflop_s=round(session.limits.matmul_tflop_s[dtype], 3),
        clock="wall",
        load=machine.load(),
        sm_clock_mhz=session.sm_clock,
        **session.about,
        **more,
    )


def timed_row(
    session: Session,
    part: str,
    side: Side,
    mode: str,
    times: Sequence[float],
    least: Least,
    **more: Any,
) -> StepRow:
    """Return the row of a mode; `times` are in seconds."""
    time_s, dtype = spread(times), DTYPES[session.args.dtype]
    # Operations overlap with reading: the slower of the two counts; the rest is added.
    floor_ms = session.limits.floor_ms(least.moved, least.decoding, dtype)
    floor_ms += session.limits.floor_ms(0, least.operations - least.decoding, dtype)
    limit = (
        "matmul" if not least.moved else "copy" if least.decoding == least.operations else "both"
    )
    return make_row(
        session,
        part,
        side,
        mode,
        status="ok",
        median_ms=1e3 * time_s.median,
        p20_ms=1e3 * time_s.p20,
        p80_ms=1e3 * time_s.p80,
        samples=time_s.samples,
        tokens_per_s=least.tokens / time_s.median,
        limit=limit,
        tflop_per_s=least.operations / time_s.median / 1e12,
        pct_sol=floor_ms / time_s.median / 10,
        gb_per_s=least.moved / time_s.median / 1e9 if limit == "copy" else None,
        **more,
    )


def against(side: Side, sides: Sequence[Side], phase: str = "") -> dict[str, Any]:
    """Return the ratio to transformers' neighbouring steps.

    For shared prompts, the ratio is to the same trainer with repeated prompts.
    """
    wanted = "ours" if side.mode == "prompts shared" else "rival"
    others = [s for s in sides if s is not side and s.kind == wanted and s.times]
    if side.kind == "rival" or not others:
        return {}
    # The sides take turns, so the n-th steps of both are neighbours; a side that failed has fewer.
    pairs = zip(others[0].seconds(phase), side.seconds(phase), strict=False)
    name = others[0].provider if wanted == "rival" else others[0].mode
    return {"versus": name, "ratio": quantile([theirs / mine for theirs, mine in pairs], 0.5)}


def rows_of(part: str, side: Side, sides: Sequence[Side], session: Session) -> list[StepRow]:
    """Return a row for the step, its phases and the parts timed separately, or for their failures."""
    rows: list[StepRow] = []
    failures = {side.mode: (side.status, side.note)} if side.status != "ok" else {}
    if side.times:
        least, more = (
            least_of(part, side.mode, session),
            {"peak_memory_mb": side.peak / 1e6 if side.peak else None},
        )
        if part == "rm":
            more["rankings_per_s"] = session.args.rankings / quantile(side.seconds(), 0.5)
        whole = side.seconds()
        rows.append(
            timed_row(session, part, side, "", whole, least[""], **more, **against(side, sides))
        )
        for phase in [name for name in side.times[0] if name]:
            times = side.seconds(phase)
            share = 100 * quantile([t / s for t, s in zip(times, whole, strict=True)], 0.5)
            ratio = against(side, sides, phase)
            rows.append(
                timed_row(session, part, side, phase, times, least[phase], share_pct=share, **ratio)
            )
        rows += rows_of_others(part, side, session, least)
    for mode, (status, note) in (failures | side.failures).items():
        rows.append(make_row(session, part, side, mode, status=status, note=note))
    return rows


def rows_of_others(
    part: str, side: Side, session: Session, least: dict[str, Least]
) -> list[StepRow]:
    """Return rows for the parts timed separately, and for decoding.

    Decoding is what a rollout takes in addition to its prefill.
    """
    rows = [
        timed_row(session, part, side, name, t, least[name.split(",")[0]])
        for name, t in side.others.items()
    ]
    if "prefill" not in side.others:
        return rows
    prefill = quantile(side.others["prefill"], 0.5)
    rollouts = {"decode": side.seconds("rollout")}
    rollouts |= {
        f"decode,{name.partition(',')[2]}": t
        for name, t in side.others.items()
        if name != "prefill"
    }
    for name, times in rollouts.items():
        decoding = [t - prefill for t in times if t > prefill]
        if decoding:
            rows.append(timed_row(session, part, side, name, decoding, least["decode"]))
    return rows


def print_table(rows: Sequence[StepRow], console: Console) -> None:
    table = Table(box=None, padding=(0, 1), pad_edge=False)
    names = (
        "",
        "by",
        "s (p20-p80)",
        "share %",
        "tokens/s",
        "rankings/s",
        "TFLOP/s",
        "GB/s",
        "% of limit",
        "peak GB",
        "n",
        "times faster than",
    )
    for name in names:
        table.add_column(
            name,
            justify="left" if name in ("", "by", "times faster than") else "right",
            no_wrap=True,
        )
    for row in rows:
        if row.median_ms is None or row.p20_ms is None or row.p80_ms is None:
            continue
        median, low, high = (text_of(ms / 1e3) for ms in (row.median_ms, row.p20_ms, row.p80_ms))
        limit = f"{text_of(row.pct_sol)} {row.limit}"
        peak = text_of(row.peak_memory_mb / 1e3) if row.peak_memory_mb else ""
        ratio = f"{text_of(row.ratio)} {row.versus}" if row.ratio else ""
        table.add_row(
            f"{row.op} {row.mode}",
            row.provider,
            f"{median} ({low}-{high})",
            text_of(row.share_pct),
            text_of(row.tokens_per_s),
            text_of(row.rankings_per_s),
            text_of(row.tflop_per_s),
            text_of(row.gb_per_s),
            limit,
            peak,
            str(row.samples),
            ratio,
            style="green" if row.kind == "ours" else "",
        )
    console.print(table)
    for row in rows:
        if row.status != "ok":
            console.print(
                f"{row.op} {row.mode}, {row.provider}: {row.status}: {row.note}", markup=False
            )


# ---- the command -------------------------------------------------------------------------------


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(
        prog="python -m bench end-to-end",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, default in SIZES[device].items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(
            option, type=int, default=default, help=f"{HELP.get(name, '')} (default: {default})"
        )
    parser.add_argument(
        "--dtype", choices=tuple(DTYPES), default="bf16" if device == "cuda" else "fp32"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--alone", action="store_true", help="do not time transformers")
    parser.add_argument(
        "--budget",
        type=float,
        default=float("inf"),
        help="seconds after which nothing new is begun",
    )
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--out", type=Path, help="folder of the CSV file (default: bench/results/DEVICE)"
    )
    args = parser.parse_args(argv)
    if args.iterations < 1 or args.steps < 1 or args.warmup < 1:
        parser.error("--steps, --iterations and --warmup: expected 1 or more")
    if args.episodes % args.minibatch:
        parser.error(f"--minibatch {args.minibatch} does not divide --episodes {args.episodes}")
    return args


def measured_limits(args: argparse.Namespace, device: torch.device) -> Limits:
    return machine.measure_limits(device, (DTYPES[args.dtype],), quick=device.type == "cpu")


def start(args: argparse.Namespace) -> Session:
    began = time.monotonic()
    warnings.filterwarnings("ignore")
    logging.getLogger("fastrlhf.algorithms.ppo").setLevel(
        logging.ERROR
    )  # its warnings are about learning
    torch.set_num_threads(args.threads)
    mesh = meshes.initialize(ParallelConfig(), seed=1)
    limits = measured_limits(args, mesh.device)
    about = machine.describe(mesh.device, args.threads)
    return Session(args, RandomParts(make_task(args), mesh), limits, about, began + args.budget)


def main(argv: Sequence[str]) -> int:
    args = arguments(argv)
    console = Console(width=None if sys.stdout.isatty() else 170)
    if not args.alone and importlib.util.find_spec("transformers") is None:
        console.print("transformers is not installed: fastrlhf alone")
        args.alone = True
    session = start(args)
    rate = session.limits.matmul_tflop_s[DTYPES[args.dtype]]
    console.print(
        f"limits here: copy {session.limits.copy_gb_s:.4g} GB/s, matmul {rate:.4g} TFLOP/s {args.dtype}"
    )
    out = args.out or HERE / "results" / machine.folder_name(session.device)
    rows: list[StepRow] = []
    for part in args.parts:
        console.print(
            f"{part} ... ({machine.device_name(session.device)}, load {machine.load()})",
            markup=False,
        )
        new = run_part(part, session)
        release(session.device)
        results.append_csv(out / CSV_NAME, new)
        print_table(new, console)
        rows += new
    console.print(f"numbers: {out / CSV_NAME}", markup=False)
    meshes.finalize()
    return 1 if any(row.kind == "ours" and row.status == "failed" for row in rows) else 0
