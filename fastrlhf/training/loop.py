"""The training loop: batches in, `algorithm.step(batch) -> metrics`, records, evaluations and checkpoints out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from fastrlhf.config import Config
from fastrlhf.parallel.watchdog import phase
from fastrlhf.training.checkpoint import Checkpointer
from fastrlhf.training.metrics import MetricsLog


class Algorithm(Protocol):
    """What the loop is handed. `models` and `learners` say what a checkpoint holds, `state_dict` what is not a
    tensor.
    """

    def step(self, batch: Any) -> dict[str, float]: ...
    def models(self) -> dict[str, Any]: ...
    def learners(self) -> dict[str, Any]: ...
    def statistics(self) -> dict[str, float]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Batches(Protocol):
    """A resumable stream of global batches, this rank's part of each."""

    def __iter__(self) -> Any: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def resume(config: Config, algorithm: Algorithm, batches: Batches, checkpointer: Checkpointer) -> int:
    """Restores the newest checkpoint if there is one and `checkpoint.resume` allows it; returns the steps already
    done.
    """
    newest = checkpointer.latest() if config.checkpoint.resume == "auto" else None
    if newest is None:
        return 0
    with phase("resume"):
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
    evaluate: Callable[[], dict[str, float]] | None = None,
    finish: Callable[[], None] | None = None,
) -> None:
    """Runs steps done + 1 .. total_steps; evaluates and saves at their intervals and at the end.

    `finish` runs after the last update, before the last evaluation and checkpoint.
    """
    step = done
    stream: Iterable[Any] = iter(batches) if step < total_steps else ()
    for batch in stream:
        start = time.perf_counter()
        step += 1
        with phase(f"step {step}"):
            metrics = algorithm.step(batch)
        metrics["seconds"] = time.perf_counter() - start
        last = step == total_steps
        if last and finish is not None:
            with phase("finish"):
                finish()
        if evaluate is not None and (last or _due(step, config.train.eval_interval)):
            with phase("evaluation"):
                metrics |= evaluate()
        if last or _due(step, config.log.interval):
            log.record(step, metrics)
        if config.checkpoint.save and (last or _due(step, config.checkpoint.interval)):
            with phase("checkpoint"):
                checkpointer.save(
                    step, algorithm, {"step": step, "data": batches.state_dict(), "algorithm": algorithm.state_dict()}
                )
        if last:
            break


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0
