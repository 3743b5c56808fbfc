"""Report of a collective that hangs or fails: rank, phase and collective.

Trainers name their phases with `phase("rollout")`. gloo raises if a collective takes longer than
`parallel.timeout_s`. With NCCL the wait is in a CUDA synchronization: the watchdog thread detects
that the main thread has not left the same collective or synchronization, reports it and ends the
process, so that torchrun stops the other ranks.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from types import FrameType, TracebackType

_phases: list[str] = []
_COLLECTIVE_FILES = ("distributed_c10d.py",)
# Matches calls of these methods in a line of code, but not a loop over `items` or `os.cpu_count()`.
_WAITS = re.compile(r"\.(wait|synchronize|item|tolist|cpu)\(")


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """Name the phase of a `with` block; nested phases are reported as `outer/inner`."""
    _phases.append(name)
    try:
        yield
    except BaseException:
        # Keep the innermost phase for the report: the exception leaves all of them.
        _failed_in.setdefault("phase", current_phase())
        raise
    finally:
        _phases.pop()


_failed_in: dict[str, str] = {}


def current_phase() -> str:
    """Return the phase that this rank is in, `start-up` before the first one."""
    return "/".join(_phases) or "start-up"


def _find_collective(frames: list[traceback.FrameSummary]) -> tuple[str, str] | None:
    """Return (collective, file:line of its caller in this project), or None.

    The collective is the outermost torch.distributed call in the stack.
    """
    caller = ""
    for frame in frames:
        if frame.filename.endswith(_COLLECTIVE_FILES) and frame.name != "wrapper":
            return frame.name, caller
        if f"{os.sep}fastrlhf{os.sep}" in frame.filename:
            caller = f"{os.path.basename(frame.filename)}:{frame.lineno}"
    return None


def describe_failure(error: BaseException) -> str | None:
    """Describe a failed or timed-out collective in one line: rank, phase, collective, caller.

    Returns None if `error` is not the failure of a collective.
    """
    where = _find_collective(traceback.extract_tb(error.__traceback__))
    if where is None:
        return None
    name, caller = where
    rank = os.environ.get("RANK", "0")
    in_phase = _failed_in.get("phase", current_phase())
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return f"rank {rank}: collective {name} failed in phase '{in_phase}' ({caller}): {reason}"


class Watchdog:
    """Context manager that reports collectives that fail or hang.

    If a collective has not returned for `timeout_s` seconds (with a margin for gloo's own timeout),
    it ends the process.
    """

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._main = threading.main_thread().ident
        self._stop = threading.Event()
        # A daemon, because an interrupt between __enter__ and the block would leave it running.
        self._thread = threading.Thread(target=self._watch, name="collective-watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(
        self, _type: type | None, error: BaseException | None, _tb: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()  # returns immediately: the thread waits for nothing else
        if error is not None and (line := describe_failure(error)) is not None:
            print(f"error: {line}", file=sys.stderr, flush=True)

    def _watch(self) -> None:
        seen: tuple | None = None
        since = time.monotonic()
        # The margin lets gloo's own timeout come first: it raises an error with more information.
        limit = self.timeout_s * 1.2 + 10
        while not self._stop.wait(min(10.0, self.timeout_s / 4)):
            frame = sys._current_frames().get(self._main or 0)
            position = _waiting_at(frame)
            if position is None or position != seen:
                seen, since = position, time.monotonic()
            elif time.monotonic() - since > limit:
                self._report(frame)

    def _report(self, frame: FrameType | None) -> None:
        frames = traceback.extract_stack(frame)
        name, caller = _find_collective(frames) or (frames[-1].name, "a device synchronisation")
        rank = os.environ.get("RANK", "0")
        line = (
            f"rank {rank}: {name} has not returned for {self.timeout_s:.0f} s in phase "
            f"'{current_phase()}' ({caller})"
        )
        print(f"error: {line}; parallel.timeout_s sets this limit", file=sys.stderr, flush=True)
        os._exit(1)


def _waiting_at(frame: FrameType | None) -> tuple | None:
    """Return the identity of a wait (frame and instruction), or None if the frame is computing."""
    if frame is None:
        return None
    frames = traceback.extract_stack(frame)
    innermost = frames[-1]
    waiting = (
        innermost.filename.endswith(_COLLECTIVE_FILES)
        or _WAITS.search(innermost.line or "") is not None
    )
    return (id(frame), frame.f_lasti) if waiting else None
