"""Modules that must import without the heavy packages: an op needs torch alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

BLOCKED_IMPORT = """
import importlib, sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"{{name}} is blocked by this test", name=name)

sys.meta_path.insert(0, Block())
for name in {modules!r}:
    importlib.import_module(name)
"""


def modules(package: str) -> list[str]:
    folder = ROOT / "fastrlhf" / package
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in sorted(folder.rglob("*.py"))
    ]
    return [name.removesuffix(".__init__") for name in names]


def import_without(blocked: set[str], names: list[str]) -> subprocess.CompletedProcess[str]:
    code = BLOCKED_IMPORT.format(blocked=blocked, modules=names)
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=1800
    )


@pytest.mark.parametrize(
    ("names", "blocked"),
    [
        (
            ["fastrlhf.errors"],
            {"torch", "numpy", "pydantic", "yaml", "megatron", "triton", "transformers"},
        ),
        (
            [*modules("config"), "fastrlhf.cli"],
            {"torch", "numpy", "megatron", "triton", "transformers"},
        ),
        (
            modules("ops"),
            {"megatron", "triton", "transformers", "pydantic", "numpy", "matplotlib", "rich"},
        ),
        (modules("data"), {"megatron", "triton"}),
    ],
    ids=["errors", "config", "ops", "data"],
)
def test_imports_without(names, blocked):
    assert names
    result = import_without(blocked, names)
    assert result.returncode == 0, result.stderr


def test_the_block_does_block():
    result = import_without({"yaml"}, ["fastrlhf.config.schema"])
    assert result.returncode == 1
    assert "yaml is blocked by this test" in result.stderr


def test_a_run_starts_without_a_word():
    """megatron warns of optional packages on every rank, above every message of ours."""
    result = subprocess.run(
        [sys.executable, "-c", "import fastrlhf.run.train"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
