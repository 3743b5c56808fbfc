"""How much of everything a quickstart of the tiny GPT does: as asked, as a run in the same folder did, or as measured.

A slow processor gets the short scale, so that the whole loop takes minutes on it too. The choice is written to
scale.json, because a run that resumes must keep the one it began with.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, Literal

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
"""Seconds of the whole loop at full scale / seconds of one of its pretraining steps: 1,460 were measured on two cores
of an AMD EPYC (AVX2) that took 773 s."""
MOST_SECONDS = 420.0
"""The full scale is run where it should take no longer than this."""


def choose(out: Path, asked: ScaleName, mesh: Mesh, config: Config) -> tuple[str, float | None]:
    """(name of the scale to run in the folder `out`, the measured seconds of a pretraining step if "auto" took them);
    all ranks call and get rank 0's answer. `config` is that of pretraining at full scale.

    Raises `UserError` where a run at another scale than the one asked for is there.
    """
    found: list[Any] = [_recorded(out, asked) if mesh.rank == 0 else None]
    dist.broadcast_object_list(found, src=0)
    recorded, problem = found[0]
    if problem is not None:
        raise UserError(problem)
    if recorded is None:
        seconds = step_seconds(mesh, config, SCALES["full"]) if asked == "auto" else None
        recorded = {
            "scale": scale_for(seconds) if seconds is not None else asked,
            "step_seconds": seconds,
        }
        if mesh.rank == 0:
            (out / "scale.json").write_text(json.dumps(recorded) + "\n")
    return recorded["scale"], recorded["step_seconds"]


def _recorded(out: Path, asked: ScaleName) -> tuple[dict[str, Any] | None, str | None]:
    """(what an earlier run left in scale.json, why this run cannot continue it)."""
    path = out / "scale.json"
    if not path.is_file():
        return None, None
    recorded = json.loads(path.read_text())
    if asked in ("auto", recorded["scale"]):
        return recorded, None
    return (
        None,
        f"{out}: holds a run at scale {recorded['scale']}; give another --out for --scale {asked}",
    )


def scale_for(seconds: float) -> str:
    """The scale for a machine on which a pretraining step takes `seconds`."""
    return "full" if seconds * FULL_STEPS <= MOST_SECONDS else "short"


def step_seconds(mesh: Mesh, config: Config, scale: Scale) -> float:
    """Seconds of a pretraining step on random tokens, the same on every rank: rank 0's fastest of four, so that another
    program's burst does not count. The model is thrown away, and nothing that a run draws depends on it.
    """
    with torch.random.fork_rng(devices=[mesh.device] if mesh.device.type == "cuda" else []):
        seconds = min(_times_of_steps(mesh, config, scale))
    fastest = torch.tensor(seconds, dtype=torch.float64, device=mesh.device)
    dist.broadcast(fastest, src=0)
    return float(fastest)


def _times_of_steps(mesh: Mesh, config: Config, scale: Scale, steps: int = 4) -> list[float]:
    stage = build_model(config.model, mesh, scale.vocab_size, seed=0)
    algorithm = SupervisedFinetuning(
        mesh, Learner(mesh, stage, config.optimizer, config.schedule, total_steps=steps)
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
