"""The plan of a run: does it fit, what bounds it, how long does it take, what does it cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

from fastrlhf.config import Config
from fastrlhf.plan.hardware import GIB, Hardware
from fastrlhf.plan.layout import Layout
from fastrlhf.plan.memory import RankBytes, count_rank, kinds
from fastrlhf.plan.roles import Role, roles
from fastrlhf.plan.timing import Recompute, Timing
from fastrlhf.plan.workload import Batch, parameters, shape_of, total_steps, update_batch, work

_LENGTHS = {"low": 0.3, "mid": 0.6, "high": 1.0}
"""Mean response length as a share of generation.max_new_tokens, when nothing was measured."""
_SPREAD = {"low": 0.87, "mid": 1.0, "high": 1.17}
"""Range of a computed time: the worst misses of published tables (docs/plan.md)."""
CASES = ("low", "mid", "high")
TRANSIENT = ("activations", "KV cache", "gradient copy")
"""Parts of the memory that are not models."""


class RankJson(TypedDict):
    """Memory of one kind of rank, in GiB."""

    kind: str
    static_gib: float
    peak_gib: dict[str, float]
    host_gib: float


class PlanJson(TypedDict):
    """What `fastrlhf plan --json` prints."""

    fits: bool
    binding: str
    ranks: list[RankJson]
    seconds: dict[str, dict[str, float]]
    bubble: float
    disk_gib: float
    pflops_days: float
    gpu_hours: float
    energy_kwh: float
    tokens: float
    notes: list[str]


@dataclass(frozen=True)
class Rank:
    """Memory of one kind of rank, in bytes."""

    kind: str
    stage: int
    parts: dict[str, dict[str, int]]
    """Of each phase at its peak: the models by name, then activations and the KV cache."""
    host: int
    """Of the models that wait in host memory."""

    @property
    def static(self) -> int:
        """Bytes of the models that stay on the device, with gradients and optimizer states."""
        return sum(v for name, v in self.parts["update"].items() if name not in TRANSIENT)

    @property
    def peak(self) -> dict[str, int]:
        """The most that is held in each phase."""
        return {phase: sum(parts.values()) for phase, parts in self.parts.items()}


@dataclass(frozen=True)
class Plan:
    """The answer of `plan`."""

    config: Config
    command: str
    gpu: Hardware
    gpus: int
    ranks: list[Rank]
    seconds: dict[str, dict[str, float]]
    """Of one step (for ppo an iteration): phase -> low, mid, high; `iteration` is their sum."""
    bubble: float
    """Share of an update in which a pipeline stage waits."""
    slots: int
    """Sequences that decode at once on a data-parallel rank; 0 without rollouts."""
    checkpoint_bytes: int
    pflops_days: float
    tokens: float
    """Trained in the run."""
    steps: int
    """Of the run; 0 if the number of records is unknown."""
    notes: list[str] = field(default_factory=list)

    @property
    def limit(self) -> float:
        """Bytes that a rank's tensors may take."""
        gpu = self.gpu
        return (gpu.memory_gib - gpu.reserved_gib) * GIB / gpu.fragmentation

    @property
    def worst(self) -> tuple[Rank, str]:
        """The kind of rank and the phase that hold the most."""
        return max(
            ((rank, phase) for rank in self.ranks for phase in rank.peak),
            key=lambda pair: pair[0].peak[pair[1]],
        )

    @property
    def fits(self) -> bool:
        rank, phase = self.worst
        return rank.peak[phase] <= self.limit

    @property
    def binding(self) -> str:
        """What bounds the run, in one sentence."""
        rank, phase = self.worst
        need = self.device_gib(rank.peak[phase])
        has = self.gpu.memory_gib
        where = f"{phase} needs {need:.1f} of {has:.1f} GiB on the {rank.kind} stage"
        if not self.fits:
            return f"{where}: {self._cure(rank, phase)}"
        slowest = max((p for p in self.seconds if p != "iteration"), key=self._mid)
        share = self._mid(slowest) / self._mid("iteration")
        return f"{where}; {slowest} takes {share:.0%} of the time"

    def _mid(self, phase: str) -> float:
        return self.seconds[phase]["mid"]

    def _cure(self, rank: Rank, phase: str) -> str:
        config, cures = self.config, []
        if self.command == "ppo" and not config.ppo.offload:
            cures.append("ppo.offload=true")
        if config.model.recompute != "full" and rank.static <= self.limit:
            cures.append("model.recompute=full")
        if config.train.micro_batch_size > 1 and rank.static <= self.limit:
            cures.append(f"train.micro_batch_size={config.train.micro_batch_size // 2}")
        if phase == "rollout" and self.slots > 1:
            cures.append(f"generation.slots={self.slots // 2}")
        deeper = 2 * config.parallel.pipeline
        if config.model.num_layers % deeper == 0:
            cures.append(f"parallel.pipeline={deeper} (on {2 * self.gpus} GPUs)")
        return "set " + ", or ".join(cures) if cures else "use GPUs with more memory"

    def device_gib(self, tensors: float) -> float:
        """Return what a GPU shows as used when its tensors take `tensors` bytes."""
        return tensors * self.gpu.fragmentation / GIB + self.gpu.reserved_gib

    def to_json(self) -> PlanJson:
        """Return the plan as JSON; docs/plan.md describes the keys."""
        hours = self._mid("iteration") * self.steps * self.gpus / 3600
        return {
            "fits": self.fits,
            "binding": self.binding,
            "ranks": [
                {
                    "kind": rank.kind,
                    "static_gib": round(rank.static / GIB, 3),
                    "peak_gib": {p: round(self.device_gib(b), 3) for p, b in rank.peak.items()},
                    "host_gib": round(rank.host / GIB, 3),
                }
                for rank in self.ranks
            ],
            "seconds": {
                phase: {case: round(values[case], 4) for case in CASES}
                for phase, values in self.seconds.items()
            },
            "bubble": round(self.bubble, 4),
            "disk_gib": round(self.disk_bytes / GIB, 2),
            "pflops_days": round(self.pflops_days, 4),
            "gpu_hours": round(hours, 1),
            "energy_kwh": round(hours * self.gpu.watts / 1000, 1),
            "tokens": self.tokens,
            "notes": self.notes,
        }

    @property
    def disk_bytes(self) -> int:
        """Bytes of the checkpoints that are on disk at once."""
        kept = self.config.checkpoint.keep_last
        interval, steps = self.config.checkpoint.interval, self.steps
        written = 1 if not interval else max(1, steps // interval)
        return self.checkpoint_bytes * (min(written, kept) if kept else written)


def make_plan(
    config: Config,
    command: str,
    gpus: int,
    gpu: Hardware,
    source: Path,
    *,
    response_length: float | None = None,
    samples: int | None = None,
) -> Plan:
    """Return the plan of `command` on `gpus` GPUs.

    - source: the file of `config`.
    - response_length: the mean of an earlier run, in tokens.
    - samples: records of data.train; by default they are counted, if the files exist.

    Raises UserError if the GPUs cannot be split as `parallel` says.
    """
    layout = Layout.of(config.parallel, gpus)
    models, notes = roles(config, command, source)
    batch = update_batch(config, command, layout, config.generation.max_new_tokens)
    counted = [
        count_rank(config, models, layout, kind, stage, batch.tokens)
        for kind, stage in kinds(layout)
    ]
    slots = _slots(config, layout, counted, gpu) if command == "ppo" else 0
    steps, assumed = total_steps(config, command, samples)
    flops, tokens = work(config, command, models, steps)
    clock = _Clock(config, command, models, layout, gpu, slots, response_length)
    return Plan(
        config=config,
        command=command,
        gpu=gpu,
        gpus=gpus,
        ranks=[_rank(config, command, models, layout, each, batch, slots) for each in counted],
        seconds=clock.seconds(),
        bubble=clock.timings["policy" if command == "ppo" else "model"].bubble(batch.count),
        slots=slots,
        checkpoint_bytes=_checkpoint_bytes(models),
        pflops_days=flops / (1e15 * 86400),
        tokens=tokens,
        steps=steps,
        notes=[*notes, *assumed],
    )


def step_seconds(config: Config, command: str, gpus: int, gpu: Hardware, source: Path) -> float:
    """Return the seconds of a step or iteration, the middle case, as if everything fitted."""
    layout = Layout.of(config.parallel, gpus)
    models, _ = roles(config, command, source)
    prompts = math.ceil(config.ppo.batch_size / layout.data)
    slots = min(config.generation.slots, prompts)
    clock = _Clock(config, command, models, layout, gpu, slots, None)
    return clock.seconds()["iteration"]["mid"]


def may_fit(config: Config, command: str, gpus: int, gpu: Hardware, source: Path) -> bool:
    """Return False if the models alone surely do not fit: a bound that costs nothing.

    Weights, fp32 gradients, and the optimizer's fp32 weights and moments, all evenly split.
    """
    layout = Layout.of(config.parallel, gpus)
    models, _ = roles(config, command, source)
    shares = layout.data if config.optimizer.distributed else 1
    held = 0.0
    for role in models:
        size = 4.0 if role.model.dtype == "fp32" else 2.0
        if role.is_trained:
            size += 4 + 12 / shares
        held += 0 if role.is_offloaded else size * parameters(role)
    return held / (layout.tensor * layout.pipeline) < gpu.memory_gib * GIB


def _rank(
    config: Config,
    command: str,
    models: Sequence[Role],
    layout: Layout,
    counted: RankBytes,
    batch: Batch,
    slots: int,
) -> Rank:
    """Return the memory of each phase on the rank that was counted."""
    waiting = {role.name for role in models if role.is_offloaded}
    resident = {name: size for name, size in counted.weights.items() if name not in waiting}
    host = sum(counted.weights[name] for name in waiting)
    in_flight = min(batch.count, layout.pipeline - counted.stage)
    training = max(held.in_flight(in_flight) for held in counted.training.values())
    # Every model is built on the device before some are moved to the host.
    parts = {"start": dict(counted.weights), "update": resident | {"activations": training}}
    if command == "ppo":
        if config.ppo.gamma_ptx > 0:
            # The first update of an iteration measures the norms of two gradients.
            parts["first update"] = parts["update"] | {"gradient copy": counted.gradients}
        length = config.data.max_prompt_tokens + config.generation.max_new_tokens
        cache = counted.cache_row * (slots + layout.pipeline) * length
        prefill = counted.scoring["policy"].peak
        parts["rollout"] = resident | {"activations": prefill, "KV cache": cache}
        parts["scoring"] = resident | _scoring_parts(counted, waiting)
    return Rank(counted.kind, counted.stage, parts, host)


def _scoring_parts(counted: RankBytes, waiting: set[str]) -> dict[str, int]:
    """Return what scoring holds in addition: one model at a time, with its weights if it waits."""
    options = [
        {"activations": held.peak} | ({name: counted.weights[name]} if name in waiting else {})
        for name, held in counted.scoring.items()
    ]
    return max(options, key=lambda parts: sum(parts.values()))


def _slots(config: Config, layout: Layout, counted: Sequence[RankBytes], gpu: Hardware) -> int:
    """Return how many sequences decode at once on a data-parallel rank.

    The engine's rule (generation/memory.py): generation.slots, this rank's prompts, and what half
    of the free memory (or generation.cache_mb) holds.
    """
    generation = config.generation
    wanted = min(generation.slots, math.ceil(config.ppo.batch_size / layout.data))
    length = config.data.max_prompt_tokens + generation.max_new_tokens
    for rank in counted:
        free = (gpu.memory_gib - gpu.reserved_gib) * GIB - sum(rank.weights.values())
        budget = generation.cache_mb * 1e6 if generation.cache_mb else free / 2
        spare = min(layout.pipeline, wanted)
        wanted = min(wanted, int(budget // (rank.cache_row * length)) - spare)
    return max(wanted, 1)


def _checkpoint_bytes(models: Sequence[Role]) -> int:
    """Return the bytes of a checkpoint: weights of what a run saves, and optimizer states."""
    total = 0
    for role in models:
        weights = parameters(role)
        size = 4 if role.model.dtype == "fp32" else 2
        if role.is_trained:
            total += weights * (size + 12)  # fp32 master weights and two moments
        elif role.name == "average":
            total += weights * size
    return total


class _Clock:
    """Seconds of the phases of one step."""

    def __init__(
        self,
        config: Config,
        command: str,
        models: Sequence[Role],
        layout: Layout,
        gpu: Hardware,
        slots: int,
        response_length: float | None,
    ) -> None:
        self.config, self.command, self.layout, self.gpu = config, command, layout, gpu
        self.slots, self.response_length = slots, response_length
        self.models = models
        self.timings = {role.name: Timing(shape_of(role), layout, gpu) for role in models}

    def seconds(self) -> dict[str, dict[str, float]]:
        """Return phase -> {low, mid, high}, with their sum as `iteration`."""
        phases: dict[str, Callable[[float], float]] = {"update": self._update}
        if self.command == "ppo":
            phases = {"rollout": self._rollout, "scoring": self._scoring, "update": self._update}
        table = {
            name: {case: _SPREAD[case] * phase(self._response(case)) for case in CASES}
            for name, phase in phases.items()
        }
        table["iteration"] = {
            case: sum(values[case] for values in list(table.values())) for case in CASES
        }
        return table

    def _response(self, case: str) -> float:
        if self.response_length is not None:
            return self.response_length
        return _LENGTHS[case] * self.config.generation.max_new_tokens

    def _rollout(self, response: float) -> float:
        config, timing = self.config, self.timings["policy"]
        prompts = math.ceil(config.ppo.batch_size / self.layout.data)
        prompt = config.data.max_prompt_tokens
        prefill = timing.scoring(prompt, prompt, prompts)
        # Freed slots are refilled at once, so that the slots stay full until the queue is empty;
        # then the longest response is awaited.
        steps = response * prompts / self.slots
        waiting = config.generation.max_new_tokens - response
        full = steps * timing.decode_step(self.slots, prompt + response / 2)
        last = waiting * timing.decode_step(max(1, self.slots // 4), prompt + response)
        return prefill + full + last

    def _scoring(self, response: float) -> float:
        config = self.config
        batch = update_batch(config, "ppo", self.layout, response)
        count = math.ceil(batch.count * config.ppo.batch_size / config.ppo.minibatch_size)
        seconds = 0.0
        for role in self.models:
            if role.name in ("reference", "value", "reward"):
                seconds += self.timings[role.name].scoring(batch.tokens, batch.length, count)
            if role.is_offloaded:
                layout = self.layout
                own = 2 * parameters(role) / (layout.tensor * layout.pipeline)
                seconds += 2 * own / (self.gpu.host_link_gb_s * 1e9)
        return seconds

    def _update(self, response: float) -> float:
        config = self.config
        batch = update_batch(config, self.command, self.layout, response)
        recompute: Recompute = config.model.recompute
        is_sharded = config.optimizer.distributed and self.layout.data > 1
        if self.command != "ppo":
            timing = self.timings["model"]
            passes = timing.training(batch.tokens, batch.length, batch.count, recompute)
            return passes + timing.optimizer(is_sharded=is_sharded)
        ppo, length = config.ppo, config.data.sequence_length
        policy, value = self.timings["policy"], self.timings["value"]
        seconds = policy.training(batch.tokens, batch.length, batch.count, recompute)
        if ppo.gamma_ptx > 0:
            windows = ppo.minibatch_size * ppo.ptx_per_episode / self.layout.data
            rows = min(config.train.micro_batch_size, math.ceil(windows))
            seconds += policy.training(rows * length, length, math.ceil(windows / rows), recompute)
        seconds += value.training(batch.tokens, batch.length, batch.count, recompute)
        for timing in (policy, value):
            seconds += timing.optimizer(is_sharded=is_sharded)
        return seconds * ppo.inner_epochs * ppo.batch_size / ppo.minibatch_size
