"""A mesh of one rank, and one run of four ranks through every layout."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from fastrlhf.config import ParallelConfig
from fastrlhf.parallel import mesh as meshes

SCRIPT = Path(__file__).with_name("run_training.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


@pytest.fixture(scope="module")
def mesh() -> Iterator[meshes.Mesh]:
    yield meshes.initialize(ParallelConfig(), seed=3)
    meshes.finalize()


@pytest.fixture(scope="session")
def script() -> ModuleType:
    """The functions that the four ranks run."""
    spec = importlib.util.spec_from_file_location("run_training", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which four ranks left their results and checkpoints."""
    folder = tmp_path_factory.mktemp("training")
    done = subprocess.run([*TORCHRUN, "4", str(SCRIPT), str(folder)], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder
