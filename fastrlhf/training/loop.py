"""The training loop: batches in, `algorithm.step(batch) -> metrics`, records, evaluations and checkpoints out."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import torch

from fastrlhf.checkpoint.checkpointer import Checkpointable, Checkpointer
from fastrlhf.config import Config
from fastrlhf.parallel.watchdog import phase
from fastrlhf.training.metrics import MetricsLog
from fastrlhf.training.stopping import INTERRUPT, StopRequest


class Algorithm(Checkpointable, Protocol):
    """What the loop is handed. `models` and `learners` say what a checkpoint holds, `state_dict` what is not a
    tensor.
    """

    def step(self, batch: Any) -> dict[str, float]: ...
    def state_dict(self) -> Mapping[str, object]: ...
    def load_state_dict(self, state: Mapping[str, object]) -> None: ...


class Batches(Protocol):
    """A resumable stream of global batches, this rank's part of each."""

    def __iter__(self) -> Any: ...
    def metrics(self) -> dict[str, float]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Stop(NamedTuple):
    """Why a run ended before its last step."""

    line: str
    """For the user."""
    interrupted: bool
    """By Ctrl-C: commands that would follow should not start."""


def resume(
    config: Config, algorithm: Algorithm, batches: Batches, checkpointer: Checkpointer
) -> int:
    """Restores the newest whole checkpoint if there is one and `checkpoint.resume` allows it; returns the steps already
    done. A process that torchrun has restarted always goes on from its own checkpoints.
    """
    with phase("resume"):
        if (
            config.checkpoint.resume == "never"
            and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        ):
            checkpointer.set_all_aside()
        if config.checkpoint.save:
            checkpointer.prepare()
        newest = checkpointer.newest()
        if newest is None:
            return 0
        state = checkpointer.load(newest, algorithm)
    batches.load_state_dict(state["data"])
    algorithm.load_state_dict(state["algorithm"])
    return state["step"]


def run(
    config: Config,
    algorithm: Algorithm,
    batches: Batches,
    checkpointer: Checkpointer,
    log: MetricsLog,
    *,
    total_steps: int,
    done: int = 0,
    deadline: float | None = None,
    evaluate: Callable[[], dict[str, float]] | None = None,
    finish: Callable[[], None] | None = None,
) -> Stop | None:
    """Runs steps done + 1 .. total_steps; evaluates and saves at their intervals and at the end.

    `finish` runs after the last update, before the last evaluation and checkpoint. On SIGTERM, Ctrl-C, and past
    `deadline` (a `time.monotonic()` value), the run saves after the current step and stops: returns why, else None. A
    second Ctrl-C stops at once. When a step fails, the checkpoint that is being written is completed.
    """
    step, reason = done, None
    stream: Iterable[Any] = iter(batches) if step < total_steps else ()
    with StopRequest(checkpointer.mesh.device, deadline) as stop, checkpointer:
        for batch in stream:
            start = time.perf_counter()
            step += 1
            with phase(f"step {step}"), log.traced(step):
                metrics = algorithm.step(batch) | batches.metrics()
            metrics |= _speed(metrics, time.perf_counter() - start)
            last = step == total_steps
            if last and finish is not None:
                with phase("finish"):
                    finish()
            evaluated = evaluate is not None and (last or _due(step, config.train.eval_interval))
            if evaluate is not None and evaluated:
                with phase("evaluation"):
                    metrics |= evaluate()
            if last or evaluated or _due(step, config.log.interval):
                log.record(step, metrics)
            reason = None if last else stop.reason()
            with phase("checkpoint"):
                if config.checkpoint.save and (
                    last or reason or _due(step, config.checkpoint.interval)
                ):
                    data, own = batches.state_dict(), algorithm.state_dict()
                    checkpointer.save(
                        step, algorithm, {"step": step, "data": data, "algorithm": own}, metrics
                    )
                else:
                    checkpointer.poll()
            if last or reason:
                break
        with phase("checkpoint"):
            checkpointer.finish()
    if reason is None:
        return None
    saved = (
        "saved, and the same command goes on from there"
        if config.checkpoint.save
        else "checkpoint.save is off"
    )
    return Stop(
        f"stopped by {reason} after step {step} of {total_steps}: {saved}", reason == INTERRUPT
    )


def _speed(metrics: dict[str, float], seconds: float) -> dict[str, float]:
    """Seconds of a step, tokens a second over all ranks if the step says its tokens, and on a GPU the most memory that
    tensors of rank 0 have held.
    """
    speed = {"seconds": seconds}
    if "tokens" in metrics:
        speed["tokens_per_second"] = metrics["tokens"] / seconds
    if torch.cuda.is_available():
        speed["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return speed


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0
