"""Progress and remaining time of long work: a live bar on a terminal, else lines on stderr."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column

_SECONDS_BETWEEN_LINES = 10.0
_WIDE = 100  # columns of a terminal with room for a bar next to the numbers


class Meter:
    """A context manager whose `update` shows how much of `total` is done.

    `start` is the part that was done before (a resumed run). With `percent` the share is shown (for
    bytes), else done/total (for steps). If stderr is not a terminal (batch jobs, files), a line is
    printed every ten seconds and when all is done.
    """

    def __init__(self, title: str, total: int, *, start: int = 0, percent: bool = False) -> None:
        console = Console(stderr=True)
        self._title, self._total, self._start, self._percent = title, max(total, 1), start, percent
        self._live = console.is_terminal
        self._bar = Progress(*_columns(console.width), console=console, refresh_per_second=4)
        self._task = self._bar.add_task(title, total=self._total, completed=start, done="", note="")
        self._began = time.monotonic()
        self._last_line = -_SECONDS_BETWEEN_LINES

    def __enter__(self) -> Meter:
        if self._live:
            self._bar.start()
        return self

    def __exit__(
        self, _type: type | None, _error: BaseException | None, _tb: TracebackType | None
    ) -> None:
        if self._live:
            self._bar.stop()

    def update(self, done: int, note: str = "") -> None:
        """Show that `done` of the total is done, with a few words or numbers after it."""
        amount = f"{100 * done // self._total}%" if self._percent else f"{done}/{self._total}"
        if self._live:
            self._bar.update(self._task, completed=done, done=amount, note=note)
            return
        elapsed = time.monotonic() - self._began
        if done < self._total and elapsed - self._last_line < _SECONDS_BETWEEN_LINES:
            return
        self._last_line = elapsed
        # Without progress there is no rate: one byte would stand for it, and the rest take years.
        left = "unknown"
        if done > self._start:
            seconds = elapsed * (self._total - done) / (done - self._start)
            left = str(timedelta(seconds=round(seconds)))
        times = f"{timedelta(seconds=round(elapsed))} (ETA {left})"
        print(f"{self._title} {amount}  {times}  {note}".rstrip(), file=sys.stderr, flush=True)


def _columns(width: int) -> list[ProgressColumn]:
    """Return the columns of the bar: steps and times are shown in full, the note is cut to fit."""
    fixed = Column(no_wrap=True)
    bar = [BarColumn(bar_width=20)] if width >= _WIDE else []
    note = Column(no_wrap=True, overflow="ellipsis", max_width=max(width - (70 if bar else 50), 10))
    return [
        TextColumn("{task.description} {task.fields[done]}", table_column=fixed),
        *bar,
        TimeElapsedColumn(table_column=fixed),
        TextColumn("ETA", table_column=fixed),
        TimeRemainingColumn(table_column=fixed),
        TextColumn("{task.fields[note]}", table_column=note),
    ]
