"""Many short runs of two ranks, up to their exit; test_exits.py reads the statuses.

python run_exits.py FOLDER RUNS, with the debug configurations' data in FOLDER/data

Everything is imported once, and the ranks are forked from here. They unwind to the end of this
script, so that the interpreter exits as at the end of any program. Several runs share the machine,
which keeps it busy.

The condition that makes an exit dangerous (see fastrlhf/parallel/exit.py) is rare, so each rank
creates it: its last exit handler starts a collective whose thread holds the last reference to the
tensor, and that thread requests the interpreter's lock while the main thread holds it and enters
finalization.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from ranks import meet

from fastrlhf import cli
from fastrlhf.algorithms.sft import SupervisedFinetuning
from fastrlhf.data.tokenize import load_tokenizer
from fastrlhf.errors import UserError
from fastrlhf.evaluation import report  # noqa: F401
from fastrlhf.parallel import mesh as meshes
from fastrlhf.run import train  # noqa: F401

AT_ONCE = 4
THREADS_LEFT = 99
"""Exit status of a rank whose program has not ended all its Python threads."""


def fail(error: Exception) -> Callable[[int], None]:
    def act(rank: int) -> None:
        if rank == 1:
            # The other rank does not join this collective.
            meshes_joined[0].data_group.allreduce([torch.ones(1)])
            raise error

    return act


def interrupt(*ranks: int, times: int = 1, number: int = signal.SIGINT) -> Callable[[int], None]:
    def act(rank: int) -> None:
        for _ in range(times if rank in ranks else 0):
            os.kill(os.getpid(), number)

    return act


ENDINGS: dict[str, Callable[[int], None]] = {
    "done": lambda rank: None,
    "user error": fail(UserError("a mistake")),
    "SIGTERM": interrupt(1, number=signal.SIGTERM),
    "defect": fail(ZeroDivisionError("a defect")),
    "Ctrl-C": interrupt(0, 1),
    "Ctrl-C twice": interrupt(1, times=2),
}
"""Action of each rank in the second step."""
meshes_joined: list[meshes.Mesh] = []


def rank_of_a_run(folder: Path, name: str, ending: str) -> None:
    """Run the program of one rank; raises SystemExit, or the exception of the ending."""
    act, initialize, step = ENDINGS[ending], meshes.initialize, SupervisedFinetuning.step

    def initialize_and_remember(*arguments: Any) -> meshes.Mesh:
        meshes_joined.append(initialize(*arguments))
        atexit.register(exit_with_a_collective_under_way)
        return meshes_joined[0]

    def step_and_act(self: SupervisedFinetuning, batch: Any) -> dict[str, float]:
        metrics = step(self, batch)
        if len(steps) == 1:
            act(int(os.environ["RANK"]))
        steps.append(1)
        return metrics

    steps: list[int] = []
    meshes.initialize = initialize_and_remember
    SupervisedFinetuning.step = step_and_act  # type: ignore[method-assign]
    sys.argv = ["fastrlhf", "pretrain", str(folder / "run.yaml"), f"output_dir={folder / name}"]
    cli.program()


def exit_with_a_collective_under_way() -> None:
    """Start a collective and return while its thread waits for the interpreter's lock."""
    if len(threading.enumerate()) > 1:
        print(f"threads left: {threading.enumerate()}", file=sys.stderr, flush=True)
        os._exit(THREADS_LEFT)
    sys.setswitchinterval(60)  # gloo's thread waits this long before it requests the lock
    meshes_joined[0].data_group.allreduce([torch.ones(1)])
    end = time.perf_counter() + 0.03
    while time.perf_counter() < end:
        pass


def start(folder: Path, name: str, ending: str) -> list[int]:
    """Fork the ranks of one run; return their process ids, in the parent only."""
    children = []
    with socket.create_server(("127.0.0.1", 0)) as listening:
        for rank in range(2):
            child = os.fork()
            if child == 0:
                log = os.open(folder / f"{name}.{rank}.log", os.O_WRONLY | os.O_CREAT)
                os.dup2(log, 1)
                os.dup2(log, 2)
                meet(listening, rank, 2)
                rank_of_a_run(folder, name, ending)
                raise AssertionError("a program ends with SystemExit")
            children.append(child)
    return children


CONFIG = """
model: {family: gpt, num_layers: 1, hidden_size: 16, num_heads: 2, ffn_size: 32,
  max_positions: 32, dtype: fp32}
parallel: {timeout_s: 1200}
data: {tokenizer: DATA/tokenizer, train: DATA/text.jsonl, sequence_length: 16, cache: DATA/cache}
optimizer: {lr: 1.0e-3}
train: {steps: 3, global_batch_size: 2, micro_batch_size: 1}
checkpoint: {interval: 1}
output_dir: replaced
"""


def main(folder: Path, runs: int) -> None:
    (folder / "run.yaml").write_text(CONFIG.replace("DATA", str(folder / "data")))
    # Imports of the first use, and the cache of tokens, are made here once and not in every run.
    load_tokenizer(folder / "data" / "tokenizer")
    for module in ("megatron.core.transformer.moe.experts", "torch.utils.tensorboard"):
        importlib.import_module(module)
    endings = [list(ENDINGS)[number % len(ENDINGS)] for number in range(runs)]
    statuses = [[0, 0] for _ in endings]
    running: dict[int, tuple[int, int]] = {}
    begun = 0
    while begun < runs or running:
        while begun < runs and len(running) < 2 * AT_ONCE:
            children = start(folder, f"run{begun}", endings[begun])
            running |= {child: (begun, rank) for rank, child in enumerate(children)}
            begun += 1
        child, status = os.wait()
        number, rank = running.pop(child)
        statuses[number][rank] = os.waitstatus_to_exitcode(status)
    (folder / "exits.json").write_text(json.dumps(list(zip(endings, statuses, strict=True))))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
