"""The training loop: steps of an algorithm, with logs, evaluations and checkpoints."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple, Protocol, TypeVar

import torch
import torch.distributed as dist

from fastrlhf.checkpoint.checkpointer import Checkpointable, Checkpointer
from fastrlhf.config import Config
from fastrlhf.errors import UserError
from fastrlhf.parallel.watchdog import phase
from fastrlhf.training.health import HealthMonitor
from fastrlhf.training.metrics import MetricsLog
from fastrlhf.training.stopping import INTERRUPT, TIME_LIMIT, StopRequest

Batch = TypeVar("Batch")
BatchOut = TypeVar("BatchOut", covariant=True)
BatchIn = TypeVar("BatchIn", contravariant=True)


class Algorithm(Checkpointable, Protocol[BatchIn]):
    """What the loop trains: a checkpoint holds its models, learners, statistics and state."""

    def step(self, batch: BatchIn) -> dict[str, float]:
        """Train on this rank's part of a global batch; return the metrics of the step."""
        ...

    def state_dict(self) -> Mapping[str, object]:
        """Return the state in addition to models and learners, for JSON."""
        ...

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Restore what `state_dict` returned."""
        ...


class Batches(Protocol[BatchOut]):
    """A resumable stream of global batches, this rank's part of each."""

    def __iter__(self) -> Iterator[BatchOut]: ...

    def metrics(self) -> dict[str, float]:
        """Return the metrics of the last batch."""
        ...

    def state_dict(self) -> Mapping[str, object]:
        """Return the position of the next batch, for JSON."""
        ...

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Continue at the position that `state_dict` returned."""
        ...


class Stop(NamedTuple):
    """Why a run ended before its last step, or was asked to during it."""

    line: str
    """Message for the user."""
    interrupted: bool
    """True after Ctrl-C: commands that would follow should not start."""
    finished: bool
    """True if the signal came during the last step: what would follow in this process is stopped."""


def resume(
    config: Config,
    algorithm: Algorithm[Batch],
    batches: Batches[Batch],
    checkpointer: Checkpointer,
) -> int:
    """Restore the newest intact checkpoint, if any; return the number of steps already done.

    With `checkpoint.resume` "never", earlier checkpoints are renamed instead. Processes that
    torchrun has restarted always resume from the run's own checkpoints.
    """
    with phase("resume"):
        if config.checkpoint.resume == "never" and not _is_restarted(checkpointer.mesh.device):
            checkpointer.rename_all_unused()
        if config.checkpoint.save:
            checkpointer.prepare()
        newest = checkpointer.newest()
        if newest is None:
            return 0
        state = checkpointer.load(newest, algorithm)
    try:
        batches.load_state_dict(state["data"])
        algorithm.load_state_dict(state["algorithm"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{newest / 'state.json'}: not the state of this command's run"
            f" ({type(error).__name__}: {error}); give another output_dir"
        ) from None
    return state["step"]


def _is_restarted(device: torch.device) -> bool:
    """Return whether torchrun has restarted any rank; a collective.

    The torchrun of a node that was replaced counts from 0 again.
    """
    restarts = torch.tensor(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")), device=device)
    dist.all_reduce(restarts, op=dist.ReduceOp.MAX)
    return bool(restarts.item())


def run(
    config: Config,
    algorithm: Algorithm[Batch],
    batches: Batches[Batch],
    checkpointer: Checkpointer,
    log: MetricsLog,
    *,
    total_steps: int,
    done: int = 0,
    deadline: float | None = None,
    started: Callable[[], None] | None = None,
    evaluate: Callable[[], dict[str, float]] | None = None,
    finish: Callable[[], None] | None = None,
) -> Stop | None:
    """Run steps done + 1 .. total_steps, evaluating and saving at their intervals and at the end.

    `started` runs after the first step. `finish` runs after the last update, before the last
    evaluation and checkpoint. On SIGTERM,
    Ctrl-C, and past `deadline` (a `time.monotonic()` value), the run saves after the current step,
    stops, and returns the reason (of a signal even in the last step). If a step fails, the
    checkpoint in progress is completed.

    Raises DivergedError if a loss, a gradient or a weight is not finite, with the checkpoint to
    continue from. Raises UserError at the end if no update of a model was applied.
    """
    health = HealthMonitor(algorithm, checkpointer, done)
    step, reason = done, None
    stream: Iterable[Batch] = batches if step < total_steps else ()
    stopping = StopRequest(checkpointer.mesh.device, deadline)
    with stopping as stop, health.advice(), checkpointer:
        for batch in stream:
            step += 1
            last = step == total_steps
            metrics = _step(step, algorithm, batch, batches, health, log)
            if step == done + 1 and started is not None:
                started()
            if last and finish is not None:
                with phase("finish"):
                    finish()
            if last:
                health.check_applied()
                health.check_weights(step)
            evaluated = evaluate is not None and (last or _due(step, config.train.eval_interval))
            if evaluate is not None and evaluated:
                with phase("evaluation"):
                    validation = evaluate()
                health.check_validation(step, validation)
                metrics |= validation
            if last or evaluated or _due(step, config.log.interval):
                log.record(step, metrics)
            reason = stop.reason()
            if last and reason == TIME_LIMIT:
                reason = None
            due = last or reason is not None or _due(step, config.checkpoint.interval)
            with phase("checkpoint"):
                if config.checkpoint.save and due:
                    _save(checkpointer, step, algorithm, batches, metrics)
                else:
                    checkpointer.poll()
            if last or reason:
                break
        with phase("checkpoint"):
            checkpointer.finish()
    return None if reason is None else _stop(config, reason, step, total_steps)


def _step(
    step: int,
    algorithm: Algorithm[Batch],
    batch: Batch,
    batches: Batches[Batch],
    health: HealthMonitor,
    log: MetricsLog,
) -> dict[str, float]:
    """Train on one global batch; return the metrics of the step, speed included."""
    start = time.perf_counter()
    with phase(f"step {step}"), log.traced(step):
        metrics = algorithm.step(batch) | batches.metrics()
    health.check(step, metrics)
    return metrics | _speed(metrics, time.perf_counter() - start)


def _save(
    checkpointer: Checkpointer,
    step: int,
    algorithm: Algorithm[Batch],
    batches: Batches[Batch],
    metrics: dict[str, float],
) -> None:
    data, own = batches.state_dict(), algorithm.state_dict()
    checkpointer.save(step, algorithm, {"step": step, "data": data, "algorithm": own}, metrics)


def _stop(config: Config, reason: str, step: int, total_steps: int) -> Stop:
    saved = "saved, and the same command continues from there"
    after = saved if config.checkpoint.save else "checkpoint.save is off"
    line = f"stopped by {reason} after step {step} of {total_steps}: {after}"
    return Stop(line, interrupted=reason == INTERRUPT, finished=step == total_steps)


def _speed(metrics: dict[str, float], seconds: float) -> dict[str, float]:
    """Return the seconds of a step, tokens per second and peak memory.

    Tokens are those of all ranks, if the step reports "tokens". The memory is that of tensors on
    the GPU of this rank since the start.
    """
    speed = {"seconds": seconds}
    if "tokens" in metrics:
        speed["tokens_per_second"] = metrics["tokens"] / seconds
    if torch.cuda.is_available():
        speed["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return speed


def _due(step: int, interval: int) -> bool:
    """Return whether `step` is a multiple of `interval`; an interval of 0 is never due."""
    return interval > 0 and step % interval == 0
