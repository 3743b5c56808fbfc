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
from pathlib import Path

import torch
from rich.console import Console

from bench import machine, results
from bench.machine import Limits
from bench.sides import Session, Side, begin, race, release, time_others
from bench.step_rows import StepRow, print_table, rows_of
from bench.trainers import RandomParts, Steps, Trainers, make_task
from fastrlhf.config import ParallelConfig
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
    "prompt": (
        "tokens of a prompt: PPO's; elsewhere the longest, the others down to a quarter of it"
    ),
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
        f"limits here: copy {session.limits.copy_gb_s:.4g} GB/s, matmul {rate:.4g} TFLOP/s"
        f" {args.dtype}"
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
