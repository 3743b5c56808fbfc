"""Rank 1 is late for a collective; rank 0 reports it and exits.

torchrun --nproc-per-node 2 stall.py

Imports take longer than the timeout of collectives, and on a busy machine one rank's take much
longer than the other's. So the ranks first wait for each other, and each step of joining the groups
has the full timeout.
"""

from __future__ import annotations

import datetime
import os
import sys
import time

import torch

from fastrlhf.config import ParallelConfig
from fastrlhf.parallel import mesh as meshes
from fastrlhf.parallel.watchdog import describe_failure, phase


def step(mesh: meshes.Mesh) -> None:
    with phase("rollout"):
        if mesh.rank == 1:
            time.sleep(3600)
        mesh.sum_over_data(torch.ones(1))


if __name__ == "__main__":
    store, rank, _ = meshes._rendezvous()
    store.set(f"imported by {rank}", "")
    store.wait(["imported by 0", "imported by 1"], datetime.timedelta(minutes=20))
    world = meshes.initialize(ParallelConfig(timeout_s=10), seed=0)
    with phase("step 7"):
        try:
            step(world)
        except RuntimeError as error:
            print(describe_failure(error), file=sys.stderr, flush=True)
    os._exit(1)
