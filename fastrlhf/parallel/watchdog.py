"""Says where a rank was when a collective hung or a run failed: rank, phase and collective.

The trainers name what they are doing with `phase("rollout")`. A collective that waits longer than `parallel.timeout_s`
raises in gloo by itself; on NCCL, where the wait is inside a CUDA synchronisation, the watchdog thread notices that the
main thread has not left the same collective or synchronisation, reports it and ends the process so that torchrun can
act.
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
# Calls of these in a line, and no loop over `items` or question after `os.cpu_count()`.
_WAITS = re.compile(r"\.(wait|synchronize|item|tolist|cpu)\(")


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """Names what this rank does inside the block; nested phases read `outer/inner`."""
    _phases.append(name)
    try:
        yield
    except BaseException:
        # Keep the innermost name for the report of a failure that is on its way out.
        _failed_in.setdefault("phase", current_phase())
        raise
    finally:
        _phases.pop()


_failed_in: dict[str, str] = {}


def current_phase() -> str:
    """The phase this rank is in, `start-up` before the first."""
    return "/".join(_phases) or "start-up"


def _collective(frames: list[traceback.FrameSummary]) -> tuple[str, str] | None:
    """(collective, file:line of our caller) of the outermost torch.distributed call in a stack, or None."""
    caller = ""
    for frame in frames:
        if frame.filename.endswith(_COLLECTIVE_FILES) and frame.name != "wrapper":
            return frame.name, caller
        if f"{os.sep}fastrlhf{os.sep}" in frame.filename:
            caller = f"{os.path.basename(frame.filename)}:{frame.lineno}"
    return None


def describe_failure(error: BaseException) -> str | None:
    """One line on a failed or timed-out collective: rank, phase, collective, caller; None if `error` is something
    else.
    """
    where = _collective(traceback.extract_tb(error.__traceback__))
    if where is None:
        return None
    name, caller = where
    rank = os.environ.get("RANK", "0")
    in_phase = _failed_in.get("phase", current_phase())
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return f"rank {rank}: collective {name} failed in phase '{in_phase}' ({caller}): {reason}"


class Watchdog:
    """Reports a collective that fails inside the block, and ends the process if one has not returned for `timeout_s`
    seconds.
    """

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._main = threading.main_thread().ident
        self._stop = threading.Event()
        # A daemon only for an interrupt between __enter__ and the block: nobody would stop it then.
        self._thread = threading.Thread(target=self._watch, name="collective-watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(
        self, _type: type | None, error: BaseException | None, _tb: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()  # at once: it waits for nothing else, and holds no lock
        if error is not None and (line := describe_failure(error)) is not None:
            print(f"error: {line}", file=sys.stderr, flush=True)

    def _watch(self) -> None:
        seen: tuple | None = None
        since = time.monotonic()
        # gloo's own timeout comes first (it raises, which is the better report); the margin leaves it time.
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
        name, caller = _collective(frames) or (frames[-1].name, "a device synchronisation")
        rank = os.environ.get("RANK", "0")
        line = (
            f"rank {rank}: {name} has not returned for {self.timeout_s:.0f} s in phase "
            f"'{current_phase()}' ({caller})"
        )
        print(f"error: {line}; parallel.timeout_s sets this limit", file=sys.stderr, flush=True)
        os._exit(1)


def _waiting_at(frame: FrameType | None) -> tuple | None:
    """Identity of the wait the main thread is in (frame object and instruction), or None when it is computing."""
    if frame is None:
        return None
    frames = traceback.extract_stack(frame)
    innermost = frames[-1]
    waiting = (
        innermost.filename.endswith(_COLLECTIVE_FILES)
        or _WAITS.search(innermost.line or "") is not None
    )
    return (id(frame), frame.f_lasti) if waiting else None
