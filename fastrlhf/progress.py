"""How far long work is and how long it will take: a live bar on a terminal, else a line on stderr now and then."""

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
_WIDE = 100  # columns of a terminal that has room for a bar beside the numbers


class Meter:
    """A context in which `update` says how much of `total` is done, of which `start` was there before.

    `percent` shows a share (for bytes), else done/total (for steps). Where stderr is no terminal (batch jobs, files) a
    line is printed every ten seconds and when all is done, so that a log that is followed never falls silent.
    """

    def __init__(self, title: str, total: int, *, start: int = 0, percent: bool = False) -> None:
        console = Console(stderr=True)
        self._title, self._total, self._start, self._percent = title, max(total, 1), start, percent
        self._live = console.is_terminal
        self._bar = Progress(*_columns(console.width), console=console, refresh_per_second=4)
        self._task = self._bar.add_task(title, total=self._total, completed=start, done="", note="")
        self._began = time.monotonic()
        self._told = -_SECONDS_BETWEEN_LINES

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
        """`done` of the total, and a few words or numbers to stand beside it."""
        amount = f"{100 * done // self._total}%" if self._percent else f"{done}/{self._total}"
        if self._live:
            self._bar.update(self._task, completed=done, done=amount, note=note)
            return
        elapsed = time.monotonic() - self._began
        if done < self._total and elapsed - self._told < _SECONDS_BETWEEN_LINES:
            return
        self._told = elapsed
        left = elapsed * (self._total - done) / max(done - self._start, 1)
        times = f"{timedelta(seconds=round(elapsed))} (ETA {timedelta(seconds=round(left))})"
        print(f"{self._title} {amount}  {times}  {note}".rstrip(), file=sys.stderr, flush=True)


def _columns(width: int) -> list[ProgressColumn]:
    """Steps and times stay whole; of the note at the right, what does not fit is cut."""
    whole = Column(no_wrap=True)
    bar = [BarColumn(bar_width=20)] if width >= _WIDE else []
    note = Column(no_wrap=True, overflow="ellipsis", max_width=max(width - (70 if bar else 50), 10))
    return [
        TextColumn("{task.description} {task.fields[done]}", table_column=whole),
        *bar,
        TimeElapsedColumn(table_column=whole),
        TextColumn("ETA", table_column=whole),
        TimeRemainingColumn(table_column=whole),
        TextColumn("{task.fields[note]}", table_column=note),
    ]
