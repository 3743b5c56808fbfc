"""Stops a run between two steps, on all ranks at the same one, when it is told to (SIGTERM) or its time is up."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

_REASONS = (None, "its time limit (train.max_seconds)", "SIGTERM")


class StopRequest:
    """Catches SIGTERM inside the block; `reason` says on every rank the same why to stop now, or None.

    `deadline` is a `time.monotonic()` value. A second SIGTERM changes nothing: schedulers and torchrun both send one.
    """

    def __init__(self, device: torch.device, deadline: float | None) -> None:
        self._device = device
        self._deadline = deadline
        self._told = False
        self._before: Any = None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._tell)
        return self

    def __exit__(self, _type: type | None, _error: BaseException | None, _tb: TracebackType | None) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _tell(self, _number: int, _frame: FrameType | None) -> None:
        self._told = True

    def reason(self) -> str | None:
        """Why all ranks stop after this step, if they do; a collective."""
        own = 2 if self._told else int(self._deadline is not None and time.monotonic() >= self._deadline)
        code = torch.tensor(own, device=self._device)
        dist.all_reduce(code, op=dist.ReduceOp.MAX)
        return _REASONS[int(code.item())]
