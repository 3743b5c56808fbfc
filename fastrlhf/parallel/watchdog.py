"""Report of a collective that hangs or fails: rank, phase, collective, and who has not arrived.

Trainers name their phases with `phase("rollout")`. gloo raises if a collective takes longer than
`parallel.timeout_s`, or if the connection to another rank breaks. With NCCL the wait is in a CUDA
synchronization: the watchdog thread detects that the main thread has not left the same collective
or synchronization, reports it and ends the process, so that torchrun stops the other ranks.

The thread also writes this rank's heartbeats (heartbeat.py). It ends the process if torchrun's
agent has died, which would leave it without anybody to stop it, and if another rank has reported a
failure while this one waits. At start-up, `parallel.startup_timeout_s` is the limit.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import linecache
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from types import FrameType, TracebackType

import torch.distributed as dist

from fastrlhf.config import ParallelConfig
from fastrlhf.errors import UserError
from fastrlhf.parallel import rendezvous
from fastrlhf.parallel.heartbeat import Heartbeats

_phases: list[str] = []
_COLLECTIVE_FILES = ("distributed_c10d.py",)
# Matches a call of these methods, or of the types for which a tensor is copied to the host, but not
# a loop over `items` or `os.cpu_count()`.
_WAITS = re.compile(r"\.(wait|synchronize|item|tolist|cpu)\(|^(bool|int|float)\(")
_LONGEST_BEAT_S = 2.0
_END_AFTER_FAILURE_S = 15.0
"""Time for which a rank may wait for another one that has failed. gloo raises long before."""
_MARGINS_S = {"nccl": 60, "gloo": 2}
"""Seconds that groups wait beyond the limit. The watchdog's report, and that of a reward function
with the same limit, have more information than their errors."""


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
    host = socket.gethostname()
    return (
        f"rank {rank} on host {host}: collective {name} failed in phase '{in_phase}' ({caller}):"
        f" {reason}"
    )


def set_group_timeouts(seconds: float) -> None:
    """Set the timeout of the collectives of all process groups of this process."""
    for group in list(dist.distributed_c10d._world.pg_map):
        margin = _MARGINS_S.get(dist.get_backend(group))
        if margin is not None:
            timeout = datetime.timedelta(seconds=seconds + margin)
            dist.distributed_c10d._set_pg_timeout(timeout, group)


class Watchdog:
    """Context manager that reports collectives that fail or hang, with the ranks that are missing.

    If a collective has not returned for the limit (with gloo with a margin, since gloo raises on its
    own), it ends the process. The limit is `parallel.startup_timeout_s` until `end_start_up`.
    """

    def __init__(self, parallel: ParallelConfig) -> None:
        self.timeout_s = float(parallel.startup_timeout_s)
        self._setting = "parallel.startup_timeout_s"
        self._parallel = parallel
        self._main = threading.main_thread().ident
        self._parent = os.getppid()
        self._stop = threading.Event()
        # As short as the shorter limit asks for, and the same for the whole run.
        shortest = min(parallel.timeout_s, parallel.startup_timeout_s)
        self._interval_s = min(_LONGEST_BEAT_S, shortest / 5)
        session = rendezvous.joined()
        self._heartbeats = None
        if session is not None and session.world_size > 1:
            with rendezvous.store_errors():
                self._heartbeats = Heartbeats(session, self._interval_s)
        # A daemon, because an interrupt between __enter__ and the block would leave it running.
        self._thread = threading.Thread(target=self._watch, name="collective-watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._beat(None, 0.0)
        self._thread.start()
        return self

    def __exit__(
        self, _type: type | None, error: BaseException | None, _tb: TracebackType | None
    ) -> None:
        line = describe_failure(error) if error is not None else None
        if line is not None:
            print(f"error: {line}", file=sys.stderr, flush=True)
            self._report_ranks(line)
        elif isinstance(error, Exception) and self._heartbeats is not None:
            text = (
                str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            )
            rendezvous.publish_failure(" ".join(text.split())[:500])
        self._stop.set()
        # Immediate, except if the thread is in an access of a store that does not answer.
        self._thread.join(timeout=5.0)

    def end_start_up(self) -> None:
        """Reduce the limit of collectives from that of the start-up to `parallel.timeout_s`."""
        self.timeout_s, self._setting = float(self._parallel.timeout_s), "parallel.timeout_s"
        set_group_timeouts(self.timeout_s)

    def _watch(self) -> None:
        seen: tuple | None = None
        since = time.monotonic()
        while not self._stop.wait(self._interval_s):
            frame = sys._current_frames().get(self._main or 0)
            position = _position_of(frame)
            if position != seen:
                seen, since = position, time.monotonic()
            stayed = time.monotonic() - since
            self._beat(frame, stayed)
            self._end_orphan()
            if frame is None or not _waits(frame):
                continue
            if stayed > self._limit():
                self._report(frame)
            elif stayed > _END_AFTER_FAILURE_S:
                self._end_after_failure()

    def _limit(self) -> float:
        # The margin lets gloo's own timeout come first: it raises an error with more information.
        uses_gloo = dist.is_initialized() and dist.get_backend() == "gloo"
        return self.timeout_s * 1.2 + 10 if uses_gloo else self.timeout_s

    def _beat(self, frame: FrameType | None, stayed: float) -> None:
        if self._heartbeats is None:
            return
        position, waits = ("start", False) if frame is None else (_describe(frame), _waits(frame))
        try:
            self._heartbeats.beat(current_phase(), position, waits, stayed)
        except RuntimeError:  # torch's errors of a store; a run needs it no more once it trains
            self._heartbeats = None

    def _end_orphan(self) -> None:
        """End the process if torchrun's agent, which started it, has died."""
        if os.getppid() == self._parent or "TORCHELASTIC_RUN_ID" not in os.environ:
            return
        rank = os.environ.get("RANK", "0")
        line = f"its torchrun agent (process {self._parent}) has died"
        line = f"rank {rank} on host {socket.gethostname()}: {line}"
        if self._heartbeats is not None:
            with contextlib.suppress(RuntimeError):
                self._heartbeats.session.fail(line)
        _end(line)

    def _end_after_failure(self) -> None:
        """End the process if another rank has failed: this one waits for it in vain."""
        failure = ""
        if self._heartbeats is not None:
            with contextlib.suppress(RuntimeError):
                failure = self._heartbeats.session.failure()
        if failure:
            _end(f"rank {os.environ.get('RANK', '0')} waits in vain: {failure}")

    def _report(self, frame: FrameType) -> None:
        frames = traceback.extract_stack(frame)
        name, caller = _find_collective(frames) or (frames[-1].name, "a device synchronisation")
        rank = os.environ.get("RANK", "0")
        line = (
            f"rank {rank} on host {socket.gethostname()}: {name} has not returned for"
            f" {self.timeout_s:.0f} s in phase '{current_phase()}' ({caller}); {self._setting} sets"
            " this limit"
        )
        print(f"error: {line}", file=sys.stderr, flush=True)
        self._report_ranks(line)
        os._exit(1)

    def _report_ranks(self, line: str) -> None:
        """Print which ranks have not arrived, and leave the cause for ranks that fail later.

        torchrun stops the ranks of its node as soon as one has ended, so SIGTERM waits meanwhile.
        """
        heartbeats = self._heartbeats
        if heartbeats is None:
            session = rendezvous.joined()
            if session is not None and session.world_size > 1:
                print(f"error: {rendezvous.store_is_gone()}", file=sys.stderr, flush=True)
            return
        is_main = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGTERM, lambda *_: None) if is_main else None
        found: list[str] = []
        # In a thread, because a store on a host that is down does not answer.
        reader = threading.Thread(target=lambda: found.append(heartbeats.report()), daemon=True)
        reader.start()
        reader.join(timeout=15.0)
        if found and found[0]:
            print(f"error: {found[0]}", file=sys.stderr, flush=True)
        with contextlib.suppress(RuntimeError):
            heartbeats.session.fail(found[0] if found and found[0] else line)
        if is_main:
            signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)


