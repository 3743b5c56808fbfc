"""How tests start several ranks, and import the scripts that those run."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import settings

# A busy machine makes any single example slow; how long one takes says nothing about the code.
settings.register_profile("fastrlhf", deadline=None)
settings.load_profile("fastrlhf")


@pytest.fixture(scope="session")
def torchrun() -> Callable[..., None]:
    """`torchrun(script, *arguments)` runs a script on four ranks, one thread each, and shows why when it fails."""

    def run(script: Path, *arguments: object, ranks: int = 4) -> None:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        _run(launcher, script, *arguments)

    return run


@pytest.fixture(scope="session")
def four_ranks() -> Callable[..., None]:
    """The same at a quarter of the cost: `four_ranks(script, *arguments)` forks the ranks (ranks.py)."""
    return partial(_run, [str(Path(__file__).with_name("ranks.py"))])


def _run(launcher: list[str], script: Path, *arguments: object) -> None:
    command = [sys.executable, *launcher, str(script), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="session")
def imported() -> Callable[[Path], ModuleType]:
    """`imported(script)`: its functions, for a test in this process."""

    def load(script: Path) -> ModuleType:
        spec = importlib.util.spec_from_file_location(script.stem, script)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load
