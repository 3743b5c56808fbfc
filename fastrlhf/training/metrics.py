"""Where a run's numbers go: metrics.jsonl, TensorBoard, Weights & Biases if asked, and a progress line with an ETA on
rank 0.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fastrlhf.config import LogConfig
from fastrlhf.training.integrity import replace_text

_SHOWN = ("loss", "accuracy", "reward", "kl", "grad_norm", "lr")


class MetricsLog:
    """Records one dict of numbers a step. On ranks other than 0 it does nothing."""

    def __init__(
        self, folder: Path, log: LogConfig, *, title: str, total_steps: int, start_step: int, is_main: bool
    ) -> None:
        self._file: IO[str] | None = None
        self._writer: Any = None
        self._wandb: Any = None
        self._progress: Progress | None = None
        self._is_main = is_main
        if not is_main:
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        _forget_after(path, start_step)
        self._file = path.open("a", buffering=1)
        if log.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1)
        if log.wandb_project:
            import wandb

            self._wandb = wandb.init(project=log.wandb_project, name=folder.name, dir=str(folder))
        if log.progress:
            self._progress = _progress_bar()
            self._task = self._progress.add_task(title, total=total_steps, completed=start_step, numbers="")

    def __enter__(self) -> MetricsLog:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(self, _type: type | None, _error: BaseException | None, _tb: TracebackType | None) -> None:
        if self._progress is not None:
            self._progress.stop()
        if self._writer is not None:
            self._writer.close()
        if self._wandb is not None:
            self._wandb.finish()
        if self._file is not None:
            self._file.close()

    def record(self, step: int, metrics: dict[str, float]) -> None:
        """Writes `metrics` of step `step` (1 is the first) everywhere and moves the progress line."""
        if not self._is_main:
            return
        assert self._file is not None
        self._file.write(json.dumps({"step": step, "time": round(time.time(), 3), **metrics}) + "\n")
        if self._writer is not None:
            for name, value in metrics.items():
                self._writer.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(metrics, step=step)
        if self._progress is not None:
            numbers = "  ".join(f"{name} {metrics[name]:.4g}" for name in _SHOWN if name in metrics)
            self._progress.update(self._task, completed=step, numbers=numbers)


class SampleLog:
    """Responses for people to read, a line each with its `iteration`. Give only the rank that writes files one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._started = False

    def __call__(self, iteration: int, records: Sequence[Mapping[str, Any]]) -> None:
        if not self._started:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            _forget_after(self._path, iteration - 1, "iteration")
            self._started = True
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps({"iteration": iteration, **record}) + "\n" for record in records)


def _progress_bar() -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[numbers]}"),
    )
    return Progress(*columns, console=Console(file=sys.stderr), refresh_per_second=4)


def _forget_after(path: Path, step: int, key: str = "step") -> None:
    """Drops lines past `step`, which a resumed run writes again, and a last line that a kill cut short."""
    if not path.is_file():
        return
    whole = path.read_text(encoding="utf-8").split("\n")[:-1]
    kept = [line for line in whole if line and json.loads(line)[key] <= step]
    replace_text(path, "".join(line + "\n" for line in kept))
