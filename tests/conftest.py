"""Shared fixtures: a mesh of one rank, launches of several ranks, imports of their scripts."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from fastrlhf.parallel.mesh import Mesh

# A busy machine makes single examples slow; the duration of one says nothing about the code.
settings.register_profile("fastrlhf", deadline=None)
settings.load_profile("fastrlhf")


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    """Initialize a mesh of one rank, shared by the tests of a file."""
    # Imported here because the tests of `ops` run without megatron.
    from fastrlhf.config import ParallelConfig
    from fastrlhf.parallel import mesh as meshes

    yield meshes.initialize(ParallelConfig(), seed=7)
    meshes.finalize()


@pytest.fixture(scope="session")
def torchrun() -> Callable[..., None]:
    """Return `torchrun(script, *arguments)`, which runs a script on four ranks of one thread each.

    If the script fails, the assertion shows the end of its stderr.
    """

    def run(script: Path, *arguments: object, ranks: int = 4) -> None:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        _run(launcher, script, *arguments)

    return run


@pytest.fixture(scope="session")
def four_ranks() -> Callable[..., None]:
    """Return `four_ranks(script, *arguments)`: as `torchrun`, but forks the ranks; 4x faster."""
    return partial(_run, [str(Path(__file__).with_name("ranks.py"))])


def _run(launcher: list[str], script: Path, *arguments: object) -> None:
    command = [sys.executable, *launcher, str(script), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=1800, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="session")
def imported() -> Callable[[Path], ModuleType]:
    """Return `imported(script)`, which imports a script file as a module of this process."""

    def load(script: Path) -> ModuleType:
        spec = importlib.util.spec_from_file_location(script.stem, script)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load
