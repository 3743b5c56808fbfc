"""Stop requests: SIGTERM, Ctrl-C or a time limit end a run after the same step on all ranks."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType

import torch
import torch.distributed as dist

INTERRUPT = "Ctrl-C (SIGINT)"
TIME_LIMIT = "its time limit (train.max_seconds)"
_REASONS = (None, TIME_LIMIT, "SIGTERM", INTERRUPT)
_CODES = {signal.SIGTERM: 2, signal.SIGINT: 3}
"""Index into `_REASONS`; the highest of all ranks counts."""
_Handler = Callable[[int, FrameType | None], object] | int | None


class StopRequest:
    """Catches SIGTERM and SIGINT inside a `with` block, for a stop after the current step.

    All ranks stop together (`reason`). `deadline` is a `time.monotonic()` value. A second SIGTERM
    changes nothing, because schedulers and torchrun both send one. A second SIGINT raises
    KeyboardInterrupt immediately.
    """

    def __init__(self, device: torch.device, deadline: float | None) -> None:
        self._device = device
        self._deadline = deadline
        self._code = 0
        self._previous: dict[signal.Signals, _Handler] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in _CODES}
        return self

    def __exit__(
        self, _type: type | None, _error: BaseException | None, _tb: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        code = _CODES[signal.Signals(number)]
        if number == signal.SIGINT:
            if self._code == code:
                raise KeyboardInterrupt
            if os.environ.get("RANK", "0") == "0":
                # Unbuffered: the signal may have come in the middle of a print.
                os.write(2, b"\ninterrupted: stopping after this step; once more stops at once\n")
        self._code = max(self._code, code)

    def reason(self) -> str | None:
        """Return why all ranks stop after this step, or None; a collective."""
        own = self._code or int(self._deadline is not None and time.monotonic() >= self._deadline)
        code = torch.tensor(own, device=self._device)
        dist.all_reduce(code, op=dist.ReduceOp.MAX)
        return _REASONS[int(code.item())]
