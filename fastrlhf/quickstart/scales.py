"""Choice of the quickstart's scale: by the user, by an earlier run, or by the speed of the machine.

A slow processor gets the short scale, so that the full loop takes minutes on it too. The choice is
written to scale.json, because a resumed run must keep its scale.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Literal, TypedDict

import torch
import torch.distributed as dist

from fastrlhf.algorithms.sft import SupervisedFinetuning
from fastrlhf.config import Config
from fastrlhf.data.batches import pack_windows
from fastrlhf.errors import UserError
from fastrlhf.models.gpt import build_model
from fastrlhf.parallel.mesh import Mesh
from fastrlhf.quickstart.configs import SCALES, Scale
from fastrlhf.training.optimizer import Learner

ScaleName = Literal["auto", "full", "short"]

FULL_STEPS = 1500
"""Time of the full loop at full scale in pretraining steps.

Measured: 1,460 on two cores of an AMD EPYC (AVX2), which took 773 s.
"""
MAX_SECONDS = 420.0
"""The full scale is run if it is expected to take no longer than this."""


class ScaleRecord(TypedDict):
    """Contents of scale.json; `step_seconds` is None if the speed was not measured."""

    scale: str
    step_seconds: float | None


def choose(out: Path, requested: ScaleName, mesh: Mesh, config: Config) -> tuple[str, float | None]:
    """Return (name of the scale to run in the folder `out`, seconds of a pretraining step).

    The seconds are None unless "auto" measured them. `config` is that of pretraining at full scale.
    A collective call: all ranks get rank 0's result. Raises UserError if `out` has a run at another
    scale than `requested`.
    """
    message: list[tuple[ScaleRecord | None, str | None]]
    message = [_load_record(out, requested) if mesh.rank == 0 else (None, None)]
    dist.broadcast_object_list(message, src=0)
    recorded, problem = message[0]
    if problem is not None:
        raise UserError(problem)
    if recorded is None:
        seconds = step_seconds(mesh, config, SCALES["full"]) if requested == "auto" else None
        recorded = {
            "scale": scale_for(seconds) if seconds is not None else requested,
            "step_seconds": seconds,
        }
        if mesh.rank == 0:
            (out / "scale.json").write_text(json.dumps(recorded) + "\n")
    return recorded["scale"], recorded["step_seconds"]


def _load_record(out: Path, requested: ScaleName) -> tuple[ScaleRecord | None, str | None]:
    """Return (scale.json of an earlier run, the reason why this run cannot resume it)."""
    path = out / "scale.json"
    if not path.is_file():
        return None, None
    recorded: ScaleRecord = json.loads(path.read_text())
    if requested in ("auto", recorded["scale"]):
        return recorded, None
    return None, (
        f"{out}: has a run at scale {recorded['scale']}; give another --out for --scale {requested}"
    )


def scale_for(seconds: float) -> str:
    """Return the scale for a machine on which a pretraining step takes `seconds`."""
    return "full" if seconds * FULL_STEPS <= MAX_SECONDS else "short"


def step_seconds(mesh: Mesh, config: Config, scale: Scale) -> float:
    """Return the seconds of a pretraining step on random tokens, the same on every rank.

    It is the fastest of four steps on rank 0, so that a short load by another program does not
    count. The model is discarded, and the random state of the run is not changed.
    """
    with torch.random.fork_rng(devices=[mesh.device] if mesh.device.type == "cuda" else []):
        seconds = min(_time_steps(mesh, config, scale))
    fastest = torch.tensor(seconds, dtype=torch.float64, device=mesh.device)
    dist.broadcast(fastest, src=0)
    return float(fastest)


def _time_steps(mesh: Mesh, config: Config, scale: Scale, steps: int = 4) -> list[float]:
    model = build_model(config.model, mesh, scale.vocab_size, seed=0)
    algorithm = SupervisedFinetuning(
        mesh, Learner(mesh, model, config.optimizer, config.schedule, total_steps=steps)
    )
    draw = torch.Generator().manual_seed(0)
    windows = torch.randint(
        scale.vocab_size, (scale.batch, scale.window + 1), generator=draw
    ).tolist()
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        algorithm.step([pack_windows(windows)])
        seconds.append(time.perf_counter() - start)
    return seconds
