"""Calls of a user's Python function that scores responses: a reward of PPO, or a judge.

Whatever the function does (raise, exit, hang, return something else than numbers) becomes one
UserError line that names the function and, where it is known, the response.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
import itertools
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import FrameType, TracebackType
from typing import Literal, Protocol, cast

import numpy as np
import torch

from fastrlhf.errors import UserError
from fastrlhf.parallel.watchdog import phase

Records = Sequence[Mapping[str, object]]
"""For each response, the columns of its prompt's record other than the prompt."""
RewardFunction = (
    Callable[[list[str], list[str]], Sequence[float]]
    | Callable[[list[str], list[str], list[Mapping[str, object]]], Sequence[float]]
)
"""function(prompts, responses) or function(prompts, responses, records), `Records`.

Returns one score for each response.
"""


class _TakesRecords(Protocol):
    def __call__(
        self, prompts: list[str], responses: list[str], /, records: Records
    ) -> Sequence[float]: ...


_SIGNATURE = "(prompts: list[str], responses: list[str]) -> list[float]"
_GRACE_S = 10.0
"""Time that code which ignores signals gets after the limit, before the process ends."""
_SHOWN = 60
"""Characters of a response or a value in an error."""


class _TimeLimitError(BaseException):
    """The time limit has passed; no `except Exception` of the function catches it."""


def call_reward_function(
    function: RewardFunction,
    prompts: list[str],
    responses: list[str],
    name: str,
    timeout_s: float,
    *,
    records: Records | None = None,
) -> list[float]:
    """Return the scores of `function` for `responses`, one finite float32 value each.

    `name` names the function in errors. `records` (None: no column) is passed to a function that
    takes it. Raises UserError if the function raises or exits, takes longer than `timeout_s`
    seconds, or returns anything but one finite number for each response.
    """
    if records is None:
        records = [{} for _ in responses]
    try:
        with phase(name), _time_limit(timeout_s, name):
            # A generator runs here too, and one that never ends is cut.
            scores = _listed(_call(function, prompts, responses, records), len(responses), name)
            return checked_scores(scores, responses, name)
    except (UserError, KeyboardInterrupt):
        raise
    except _TimeLimitError as error:
        where = _origin(error.__traceback__, responses)
        raise UserError(
            f"{name} took longer than {timeout_s:g} s{where}; make it faster, or raise"
            " parallel.timeout_s"
        ) from None
    except BaseException as error:
        raise UserError(
            f"{name} {_failure(error)}{_origin(error.__traceback__, responses)}"
        ) from None


def _call(
    function: RewardFunction, prompts: list[str], responses: list[str], records: Records
) -> object:
    how = _records_argument(function)
    if how is None:
        plain = cast("Callable[[list[str], list[str]], Sequence[float]]", function)
        return plain(list(prompts), list(responses))
    # Copies: what a function does to its records must not reach the next call.
    own = copy.deepcopy(list(records))
    with_records = cast("_TakesRecords", function)
    if how == "keyword":
        return with_records(list(prompts), list(responses), records=own)
    return with_records(list(prompts), list(responses), own)


def takes_records(function: RewardFunction) -> bool:
    """Return whether `function` takes the records of the prompts as a third argument."""
    return _records_argument(function) is not None


