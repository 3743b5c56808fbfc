"""A mesh of one rank, the shared cases, and their results under the layouts of four ranks."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fastrlhf.config import ParallelConfig
from fastrlhf.parallel import mesh as meshes

SCRIPT = Path(__file__).with_name("cases.py")


@pytest.fixture(scope="module")
def mesh() -> Iterator[meshes.Mesh]:
    yield meshes.initialize(ParallelConfig(), seed=7)
    meshes.finalize()


@pytest.fixture(scope="session")
def cases() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generation_cases", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def parallel_results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Layout -> results of each rank."""
    folder = tmp_path_factory.mktemp("generation")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*torchrun, str(SCRIPT), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    results: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.json")):
        results.setdefault(path.name.split(".")[0], []).append(json.loads(path.read_text()))
    return results
