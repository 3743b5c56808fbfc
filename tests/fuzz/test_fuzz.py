"""Mutated inputs end in one line with status 2, or in a correct result; planted faults are found.

More inputs: python tests/fuzz/run.py --seed S --inputs N
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from fuzz.outcomes import Case, Target, run_case
from python_runs import run_python

from fastrlhf.errors import UserError

SCRIPT = Path(__file__).with_name("run.py")
INPUTS = 550
TARGETS = {"yaml", "overrides", "environment", "logs", "records", "parquet", "indexed"}
TARGETS |= {"tokenizer", "hugging face", "model folder", "state"}


def test_every_boundary(tmp_path: Path) -> None:
    """Each target has accepted inputs and refused ones, so neither check is empty."""
    pytest.importorskip("pyarrow")
    report = tmp_path / "report.json"
    run_python([str(SCRIPT), "--seed", "1", "--inputs", str(INPUTS), "--json", str(report)])
    found = json.loads(report.read_text())
    assert found["faults"] == []
    assert found["counts"].keys() == TARGETS
    for name, verdicts in found["counts"].items():
        assert sum(verdicts.values()) == INPUTS // len(TARGETS), name
        assert verdicts["accepted"] >= 3 and verdicts["refused"] >= 10, (name, verdicts)


def planted(run: Callable[[], Any], result: object = None) -> Case:
    def check(found: object) -> None:
        assert found == result

    return Case(run, check, ["a.yaml"], "planted")


def fails(error: BaseException) -> None:
    raise error


def prints(text: str) -> None:
    """End as the command line does, with another text: its own form of a line cannot be bad."""
    sys.stderr.write(text)
    sys.exit(2)


def spin() -> None:
    while True:
        pass


def swallow() -> None:
    try:
        time.sleep(30)
    except BaseException:
        raise UserError("a.yaml: refused") from None


@pytest.mark.parametrize(
    ("run", "verdict"),
    [
        (lambda: None, "accepted"),
        (lambda: 1, "wrong result"),
        (partial(fails, UserError("a.yaml: no")), "refused"),
        (partial(prints, "error: a.yaml: no\x1b[31m\n"), "bad line"),
        (partial(prints, "error: a.yaml: no\nmore\n"), "bad line"),
        (partial(prints, "a.yaml: no\n"), "bad line"),
        (partial(prints, ""), "bad line"),
        (partial(fails, UserError("b.yaml: no")), "bad line"),
        (partial(prints, f"error: a.yaml: {'x' * 5000}\n"), "bad line"),
        (partial(fails, SystemExit(3)), "bad line"),
        (partial(fails, KeyError("x")), "traceback"),
        (partial(fails, ValueError("x")), "traceback"),
        (partial(fails, MemoryError()), "traceback"),
        (spin, "hang"),
        (partial(time.sleep, 30), "hang"),
        (swallow, "hang"),
    ],
)
def test_a_planted_fault_is_found(run: Callable[[], Any], verdict: str) -> None:
    outcome = run_case(planted(run), limit_s=0.2)
    assert outcome.verdict == verdict, outcome


def test_inputs_repeat(tmp_path: Path) -> None:
    """An input that failed can be made again from its seed, target and number."""
    from fuzz.text_targets import TARGETS as targets

    def content(target: Target) -> list[bytes]:
        made = []
        for number in range(5):
            folder = tmp_path / "inputs"  # the same path, which inputs may contain
            folder.mkdir()
            target.make(random.Random(f"1/{target.name}/{number}"), folder)
            made += [path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()]
            for path in folder.iterdir():
                path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
            folder.rmdir()
        return made

    for target in targets:
        assert content(target) == content(target)
