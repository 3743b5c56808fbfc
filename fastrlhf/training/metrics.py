"""Logs of a run: metrics.jsonl, TensorBoard, Weights & Biases, progress, traces and samples."""

from __future__ import annotations

import json
import math
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Protocol

import torch
import yaml

from fastrlhf.checkpoint.integrity import replace_text
from fastrlhf.config import LogConfig
from fastrlhf.progress import Meter

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_SHOWN = ("loss", "accuracy", "reward", "kl", "grad_norm", "lr")


class _WandbRun(Protocol):
    """A run of Weights & Biases."""

    def log(self, data: dict[str, float], step: int) -> None: ...
    def finish(self) -> None: ...


class MetricsLog:
    """Records the metrics of each step on rank 0; does nothing on other ranks."""

    def __init__(
        self,
        folder: Path,
        log: LogConfig,
        *,
        title: str,
        total_steps: int,
        start_step: int,
        is_main: bool,
    ) -> None:
        self._folder = folder
        self._profile_step = log.profile_step
        self._opened = ExitStack()
        self._file: IO[str] | None = None
        self._writer: SummaryWriter | None = None
        self._wandb: _WandbRun | None = None
        self._progress: Meter | None = None
        self._is_main = is_main
        if not is_main:
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        _drop_lines_after(path, start_step)
        self._file = self._opened.enter_context(path.open("a", buffering=1))
        if log.wandb_project:
            self._wandb = _wandb_run(folder, log.wandb_project, resumed=start_step > 0)
            self._opened.callback(self._wandb.finish)
        if log.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1)
            self._opened.callback(self._writer.close)
        if log.progress:
            self._progress = self._opened.enter_context(Meter(title, total_steps, start=start_step))

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._opened.__exit__(kind, error, traceback)

    @contextmanager
    def traced(self, step: int) -> Iterator[None]:
        """Run a step, under torch's profiler if it is `log.profile_step`.

        The profiler writes trace_STEP.json into the folder.
        """
        if not self._is_main or step != self._profile_step:
            yield
            return
        with torch.profiler.profile() as profile:
            yield
        profile.export_chrome_trace(str(self._folder / f"trace_{step}.json"))

    def record(self, step: int, metrics: dict[str, float]) -> None:
        """Write the metrics of `step` (the first is 1) to all logs and update the progress line.

        In metrics.jsonl a value that is not finite is null, because JSON has no NaN.
        """
        if not self._is_main:
            return
        assert self._file is not None
        numbers = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._file.write(
            json.dumps({"step": step, "time": round(time.time(), 3), **numbers}) + "\n"
        )
        if self._writer is not None:
            for name, value in metrics.items():
                self._writer.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(metrics, step=step)
        if self._progress is not None:
            note = "  ".join(f"{name} {metrics[name]:.4g}" for name in _SHOWN if name in metrics)
            self._progress.update(step, note)


def _wandb_run(folder: Path, project: str, resumed: bool) -> _WandbRun:
    """Start or resume the Weights & Biases run of an output folder.

    Its settings are the folder's config.yaml, its id is in the file wandb_run.
    """
    import wandb

    path = folder / "wandb_run"
    if not (resumed and path.is_file()):
        replace_text(path, uuid.uuid4().hex[:8])
    settings = folder / "config.yaml"
    config = yaml.safe_load(settings.read_text(encoding="utf-8")) if settings.is_file() else None
    return wandb.init(
        project=project,
        name=folder.name,
        dir=str(folder),
        id=path.read_text(),
        resume="allow",
        config=config,
    )


class SampleLog:
    """Appends sampled responses to a JSONL file, with their `iteration`; for one rank only."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._started = False

    def __call__(self, iteration: int, records: Sequence[Mapping[str, object]]) -> None:
        """Append `records`; before the first ones, drop lines that a resumed run repeats."""
        if not self._started:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            _drop_lines_after(self._path, iteration - 1, "iteration")
            self._started = True
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(
                json.dumps({"iteration": iteration, **record}) + "\n" for record in records
            )


def _drop_lines_after(path: Path, step: int, key: str = "step") -> None:
    """Drop lines past `step`, which a resumed run writes again, and an incomplete last line."""
    if not path.is_file():
        return
    complete = path.read_text(encoding="utf-8").split("\n")[:-1]
    kept = [line for line in complete if line and json.loads(line)[key] <= step]
    replace_text(path, "".join(line + "\n" for line in kept))
