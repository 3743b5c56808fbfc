"""Kernel benchmarks.

python -m bench                  every op on this machine, at the default shapes
python -m bench gae logprobs --quick  some ops, tiny shapes, seconds
python -m bench logprobs --shapes 8192x128256 --dtypes bfloat16 --providers fastrlhf quack
python -m bench cpu-targets      the ratios that the CPU kernels are held to
python -m bench head-memory      memory of the trainers' losses, with and without the linear ops
python -m bench end-to-end       SFT, reward model and PPO-ptx of 1.3B, and plain Hugging Face
python -m bench generation       tokens per second of rollouts (bench/generation.py)
python -m bench ppo-iteration    a PPO iteration against TRL's trainer (bench/ppo_iteration.py)
python -m bench shared-prompt    a reward model's step, prompts encoded once or with every response
python -m bench report --out FOLDER  table and plots of earlier results
python -m bench list             ops and providers, and which of them are installed
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from bench import machine, results
from bench.cases import MODES, OPS, Op, Shape, parse_shape
from bench.providers import PROVIDERS
from bench.run import Session, run_case
from bench.timing import GPU_CLOCKS, Effort

HERE = Path(__file__).parent
COMMANDS = {
    "cpu-targets": "bench.cpu_targets",
    "end-to-end": "bench.end_to_end",
    "generation": "bench.generation",
    "head-memory": "bench.head_memory",
    "ppo-iteration": "bench.ppo_iteration",
    "shared-prompt": "bench.shared_prompt",
}
"""Benchmarks with separate options."""


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"of {', '.join(OPS)} (default: all)")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument(
        "--shapes", nargs="+", type=parse_shape, metavar="AxB", help="in place of the ops' defaults"
    )
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--modes", nargs="+", choices=MODES)
    parser.add_argument(
        "--clocks", nargs="+", choices=GPU_CLOCKS, help="on a GPU (default: all three)"
    )
    parser.add_argument(
        "--providers",
        nargs="+",
        default=(),
        metavar="NAME",
        help="any part of a name (default: all)",
    )
    parser.add_argument(
        "--out", type=Path, help="folder of the CSV file and plots (default: bench/results/DEVICE)"
    )
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--seconds", type=float, default=4.0, help="timing budget of a case and clock"
    )
    parser.add_argument("--rounds", type=int, default=100, help="most samples of each provider")
    parser.add_argument(
        "--budget",
        type=float,
        default=float("inf"),
        help="seconds after which nothing new is begun",
    )
    parser.add_argument(
        "--patience",
        type=float,
        default=300.0,
        help="seconds a provider may compile and tune itself",
    )
    parser.add_argument("--quick", action="store_true", help="tiny shapes, few samples")
    args = parser.parse_args(argv)
    known = (*OPS, "list", "report", *COMMANDS)
    for op in args.ops:
        if op not in known:
            parser.error(f"unknown op {op!r}: expected any of {', '.join(known)}")
    return args


def start(args: argparse.Namespace) -> Session:
    began = time.monotonic()
    device = torch.device(args.device)
    torch.set_num_threads(args.threads)
    dtypes = (torch.float32, torch.bfloat16)
    if args.quick:
        effort = Effort(
            min(args.seconds, 0.2), min_rounds=3, max_rounds=min(args.rounds, 10), warmup=1
        )
    else:
        effort = Effort(args.seconds, min_rounds=min(5, args.rounds), max_rounds=args.rounds)
    return Session(
        device,
        args.threads,
        effort,
        machine.measure_limits(device, dtypes, args.quick),
        machine.describe(device, args.threads),
        tuple(args.providers),
        began + args.budget,
        tuple(args.clocks or ()) if device.type == "cuda" else (),
        args.patience,
    )


def cases(args: argparse.Namespace, op: Op) -> list[tuple[str, Shape, torch.dtype]]:
    column = "quick" if args.quick else args.device
    shapes = [s for s in args.shapes or op.shapes[column] if len(s) == op.dims.count("x") + 1]
    if not shapes:
        raise SystemExit(f"python -m bench: {op.name} needs shapes {op.dims}")
    dtypes = [getattr(torch, d) for d in args.dtypes] if args.dtypes else op.dtypes[column]
    modes = [m for m in op.moved if not args.modes or m in args.modes]
    return [(mode, shape, dtype) for shape in shapes for dtype in dtypes for mode in modes]


def show(rows: Sequence[results.Row], out: Path, console: Console) -> None:
    results.print_table(rows, console)
    if results.plot(rows, out / results.PLOT_NAME):
        console.print(f"plots: {out / results.PLOT_NAME}", markup=False)


def measure(args: argparse.Namespace, out: Path, console: Console) -> int:
    session = start(args)
    rates = ", ".join(
        f"{r:.3g} TFLOP/s {str(d)[6:]}" for d, r in session.limits.matmul_tflop_s.items()
    )
    console.print(
        f"limits here: copy {session.limits.copy_gb_s:.4g} GB/s; matmul {rates}; load"
        f" {machine.load()}"
    )
    rows: list[results.Row] = []
    for name in args.ops or OPS:
        for mode, shape, dtype in cases(args, OPS[name]):
            console.print(
                f"{name} {mode} {'x'.join(map(str, shape))} {str(dtype)[6:]} ...", highlight=False
            )
            new = run_case(session, OPS[name], mode, shape, dtype)
            results.append_csv(out / results.CSV_NAME, new)
            rows += new
    show(rows, out, console)
    console.print(f"numbers: {out / results.CSV_NAME}", markup=False)
    broken = [r for r in rows if r.kind == "ours" and r.status in ("wrong", "failed")]
    return 1 if broken else 0


def listing(args: argparse.Namespace, console: Console) -> None:
    for name, op in OPS.items():
        console.print(f"{name}  [{op.dims}]  {', '.join(op.moved)}", markup=False, style="bold")
        for provider in PROVIDERS[name]:
            state = (
                ""
                if args.device in provider.devices
                else f"runs on {', '.join(provider.devices)} only"
            )
            if not state:
                try:
                    provider.load()
                    state = f"here {machine.version_of(provider.package or '')}"
                except ImportError as error:
                    state = f"not installed: {str(error).splitlines()[0]}"
            console.print(f"    {provider.name}: {state}", markup=False, highlight=False)


def main(argv: Sequence[str]) -> int:
    if argv and argv[0] in COMMANDS:
        # Imported when asked for: most need megatron, which the kernels' benchmarks do without.
        return importlib.import_module(COMMANDS[argv[0]]).main(argv[1:])
    args = arguments(argv)
    console = Console(width=None if sys.stdout.isatty() else 150)
    out = args.out or HERE / "results" / machine.folder_name(torch.device(args.device))
    if args.ops == ["list"]:
        listing(args, console)
        return 0
    if args.ops == ["report"]:
        path = out / results.CSV_NAME
        if not path.exists():
            raise SystemExit(
                f"python -m bench report: no {path}; measure first, or say where with --out"
            )
        show(results.latest(results.read_csv(path)), out, console)
        return 0
    return measure(args, out, console)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
