"""Logs of a run: metrics.jsonl, TensorBoard, Weights & Biases, progress, traces and samples."""

from __future__ import annotations

import json
import logging
import math
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

import torch
import yaml

from fastrlhf.checkpoint.integrity import replace_text
from fastrlhf.config import LogConfig
from fastrlhf.log_lines import read_log
from fastrlhf.progress import Meter

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger(__name__)
_SHOWN = (
    *("loss", "accuracy", "reward", "kl", "grad_norm", "lr"),
    *("valid_loss", "valid_accuracy", "valid_score", "valid_kl"),
)


class _WandbRun(Protocol):
    """A run of Weights & Biases."""

    def log(self, data: dict[str, float], step: int) -> None: ...
    def finish(self) -> None: ...


class MetricsLog:
    """Records the metrics of each step on rank 0; does nothing on other ranks.

    A log that cannot be written is a warning: it never stops the run.
    """

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
        self._path = folder / "metrics.jsonl"
        self._profile_step = log.profile_step
        self._opened = ExitStack()
        self._failures = _Failures()
        self._writer: SummaryWriter | None = None
        self._wandb: _WandbRun | None = None
        self._progress: Meter | None = None
        self._is_main = is_main
        if not is_main:
            return
        with self._failures.of(str(self._path)):
            folder.mkdir(parents=True, exist_ok=True)
            _drop_lines_after(self._path, start_step)
        if log.wandb_project:
            with self._failures.of("Weights & Biases"):
                self._wandb = _wandb_run(folder, log.wandb_project, resumed=start_step > 0)
                self._at_exit("Weights & Biases", self._wandb.finish)
        if log.tensorboard:
            with self._failures.of("TensorBoard"):
                from torch.utils.tensorboard import SummaryWriter

                path = str(folder / "tensorboard")
                self._writer = SummaryWriter(path, purge_step=start_step + 1)
                self._at_exit("TensorBoard", self._writer.close)
        if log.progress:
            with self._failures.of("progress"):
                meter = Meter(title, total_steps, start=start_step)
                self._progress = meter.__enter__()
                self._at_exit("progress", lambda: meter.__exit__(None, None, None))

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._opened.__exit__(kind, error, traceback)

    def _at_exit(self, name: str, close: Callable[[], object]) -> None:
        """Call `close` at the end; its failure is a warning about the log `name`."""

        def guarded() -> None:
            with self._failures.of(name):
                close()

        self._opened.callback(guarded)

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
        path = str(self._folder / f"trace_{step}.json")
        with self._failures.of(path):
            profile.export_chrome_trace(path)

    def record(self, step: int, metrics: dict[str, float]) -> None:
        """Write the metrics of `step` (the first is 1) to all logs and update the progress line.

        In metrics.jsonl a value that is not finite is null, because JSON has no NaN.
        """
        if not self._is_main:
            return
        numbers = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        with self._failures.of(str(self._path)):
            line = {"step": step, "time": round(time.time(), 3), **numbers}
            append_lines(self._path, [line])
        if self._writer is not None:
            with self._failures.of("TensorBoard"):
                for name, value in metrics.items():
                    self._writer.add_scalar(name, value, step)
        if self._wandb is not None:
            with self._failures.of("Weights & Biases"):
                self._wandb.log(metrics, step=step)
        if self._progress is not None:
            note = "  ".join(f"{name} {metrics[name]:.4g}" for name in _SHOWN if name in metrics)
            with self._failures.of("progress"):
                self._progress.update(step, note)


class _Failures:
    """Turns failures of a log into one warning for each log."""

    def __init__(self) -> None:
        self._names: set[str] = set()

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Run a block that writes the log `name`; an exception is a warning, the first time."""
        try:
            yield
        except Exception as error:  # of the file system, or of TensorBoard's and W&B's own code
            if name not in self._names:
                self._names.add(name)
                words = getattr(error, "strerror", None) or " ".join(str(error).split())
                logger.warning(
                    "warning: log-failed: %s: %s; training continues, and this log is incomplete",
                    *(name, words or type(error).__name__),
                )


def append_lines(path: Path, records: Iterable[Mapping[str, object]]) -> None:
    """Append records to a JSONL file; an incomplete last line of an earlier failure is ended first.

    Raises OSError.
    """
    text = "".join(json.dumps(record) + "\n" for record in records)
    with path.open("ab+", buffering=0) as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        left = memoryview(text.encode())
        while left:  # a full disk takes a part, then raises
            left = left[file.write(left) or 0 :]


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
    """Appends sampled responses to a JSONL file, with their `iteration`; for one rank only.

    A file that cannot be written is a warning: it never stops the run.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._started = False
        self._failures = _Failures()

    def __call__(self, iteration: int, records: Sequence[Mapping[str, object]]) -> None:
        """Append `records`; before the first ones, drop lines that a resumed run repeats."""
        with self._failures.of(str(self._path)):
            if not self._started:
                self._started = True
                self._path.parent.mkdir(parents=True, exist_ok=True)
                _drop_lines_after(self._path, iteration - 1, "iteration")
            append_lines(self._path, [{"iteration": iteration, **record} for record in records])


def _drop_lines_after(path: Path, step: int, key: str = "step") -> None:
    """Drop lines past `step`, which a resumed run writes again, and an incomplete last line.

    Broken lines are moved to PATH.broken.
    """
    if not path.is_file():
        return
    log = read_log(path, key)
    if log.broken:
        with path.with_name(path.name + ".broken").open("ab") as file:
            file.write(b"".join(line + b"\n" for line in log.broken))
    kept = [record for record in log.records if record[key] <= step]
    replace_text(path, "".join(json.dumps(record) + "\n" for record in kept))
