"""Run one input through the command line's exit-status wrapper, and judge what happened.

A planted or real traceback, a hang, a refusal of several lines or without a place, and an accepted
input with a wrong result are faults.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastrlhf import cli

HANG_S = 10.0
_STUCK_S = 120.0
"""After this the process ends with the stack: native code that holds the interpreter is stuck."""
Verdict = Literal["accepted", "refused", "traceback", "hang", "bad line", "wrong result"]
FAULTS: tuple[Verdict, ...] = ("traceback", "hang", "bad line", "wrong result")


@dataclass(frozen=True)
class Case:
    """One input."""

    run: Callable[[], Any]
    """Reads the input as a command does."""
    check: Callable[[Any], bool | None]
    """Raises AssertionError if what `run` returned differs from an independent reading.

    Returns True if the damaged part was set aside, which counts as a refusal.
    """
    names: Sequence[str]
    """A refusal contains one of these: the file, file:line or the key."""
    about: str
    """What was changed, for the report."""
    environment: dict[str, str] | None = None


@dataclass(frozen=True)
class Target:
    """A kind of input."""

    name: str
    make: Callable[[random.Random, Path], Case]
    """Writes one input into a folder; the same for the same generator."""


@dataclass(frozen=True)
class Outcome:
    """What one input led to."""

    verdict: Verdict
    detail: str
    seconds: float


class _Hang(BaseException):
    """Raised by the alarm; not an Exception, so that few handlers take it."""


@contextlib.contextmanager
def _alarm(limit_s: float) -> Iterator[list[bool]]:
    """Raise _Hang after `limit_s`, again each second; yield a list that says whether it did.

    A boundary may turn any exception into a refusal, so the exception alone is no proof.
    """
    fired: list[bool] = []

    def ring(*_: object) -> None:
        fired.append(True)
        raise _Hang

    before = signal.signal(signal.SIGALRM, ring)
    faulthandler.dump_traceback_later(max(_STUCK_S, 3 * limit_s), exit=True)
    signal.setitimer(signal.ITIMER_REAL, limit_s, 1.0)
    try:
        yield fired
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)


def run_case(case: Case, limit_s: float = HANG_S) -> Outcome:
    """Run one input as `cli.main` runs a command, and judge it."""
    results: list[Any] = []
    printed = io.StringIO()
    start = time.monotonic()
    status: object = None
    trace = ""
    with _alarm(limit_s) as fired:
        try:
            status = _exit_status(lambda: results.append(case.run()), printed, case.environment)
        except _Hang:
            pass
        except BaseException:
            trace = traceback.format_exc(limit=-6)
    seconds = time.monotonic() - start
    text = printed.getvalue()
    if fired:
        return Outcome("hang", f"over {limit_s} s", seconds)
    if trace:
        return Outcome("traceback", trace, seconds)
    if status == 0:
        try:
            aside = case.check(results[0])
        except Exception:
            return Outcome("wrong result", traceback.format_exc(limit=-3), seconds)
        return Outcome("refused" if aside else "accepted", "", seconds)
    if status != 2:
        return Outcome("bad line", f"exit status {status}: {text}", seconds)
    return Outcome(
        "bad line" if (why := _bad_line(text, case.names)) else "refused", f"{why}{text}", seconds
    )


def _exit_status(
    command: Callable[[], None], printed: io.StringIO, environment: dict[str, str] | None
) -> object:
    """Return the status with which `cli.main` exits if `command` is the command."""
    application, arguments, variables = cli.app, sys.argv, dict(os.environ)
    leave = cli._leave_process_groups
    cli.app = lambda **_: command()  # type: ignore[assignment]
    cli._leave_process_groups = lambda: None  # the next input needs them
    sys.argv = ["fastrlhf"]
    try:
        os.environ.update(environment or {})
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(io.StringIO()):
            cli.main()
    except SystemExit as ended:
        return ended.code
    finally:
        cli.app, cli._leave_process_groups, sys.argv = application, leave, arguments
        os.environ.clear()
        os.environ.update(variables)
    raise AssertionError("cli.main returned")


def _bad_line(text: str, names: Sequence[str]) -> str:
    """Return what is wrong with the text of a refusal, "" if it is one line that names a place."""
    lines = text.removesuffix("\n").split("\n")
    if len(lines) != 1:
        return f"{len(lines)} lines: "
    if not lines[0].startswith("error: "):
        return "not an error line: "
    if unprintable := [c for c in lines[0] if ord(c) < 32 or 127 <= ord(c) < 160]:
        return f"control characters {unprintable[:3]}: "
    if len(lines[0]) > 1500:
        return f"{len(lines[0])} characters: "
    return "" if any(name in lines[0] for name in names) else f"none of {list(names)[:4]} named: "
