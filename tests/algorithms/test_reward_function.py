"""A user's reward function: what it may return, and what becomes one line with its name."""

from __future__ import annotations

import functools
import signal
import sys
import time
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastrlhf.algorithms.kl_controller import KLController
from fastrlhf.algorithms.reward_function import (
    call_reward_function,
    load_reward_function,
    takes_records,
)
from fastrlhf.config import PPOConfig
from fastrlhf.errors import UserError

RESPONSES = ["one", "two", "three"]


def call(function: Callable[..., Any], timeout_s: float = 30.0) -> list[float]:
    return call_reward_function(function, ["p"] * 3, list(RESPONSES), "my_rewards:f", timeout_s)


@pytest.mark.parametrize(
    "scores",
    [
        (1, 2.0, True),
        [np.float32(1), np.float64(2), np.int64(1)],
        [np.float16(1), np.array(2.0), np.array([1.0])],
        [torch.tensor(1.0), torch.tensor(2, dtype=torch.int64), torch.tensor([1.0])],
        np.array([1, 2, 1]),
        np.array([1.0, 2.0, 1.0], dtype=np.float16),
        torch.tensor([1.0, 2.0, 1.0], dtype=torch.bfloat16),
        torch.tensor([1.0, 2.0, 1.0], requires_grad=True),
        torch.tensor([[1.0], [2.0], [1.0]]),
        [Fraction(1), Decimal(2), np.bool_(True)],
        (float(n) for n in (1, 2, 1)),
    ],
)
def test_values_like_floats_are_taken(scores: Any) -> None:
    got = call(lambda prompts, responses: scores)
    assert got == [1.0, 2.0, 1.0] and {type(value) for value in got} == {float}


class Rude:
    """A value whose conversions fail in ways of their own."""

    def __repr__(self) -> str:
        raise RuntimeError("no")

    def __float__(self) -> float:
        raise OSError("no")


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        (None, "returned NoneType None; expected a list of one number for each response"),
        (3, "returned int 3; expected"),
        (torch.tensor(1.0), "returned Tensor tensor"),
        (np.array(1.0), "returned ndarray array"),
        ("abc", "returned str 'abc'; expected"),
        ({0.1: 1, 0.2: 2, 0.3: 3}, "returned dict"),
        ({1.0, 2.0, 3.0}, "returned set"),
        ([1.0], "returned 1 scores for 3 responses; expected one each"),
        ([], "returned 0 scores for 3 responses"),
        ([1.0] * 4, "returned more than 3 scores for 3 responses"),
        ([0.0, 10**400, 0.0], r"scored 10+\.\.\. for the response 'two'; expected a finite float"),
        ([0.0, 10**5000, 0.0], "scored a int that cannot be printed for the response 'two'"),
        (
            [0.0, 0.0, 1e39],
            r"scored 1e\+39 for the response 'three'; expected a finite float \(flo",
        ),
        ([0.0, 0.0, -1e39], r"scored -1e\+39 for the response 'three'"),
        (np.array([0.0, 1e39, 0.0]), r"scored 1e\+39 for the response 'two'"),
        ([float("nan"), 0.0, 0.0], "scored nan for the response 'one'"),
        ([torch.tensor(float("inf")), 0.0, 0.0], r"scored tensor\(inf\) for the response 'one'"),
        ([0.0, None, 0.0], "scored None for the response 'two'"),
        ([0.0, "1.0", 0.0], "scored '1.0' for the response 'two'"),
        ([0.0, b"1.0", 0.0], "scored b'1.0' for the response 'two'"),
        ([0.0, bytearray(b"1"), 0.0], "scored bytearray"),
        ([0.0, np.str_("1.0"), 0.0], "scored .*'1.0'.* for the response 'two'"),
        ([0.0, 1j, 0.0], "scored 1j for the response 'two'"),
        ([0.0, [1.0], 0.0], r"scored \[1.0\] for the response 'two'"),
        ([0.0, torch.ones(2), 0.0], r"scored tensor\(\[1., 1.\]\) for the response 'two'"),
        ([0.0, Rude(), 0.0], "scored a Rude that cannot be printed for the response 'two'"),
    ],
)
def test_other_values_are_refused_by_name(scores: Any, expected: str) -> None:
    with pytest.raises(UserError, match=f"^my_rewards:f {expected}") as raised:
        call(lambda prompts, responses: scores)
    assert "\n" not in str(raised.value)


def failing(action: Callable[[], Any]) -> Callable[[list[str], list[str]], list[float]]:
    def function(prompts: list[str], responses: list[str]) -> list[float]:
        scores = []
        for response in responses:
            if response == "two":
                action()
            scores.append(0.0)
        return scores

    return function


