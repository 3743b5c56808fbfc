"""A mesh of one rank, and one run of four ranks through every layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from fastrlhf.config import ParallelConfig
from fastrlhf.parallel import mesh as meshes

SCRIPT = Path(__file__).with_name("run_training.py")


@pytest.fixture(scope="module")
def mesh() -> Iterator[meshes.Mesh]:
    yield meshes.initialize(ParallelConfig(), seed=3)
    meshes.finalize()


@pytest.fixture(scope="session")
def script(imported: Callable[[Path], ModuleType]) -> ModuleType:
    """The functions that the four ranks run."""
    return imported(SCRIPT)


@pytest.fixture(scope="session")
def ran(tmp_path_factory: pytest.TempPathFactory, four_ranks: Callable[..., None]) -> Path:
    """The folder in which four ranks left their results and checkpoints."""
    folder = tmp_path_factory.mktemp("training")
    four_ranks(SCRIPT, folder)
    return folder
