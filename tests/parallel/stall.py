"""torchrun --nproc-per-node 2 stall.py: rank 1 comes late to a collective; rank 0 says so and leaves."""

from __future__ import annotations

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
            time.sleep(600)
        mesh.sum_over_data(torch.ones(1))


if __name__ == "__main__":
    world = meshes.initialize(ParallelConfig(timeout_s=3), seed=0)
    with phase("step 7"):
        try:
            step(world)
        except RuntimeError as error:
            print(describe_failure(error), file=sys.stderr, flush=True)
    os._exit(1)
