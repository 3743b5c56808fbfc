"""How far a long pass over files is, and how long it will still take: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import logging
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

log = logging.getLogger(__name__)

_LINE_EVERY = 30.0  # seconds, where there is no terminal


class Pass:
    """A context in which `update` tells the bytes done of `total`, and a few words."""

    def __init__(self, title: str, total: int) -> None:
        console = Console(stderr=True)
        self._title, self._total, self._live = title, max(total, 1), console.is_terminal
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, TextColumn("{task.fields[note]}"), console=console, transient=True)
        self._task = self._bar.add_task(title, total=self._total, note="")
        self._start = self._told = time.monotonic()

    def __enter__(self) -> Pass:
        if self._live:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._bar.stop()

    def update(self, done: int, note: str) -> None:
        """`done` bytes of the total; on a terminal the bar moves, elsewhere a line is logged every 30 seconds."""
        if self._live:
            self._bar.update(self._task, completed=done, note=note)
            return
        now = time.monotonic()
        if now - self._told >= _LINE_EVERY and done > 0:
            self._told = now
            left = (now - self._start) * (self._total - done) / done
            log.info("%s: %d%%, %s, about %d s left", self._title, 100 * done // self._total, note, left)
