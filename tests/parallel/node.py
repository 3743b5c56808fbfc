"""One of two nodes: forks two ranks of the command line for each case, and records how they end.

torchrun --nnodes 2 --nproc-per-node 1 node.py FOLDER, in a working folder of each node's own

Everything is imported once, and the ranks of a case are forked from here, so that a case costs a
second. The ranks meet through torchrun's store. test_two_nodes.py reads FOLDER/CASE.RANK.log and
FOLDER/node*.json.
"""

from __future__ import annotations

import datetime
import errno
import importlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ranks import fork

from fastrlhf import cli
from fastrlhf.algorithms.sft import SupervisedFinetuning
from fastrlhf.checkpoint import folder_writer
from fastrlhf.data.tokenize import load_tokenizer
from fastrlhf.evaluation import report  # noqa: F401
from fastrlhf.parallel import rendezvous
from fastrlhf.run import train  # noqa: F401

RANKS_OF_A_NODE, WORLD_SIZE = 2, 4
TIMEOUT_S = 8
"""parallel.timeout_s of the cases in which a rank hangs."""


def in_step_2(act: Callable[[], None]) -> None:
    """Call `act` at the begin of the second step."""
    step, steps = SupervisedFinetuning.step, []

    def step_and_act(self: SupervisedFinetuning, batch: Any) -> dict[str, float]:
        steps.append(1)
        if len(steps) == 2:
            act()
        return step(self, batch)

    SupervisedFinetuning.step = step_and_act  # type: ignore[method-assign]


def send_signal(number: int) -> None:
    in_step_2(lambda: os.kill(os.getpid(), number))


def fill_disk() -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    folder_writer.save_tensors = fail


def other_torch() -> None:
    torch.__version__ = "2.0.0"


SHORT = f"parallel.timeout_s={TIMEOUT_S}"
# Case -> (arguments of both nodes, arguments of the second node, rank -> what it does first).
# The cases of a group run at the same time.
Case = tuple[list[str], list[str], dict[int, Callable[[], None]]]
GROUPS: list[dict[str, Case]] = [
    {
        "lr": ([], ["optimizer.lr=0.002"], {}),
        "seed": ([], ["train.seed=77"], {}),
        "data": (["data.train=[own.jsonl]"], [], {}),
        "tokenizer": (["data.tokenizer=tokenizer"], [], {}),
        "version": ([], [], {3: other_torch}),
        "variable": ([], [], {2: lambda: os.environ.__setitem__("NCCL_ALGO", "Ring")}),
        "output_dir": (["output_dir=own"], [], {}),
        "mistake": ([], ["optimizer.lr=fast"], {}),
        "mistake on node 0": (["optimizer.lr=fast"], ["optimizer.lr=0.001"], {}),
    },
    {
        "tensor": (["parallel.tensor=4", "data.cache=cache"], [], {}),
        "stopped": ([SHORT], [], {3: partial(send_signal, signal.SIGSTOP)}),
        "killed": ([], [], {2: partial(send_signal, signal.SIGKILL)}),
        "disk": (["checkpoint.interval=1"], [], {2: fill_disk}),
    },
    {
        "resumed": (["output_dir=FOLDER/out/tensor", "train.steps=4"], [], {}),
        "endless": ([SHORT, "ppo.reward_function=endless:score"], [], {}),
    },
]


def rank_of_a_case(folder: Path, node: int, local_rank: int, name: str, case: Case) -> None:
    """Run the command line of one rank; raises SystemExit."""
    rank = RANKS_OF_A_NODE * node + local_rank
    both, second, faults = case
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(WORLD_SIZE),
        "LOCAL_WORLD_SIZE": str(RANKS_OF_A_NODE),
    }
    connect = rendezvous._torchrun_store

    def connect_case(timeout_s: float) -> tuple[dist.Store, int, int]:
        store, *place = connect(timeout_s)
        return dist.PrefixStore(name, store), *place

    rendezvous._torchrun_store = connect_case
    faults.get(rank, lambda: None)()
    command = "ppo" if name == "endless" else "pretrain"
    arguments = [f"output_dir={folder / 'out' / name}", *both, *(second if node else [])]
    arguments = [argument.replace("FOLDER", str(folder)) for argument in arguments]
    sys.argv = ["fastrlhf", command, str(folder / f"{command}.yaml"), *arguments]
    try:
        cli.program()
    except SystemExit as ended:
        sys.stderr.flush()
        os._exit(int(ended.code or 0))


def run_group(folder: Path, node: int, group: dict[str, Case]) -> dict[str, dict[int, list]]:
    """Run the ranks of this node of all cases; return case -> rank -> [status, seconds]."""
    running: dict[int, tuple[str, int]] = {}
    ended: dict[str, dict[int, list]] = {name: {} for name in group}
    begin = time.monotonic()
    for name, case in group.items():
        for local_rank in range(RANKS_OF_A_NODE):
            rank = RANKS_OF_A_NODE * node + local_rank
            work = partial(rank_of_a_case, folder, node, local_rank, name, case)
            running[fork(work, {}, folder / f"{name}.{rank}.log")] = (name, rank)
    while running:
        for child in list(running):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                name, rank = running.pop(child)
                seconds = time.monotonic() - begin
                ended[name][rank] = [os.waitstatus_to_exitcode(status), seconds]
        if all(name == "stopped" and rank == 3 for name, rank in running.values()):
            for child in running:  # nobody else ends a stopped process
                os.kill(child, signal.SIGKILL)
        time.sleep(0.05)
    return ended


def main(folder: Path) -> None:
    node = int(os.environ["GROUP_RANK"])
    load_tokenizer(folder / "tokenizer")
    for module in ("megatron.core.transformer.moe.experts", "torch.utils.tensorboard"):
        importlib.import_module(module)
    store = next(dist.rendezvous("env://"))[0]
    results: dict[str, Any] = {"host": socket.gethostname(), "ended": {}}
    for number, group in enumerate(GROUPS):
        store.set(f"group {number} node {node}", "")
        both = [f"group {number} node {other}" for other in range(2)]
        store.wait(both, datetime.timedelta(minutes=20))
        results["ended"] |= run_group(folder, node, group)
    (folder / f"node{node}.json").write_text(json.dumps(results))
    store.set(f"done {node}", "")
    store.wait(["done 0", "done 1"], datetime.timedelta(minutes=20))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