def _raise(error: BaseException) -> Any:
    raise error


@pytest.mark.parametrize(
    ("action", "expected"),
    [
        (lambda: sys.exit(0), r"called sys.exit\(0\)"),
        (sys.exit, r"called sys.exit\(None\)"),
        (lambda: 1 / 0, "raised ZeroDivisionError: division by zero"),
        (lambda: {}["x"], "raised KeyError: 'x'"),
        (lambda: _raise(ValueError("two\nlines")), "raised ValueError: two lines"),
        (lambda: _raise(GeneratorExit()), "raised GeneratorExit"),
        (lambda: _raise(MemoryError()), "raised MemoryError"),
        (lambda: exec("f(", {}), "raised SyntaxError"),
    ],
)
def test_a_failure_is_one_line_with_the_response(action: Callable[[], Any], expected: str) -> None:
    with pytest.raises(UserError, match=rf"^my_rewards:f {expected}.*\(.*:\d+\)") as raised:
        call(failing(action))
    assert str(raised.value).endswith("for the response 'two'")
    assert "\n" not in str(raised.value)


def test_a_generator_that_fails_late_or_never_ends() -> None:
    def late(prompts: list[str], responses: list[str]) -> Iterator[float]:
        yield 1.0
        raise RuntimeError("late")

    def endless(prompts: list[str], responses: list[str]) -> Iterator[float]:
        while True:
            yield 0.0

    with pytest.raises(UserError, match="raised RuntimeError: late"):
        call(late)
    with pytest.raises(UserError, match="returned more than 3 scores"):
        call(endless)


def test_ctrl_c_is_not_a_failure_of_the_function() -> None:
    # A process that a shell started in the background ignores the signal.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            call(failing(lambda: signal.raise_signal(signal.SIGINT)))
    finally:
        signal.signal(signal.SIGINT, handler)


def _spin() -> None:
    while True:
        pass


def _swallow() -> None:
    while True:
        try:
            time.sleep(1000)
        except Exception:
            continue


def _backtrack() -> None:
    import re

    re.match(r"(a+)+$", "a" * 60 + "b")


