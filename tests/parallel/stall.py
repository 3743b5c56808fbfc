"""Rank 1 is late for a collective; rank 0 reports it and exits.

torchrun --nproc-per-node 2 stall.py

Imports and joining the groups have the limit of the start-up; the step has ten seconds.
"""

from __future__ import annotations

import contextlib
import os
import time

import torch

from fastrlhf.config import ParallelConfig
from fastrlhf.parallel import mesh as meshes
from fastrlhf.parallel.watchdog import Watchdog, phase


def step(mesh: meshes.Mesh) -> None:
    with phase("rollout"):
        if mesh.rank == 1:
            time.sleep(3600)
        mesh.sum_over_data(torch.ones(1))


if __name__ == "__main__":
    parallel = ParallelConfig(timeout_s=10, startup_timeout_s=1200)
    world = meshes.initialize(parallel, seed=0)
    with contextlib.suppress(RuntimeError), Watchdog(parallel) as watchdog:
        watchdog.end_start_up()
        with phase("step 7"):
            step(world)
    os._exit(1)
