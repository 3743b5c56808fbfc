"""Messages that docs/troubleshooting.md quotes occur in the code; all warnings are listed."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/troubleshooting.md").read_text()
QUOTED = [
    message
    for line in PAGE.splitlines()
    if line.startswith("| ")
    for message in re.findall(r"`([^`]+)`", line.split(" | ")[0])
    if message != "step_XXXXXXXX.unused1"
]


def templates() -> Iterator[str]:
    """Every string of the package and of setup.py; "\\0" where an f-string has a value."""
    for path in [*(ROOT / "fastrlhf").rglob("*.py"), ROOT / "setup.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [v.value if isinstance(v, ast.Constant) else "\0" for v in node.values]
                yield "".join(str(part) for part in parts)
            elif isinstance(node, ast.Constant) and isinstance(node.value, (str, bytes)):
                yield node.value if isinstance(node.value, str) else node.value.decode("latin-1")


STRINGS = list(templates())


def occurs(message: str) -> bool:
    parts = [part.strip(" :") for part in message.split("...")]
    wanted = [part for part in parts if part not in ("", "FILE:LINE")]
    pattern = re.compile(".*".join(re.escape(part) for part in wanted), re.DOTALL)
    return any(pattern.search(text) for text in STRINGS)


@pytest.mark.parametrize("message", QUOTED)
def test_the_message_occurs_in_the_code(message: str):
    assert occurs(message)


def test_a_message_that_nobody_prints_is_found():
    assert not occurs("this message ... is printed nowhere else")
    assert len(QUOTED) > 50


def test_every_named_warning_is_on_the_page():
    source = ast.parse((ROOT / "fastrlhf/algorithms/ppo_warnings.py").read_text())
    names = {
        node.value.elts[0].value
        for node in ast.walk(source)
        if isinstance(node, ast.Yield)
        and isinstance(node.value, ast.Tuple)
        and isinstance(node.value.elts[0], ast.Constant)
    }
    assert len(names) >= 6
    assert {name for name in names if f"| `{name}` |" not in PAGE} == set()
