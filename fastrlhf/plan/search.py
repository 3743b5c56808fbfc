"""The fastest settings that fit, found by planning each candidate."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fastrlhf.config import Config, load_config
from fastrlhf.errors import UserError
from fastrlhf.plan.hardware import Hardware
from fastrlhf.plan.planner import Plan, make_plan, may_fit, step_seconds
from fastrlhf.progress import Meter

_MICRO_BATCHES = (1, 2, 4, 8)
_TRIES = 30
"""Candidates whose memory is counted at most; counting takes seconds, timing none."""


@dataclass(frozen=True)
class Candidate:
    """Settings and their plan."""

    overrides: tuple[str, ...]
    plan: Plan

    @property
    def seconds(self) -> float:
        return self.plan.seconds["iteration"]["mid"]


def search(
    source: Path, overrides: list[str], command: str, gpus: int, gpu: Hardware, most: int = 5
) -> list[Candidate]:
    """Return the `most` fastest candidates that fit, the fastest first.

    Candidates differ in tensor, pipeline, micro-batch and recomputation, and for ppo in slots and
    offload. The configuration's other settings stay. All are timed; then the memory of the
    fastest is counted until enough of them fit.
    """
    config = load_config(source, overrides)
    timed = []
    for changes in _grid(config, command, gpus, gpu):
        try:
            candidate = load_config(source, [*overrides, *changes])
        except UserError:
            continue  # the configuration refuses this combination
        if not may_fit(candidate, command, gpus, gpu, source):
            continue
        timed.append((step_seconds(candidate, command, gpus, gpu, source), changes, candidate))
    timed.sort(key=lambda entry: entry[0])
    found: list[Candidate] = []
    with Meter("plan", most) as meter:
        for _, changes, candidate in timed[:_TRIES]:
            plan = make_plan(candidate, command, gpus, gpu, source)
            if plan.fits:
                found.append(Candidate(tuple(changes), plan))
                meter.update(len(found))
            if len(found) == most:
                break
    return sorted(found, key=lambda each: each.seconds)


def _grid(config: Config, command: str, gpus: int, gpu: Hardware) -> Iterator[list[str]]:
    """Yield the overrides of each candidate."""
    model = config.model
    tensors = [t for t in _powers(gpu.gpus_per_node) if model.num_kv_heads % t == 0]
    pipelines = [p for p in range(1, model.num_layers + 1) if model.num_layers % p == 0]
    samples = config.ppo.minibatch_size if command == "ppo" else config.train.global_batch_size
    for tensor, pipeline in itertools.product(tensors, pipelines):
        if gpus % (tensor * pipeline):
            continue
        data = gpus // (tensor * pipeline)
        if samples % data:
            continue
        slots = [""]
        if command == "ppo":
            prompts = config.ppo.batch_size // data
            slots = [f"generation.slots={n}" for n in {min(64, prompts), prompts}]
        options = itertools.product(_MICRO_BATCHES, ("none", "full"), slots, _offloads(command))
        for rows, recompute, rollout, offload in options:
            if samples // data % rows:
                continue
            yield [
                f"parallel.tensor={tensor}",
                f"parallel.pipeline={pipeline}",
                f"parallel.sequence={str(tensor > 1).lower()}",
                f"train.micro_batch_size={rows}",
                f"model.recompute={recompute}",
                *(setting for setting in (rollout, offload) if setting),
            ]


def _offloads(command: str) -> tuple[str, ...]:
    return ("ppo.offload=false", "ppo.offload=true") if command == "ppo" else ("",)


def _powers(most: int) -> list[int]:
    return [2**i for i in range(most.bit_length()) if 2**i <= most]
