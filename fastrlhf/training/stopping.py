"""Stops a run between two steps, on all ranks at the same one, when told to (SIGTERM, Ctrl-C) or out of time."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

INTERRUPT = "Ctrl-C (SIGINT)"
_REASONS = (None, "its time limit (train.max_seconds)", "SIGTERM", INTERRUPT)
_TOLD = {signal.SIGTERM: 2, signal.SIGINT: 3}


class StopRequest:
    """Catches SIGTERM and SIGINT inside the block; `reason` says on every rank the same why to stop now, or None.

    `deadline` is a `time.monotonic()` value. A second SIGTERM changes nothing: schedulers and torchrun both send one.
    A second SIGINT raises KeyboardInterrupt at once.
    """

    def __init__(self, device: torch.device, deadline: float | None) -> None:
        self._device = device
        self._deadline = deadline
        self._told = 0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._tell) for number in _TOLD}
        return self

    def __exit__(
        self, _type: type | None, _error: BaseException | None, _tb: TracebackType | None
    ) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _tell(self, number: int, _frame: FrameType | None) -> None:
        told = _TOLD[signal.Signals(number)]
        if number == signal.SIGINT:
            if self._told == told:
                raise KeyboardInterrupt
            if os.environ.get("RANK", "0") == "0":
                # Unbuffered: the signal may have come in the middle of a print.
                os.write(2, b"\ninterrupted: stopping after this step; once more stops at once\n")
        self._told = max(self._told, told)

    def reason(self) -> str | None:
        """Why all ranks stop after this step, if they do; a collective."""
        own = self._told or int(self._deadline is not None and time.monotonic() >= self._deadline)
        code = torch.tensor(own, device=self._device)
        dist.all_reduce(code, op=dist.ReduceOp.MAX)
        return _REASONS[int(code.item())]