def _records_argument(function: RewardFunction) -> Literal["positional", "keyword"] | None:
    """Return how `function` takes `records`; None if it takes prompts and responses alone.

    It takes them if it has a parameter `records`, a third parameter without a default, or, after
    parameters for prompts and responses, *args or **kwargs. A wrapper with *args or **kwargs alone
    gets two arguments, since what it wraps is not known; `functools.wraps` makes it known.

    Raises TypeError if the function can be called in neither way.
    """
    try:
        signature = inspect.signature(function)
    except ValueError:  # of some builtins
        return None
    parameters = list(signature.parameters.values())
    kinds = {parameter.kind for parameter in parameters}
    by_position = [
        parameter
        for parameter in parameters
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    third = by_position[2] if len(by_position) > 2 else None
    named = signature.parameters.get("records")
    open_ended = len(by_position) == 2
    how: Literal["positional", "keyword"] | None = None
    if third is not None and (third is named or third.default is third.empty):
        how = "positional"
    elif named is not None and (named in by_position or named.kind is named.KEYWORD_ONLY):
        how = "keyword"
    elif open_ended and inspect.Parameter.VAR_POSITIONAL in kinds:
        how = "positional"
    elif open_ended and inspect.Parameter.VAR_KEYWORD in kinds:
        how = "keyword"
    positional = [None] if how == "positional" else []
    signature.bind(None, None, *positional, **({"records": None} if how == "keyword" else {}))
    return how


def _listed(scores: object, count: int, name: str) -> list[object]:
    """Return at most `count` + 1 elements of what a function returned.

    Raises UserError if it is not a sequence of scores.
    """
    if isinstance(scores, (torch.Tensor, np.ndarray)) and scores.ndim == 1:
        scores = scores.tolist()  # of any device and dtype, in one copy
    rows = None
    if not isinstance(scores, (str, bytes, Mapping, set, frozenset)):
        with contextlib.suppress(TypeError):
            rows = iter(scores)  # type: ignore[call-overload]
    if rows is None:
        raise UserError(
            f"{name} returned {type(scores).__name__} {_shown(scores)}; expected a list of one number"
            " for each response"
        )
    return list(itertools.islice(rows, count + 1))


def checked_scores(scores: Iterable[object], responses: Sequence[str], name: str) -> list[float]:
    """Return the scores of the function `name` as floats.

    Numbers of Python, NumPy and torch are taken. Raises UserError unless there is one for each
    response that is finite in float32.
    """
    got = list(scores)
    if len(got) != len(responses):
        count = f"more than {len(responses)}" if len(got) > len(responses) else str(len(got))
        raise UserError(
            f"{name} returned {count} scores for {len(responses)} responses; expected one each"
        )
    return [_finite(score, response, name) for score, response in zip(got, responses, strict=True)]


def _finite(score: object, response: str, name: str) -> float:
    """Return a score as a float that is finite in float32."""
    value = None
    with contextlib.suppress(Exception):
        number = score.item() if hasattr(score, "item") else score  # of torch and NumPy
        # `float` alone would read text too.
        if hasattr(number, "__float__") or hasattr(number, "__index__"):
            value = float(number)
    largest = torch.finfo(torch.float32).max
    if value is None or not abs(value) <= largest:
        raise UserError(
            f"{name} scored {_shown(score)} for the response {response[:_SHOWN]!r}; expected a finite"
            " float (float32)"
        )
    return value


def _shown(value: object) -> str:
    """Return a value in a few characters on one line, whatever its `repr` does."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # of 5,000-digit integers, or of the user's class
        return f"a {type(value).__name__} that cannot be printed"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _failure(error: BaseException) -> str:
    """Return what a function did instead of returning."""
    if isinstance(error, SystemExit):
        return f"called sys.exit({_shown(error.code)})"
    try:
        text = " ".join(str(error).split())[:300]
    except Exception:
        text = ""
    return f"raised {type(error).__name__}{f': {text}' if text else ''}"


def _origin(tb: TracebackType | None, responses: Sequence[str]) -> str:
    """Return " (file:line)" of the innermost frame of a traceback, and the response at work.

    The response is known if a local variable of a frame holds one of `responses`.
    """
    frames = list(traceback.walk_tb(tb))
    foreign = [(frame, line) for frame, line in frames if frame.f_code.co_filename != __file__]
    if not foreign:
        return ""
    frame, line = foreign[-1]
    known, found = set(responses), ""
    for inner, _ in reversed(foreign):
        held = [v for v in inner.f_locals.values() if isinstance(v, str) and v in known]
        if held:
            found = f" for the response {held[-1][:_SHOWN]!r}"
            break
    return f" ({os.path.basename(frame.f_code.co_filename)}:{line}){found}"


@contextlib.contextmanager
def _time_limit(timeout_s: float, name: str) -> Iterator[None]:
    """Raise _TimeLimitError in the main thread if the block takes longer than `timeout_s` seconds.

    A virtual timer interrupts computation, a thread interrupts waiting; neither uses SIGALRM, which
    reward functions use themselves. Code that reacts to neither ends the process with status 2.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    end, wake = time.monotonic() + timeout_s, getattr(signal, "SIGRTMIN", signal.SIGUSR2)
    timeout_s = min(timeout_s, threading.TIMEOUT_MAX / 2)

    def check(_number: int, _frame: FrameType | None) -> None:
        if time.monotonic() >= end:
            raise _TimeLimitError

    def give_up() -> None:
        print(
            f"error: {name} took longer than {timeout_s:g} s and cannot be interrupted; raise"
            " parallel.timeout_s, or find out what it waits for",
            file=sys.stderr,
            flush=True,
        )
        os._exit(2)

    main = threading.main_thread().ident or 0
    timers = [
        threading.Timer(timeout_s, signal.pthread_kill, (main, wake)),
        threading.Timer(timeout_s + _GRACE_S, give_up),
    ]
    before = {number: signal.signal(number, check) for number in (wake, signal.SIGVTALRM)}
    signal.setitimer(signal.ITIMER_VIRTUAL, min(timeout_s, 1e8), 0.5)
    for timer in timers:
        timer.daemon = True
        timer.start()
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        for timer in timers:
            timer.cancel()
        timers[0].join()  # its signal must not come after the handler is gone
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def load_reward_function(spec: str, key: str = "ppo.reward_function") -> RewardFunction:
    """Import the function that `spec`, "module:function", names.

    The module may be in the working directory. Raises UserError with the setting `key` if there is
    no such module or function, if the import fails, or if the function takes other arguments.
    """
    module_name, _, name = spec.partition(":")
    if os.getcwd() not in sys.path:  # the console script's path starts elsewhere
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        own = isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(
            f"{error.name}."
        )
        if own:
            raise UserError(
                f"{key} {spec}: no module {error.name}; run in the folder of "  # type: ignore[attr-defined]
                f"{module_name.replace('.', '/')}.py, or add that folder to PYTHONPATH"
            ) from None
        where = _origin(error.__traceback__, ())
        raise UserError(f"{key} {spec}: the import {_failure(error)}{where}") from None
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(
            f"{key} {spec}: {module.__file__} defines no function {name}; expected "
            f"def {name}{_SIGNATURE}"
        )
    try:
        takes_records(function)
    except TypeError as error:
        raise UserError(
            f"{key} {spec}: the parameters of {name}{inspect.signature(function)} do not fit"
            f" ({error}); expected def {name}{_SIGNATURE}, with a third parameter records: list[dict]"
            " for the other columns of the prompts"
        ) from None
    return function
