"""torchrun --nproc-per-node 2 stall.py: rank 1 comes late to a collective; rank 0 says so and leaves.

Imports take longer than the limit on collectives, and on a busy machine one rank's much longer than the other's. So the
ranks meet first, and then have the limit for every step of joining the groups.
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
