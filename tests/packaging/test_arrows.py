"""Parts of the package import only parts below them (docs/design/architecture.md).

Imports inside functions count.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "fastrlhf"
FLOORS = [
    ["__main__"],
    ["cli"],
    ["cli_data"],
    ["quickstart"],
    ["commands"],
    ["run"],
    ["plan"],
    ["algorithms"],
    ["labeling"],
    ["evaluation"],
    ["generation", "training"],
    ["models"],
    ["checkpoint"],
    ["data"],
    ["parallel"],
    ["kernels"],
    ["ops"],
    ["config"],
    ["progress", "errors", "log_lines"],
]
"""From the top down. Parts of one floor do not know each other."""
FLOOR = {part: number for number, floor in enumerate(FLOORS) for part in floor}
FORBIDDEN = {("algorithms", "training"), ("ops", "config")}
"""Lower floors that a part still does not touch."""


def _part(module: str) -> str:
    return module.split(".")[1]


def imports() -> set[tuple[str, str, str]]:
    """Return (file, its part, the part that it imports) of every import in the package."""
    found = set()
    for path in ROOT.rglob("*.py"):
        own = path.relative_to(ROOT).with_suffix("").parts[0]
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module == "fastrlhf":
                names = [f"fastrlhf.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            parts = {_part(name) for name in names if name.startswith("fastrlhf.")} & FLOOR.keys()
            found |= {(str(path.relative_to(ROOT)), own, part) for part in parts if part != own}
    return found


def test_every_part_has_a_floor():
    parts = {
        path.stem
        for path in ROOT.iterdir()
        if path.suffix == ".py" or (path.is_dir() and any(path.glob("*.py")))
    }
    assert parts - {"__init__"} == FLOOR.keys()


def test_arrows_point_down():
    wrong = [
        f"{file} imports {part}"
        for file, own, part in sorted(imports())
        if own in FLOOR and FLOOR[part] <= FLOOR[own]
    ]
    assert not wrong, wrong


@pytest.mark.parametrize(("own", "part"), sorted(FORBIDDEN))
def test_what_a_part_does_not_touch(own: str, part: str):
    assert not [
        file for file, importer, imported in imports() if (importer, imported) == (own, part)
    ]