def _end(line: str) -> None:
    """Print an error and end the process: its main thread does not return from a wait."""
    print(f"error: {line}", file=sys.stderr, flush=True)
    os._exit(1)


def _position_of(frame: FrameType | None) -> tuple | None:
    """Return the identity of a position: frame and instruction."""
    return None if frame is None else (id(frame), frame.f_lasti)


def _waits(frame: FrameType) -> bool:
    """Return whether the innermost frame waits for other ranks or the device."""
    if frame.f_code.co_filename.endswith(_COLLECTIVE_FILES):
        return True
    return _WAITS.search(_running_source(frame)) is not None


def _running_source(frame: FrameType) -> str:
    """Return the source of the expression that a frame evaluates; before Python 3.11, its line."""
    line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip("\n")
    if not hasattr(frame.f_code, "co_positions"):
        return line
    instruction = itertools.islice(frame.f_code.co_positions(), frame.f_lasti // 2, None)
    first, last, start, end = next(instruction, (None,) * 4)
    if first is None or first != last or start is None or end is None:
        return line
    return line.encode()[start:end].decode(errors="replace")


def _describe(frame: FrameType) -> str:
    """Return the collective and its caller, or file:line of the innermost frame of this project."""
    frames = traceback.extract_stack(frame)
    if (found := _find_collective(frames)) is not None:
        return f"{found[0]} ({found[1]})"
    own = [f for f in frames if f"{os.sep}fastrlhf{os.sep}" in f.filename] or frames
    inner = frames[-1]
    place = f"{os.path.basename(own[-1].filename)}:{own[-1].lineno} ({own[-1].name})"
    if inner is own[-1]:
        return place
    return f"{place}, {os.path.basename(inner.filename)}:{inner.lineno} ({inner.name})"