@pytest.mark.parametrize("action", [_spin, lambda: time.sleep(1000), _swallow, _backtrack])
def test_a_function_that_hangs_is_stopped(action: Callable[[], Any]) -> None:
    """Computation, waiting, and a regular expression, which holds the interpreter's lock."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGALRM, signal.SIGVTALRM)}
    start = time.monotonic()
    with pytest.raises(UserError, match=r"took longer than 0\.3 s .*response 'two'; make it fast"):
        call(failing(action), timeout_s=0.3)
    assert time.monotonic() - start < 9
    assert handlers == {number: signal.getsignal(number) for number in handlers}


def test_a_limit_longer_than_threads_can_wait_and_a_functions_own_alarm() -> None:
    def own_alarm(prompts: list[str], responses: list[str]) -> list[float]:
        def handle(*_: Any) -> None:
            raise TimeoutError

        before = signal.signal(signal.SIGALRM, handle)
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        try:
            time.sleep(5)
        except TimeoutError:
            return [0.5] * len(responses)
        finally:
            signal.signal(signal.SIGALRM, before)
        return [0.0] * len(responses)

    assert call(own_alarm, timeout_s=1e12) == [0.5] * 3


def test_the_functions_lists_are_its_own() -> None:
    def greedy(prompts: list[str], responses: list[str]) -> list[float]:
        return [float(len(responses.pop())) for _ in range(3)]

    assert call(greedy) == [5.0, 3.0, 3.0]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import sys\nsys.exit(0)\n", r"the import called sys.exit\(0\) \(module_\d+.py:2\)"),
        ("def f(:\n", "the import raised SyntaxError"),
        ("import no_such_package\n", "the import raised ModuleNotFoundError: No module named"),
        ("1 / 0\n", r"the import raised ZeroDivisionError: division by zero \(module_\d+.py:1\)"),
    ],
)
def test_a_module_that_cannot_be_imported(
    source: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    name = f"module_{abs(hash(source))}"
    (tmp_path / f"{name}.py").write_text(source)
    with pytest.raises(UserError, match=f"ppo.reward_function {name}:f: {expected}"):
        load_reward_function(f"{name}:f")


@pytest.mark.parametrize(("horizon", "episodes"), [(1, 8), (1, 512), (3, 100), (100, 512)])
def test_the_kl_coefficient_stays_positive_and_finite(horizon: int, episodes: int) -> None:
    config = PPOConfig(reward_model="rm", adaptive_kl_target=6.0, adaptive_kl_horizon=horizon)
    controller = KLController(config)
    controller.update(0.0, episodes)
    first = controller.coefficient
    assert 0.0 < first < config.kl_coef
    for _ in range(2000):
        controller.update(0.0, episodes)
    assert controller.coefficient > 0.0
    for _ in range(4000):
        controller.update(1e9, episodes)
    assert config.kl_coef < controller.coefficient < 1e9


def test_the_kl_controller_is_ziegler_s_for_usual_horizons() -> None:
    config = PPOConfig(reward_model="rm", adaptive_kl_target=6.0, adaptive_kl_horizon=10000)
    controller = KLController(config)
    controller.update(3.0, 512)
    assert controller.coefficient == config.kl_coef * (1 - 0.2 * 512 / 10000)


# ---- records ------------------------------------------------------------------------------------

RECORDS = [{"answer": 1}, {"answer": 2}, {}]


class Scorer:
    def __call__(self, prompts: Any, responses: Any, records: Any) -> list[float]:
        return [record.get("answer", 0) for record in records]


def _third(prompts: Any, responses: Any, answers: Any) -> list[float]:
    return [record.get("answer", 0) for record in answers]


def _two_and_args(prompts: Any, responses: Any, *rest: Any) -> list[float]:
    return [record.get("answer", 0) for record in rest[0]]


def _two_and_kwargs(prompts: Any, responses: Any, **named: Any) -> list[float]:
    return [record.get("answer", 0) for record in named["records"]]


def _by_name(prompts: Any, responses: Any, *, records: Any) -> list[float]:
    return [record.get("answer", 0) for record in records]


def _after_a_default(prompts: Any, responses: Any, scale: float = 1.0, records: Any = ()) -> Any:
    return [scale * record.get("answer", 0) for record in records]


@functools.wraps(_third)
def _wrapped(*args: Any, **kwargs: Any) -> Any:
    return _third(*args, **kwargs)


TAKES = [
    *(Scorer(), _third, _two_and_args, _two_and_kwargs, _by_name, _after_a_default, _wrapped),
    functools.partial(_after_a_default, scale=1.0),
]
PLAIN: list[Any] = [
    lambda prompts, responses: [float(len(r)) for r in responses],
    lambda prompts, responses, scale=1.0: [scale * len(r) for r in responses],
    lambda *args: [float(len(r)) for r in args[1]] if len(args) == 2 else [],
    lambda *args, **kwargs: [float(len(r)) for r in args[1]] if len(args) == 2 else [],
    functools.partial(map, lambda prompt, response: len(response)),  # a builtin
]


@pytest.mark.parametrize("function", TAKES)
def test_functions_that_take_records_get_those_of_their_responses(function: Any) -> None:
    assert takes_records(function)
    got = call_reward_function(function, ["p"] * 3, list(RESPONSES), "f", 30.0, records=RECORDS)
    assert got == [1.0, 2.0, 0.0]
    # Without records, as for a file with prompts alone, each is empty.
    assert call_reward_function(function, ["p"] * 3, list(RESPONSES), "f", 30.0) == [0.0] * 3


@pytest.mark.parametrize("function", PLAIN)
def test_functions_of_two_arguments_work_unchanged(function: Any) -> None:
    assert not takes_records(function)
    got = call_reward_function(function, ["p"] * 3, list(RESPONSES), "f", 30.0, records=RECORDS)
    assert got == [3.0, 3.0, 5.0]


def test_a_function_cannot_change_the_records_of_the_next_call() -> None:
    def greedy(prompts: Any, responses: Any, records: Any) -> list[float]:
        return [float(record.pop("answer", -1)) for record in records]

    for _ in range(2):
        got = call_reward_function(greedy, ["p"] * 3, list(RESPONSES), "f", 30.0, records=RECORDS)
        assert got == [1.0, 2.0, -1.0]


@pytest.mark.parametrize(
    "parameters", ["prompts", "prompts, responses, records, more", "prompts, responses, *, limit"]
)
def test_other_parameters_are_refused_at_start_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parameters: str
) -> None:
    (tmp_path / "odd_rewards.py").write_text(f"def f({parameters}):\n    return []\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "odd_rewards", raising=False)
    with pytest.raises(UserError, match=r"^ppo.reward_function odd_rewards:f: the parameters") as e:
        load_reward_function("odd_rewards:f")
    assert "records: list[dict]" in str(e.value) and "\n" not in str(e.value)
