"""Fixtures: one run of four ranks through every layout, and the functions that they run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).with_name("run_training.py")


@pytest.fixture(scope="session")
def script(imported: Callable[[Path], ModuleType]) -> ModuleType:
    """Return the module that the four ranks run."""
    return imported(SCRIPT)


@pytest.fixture(scope="session")
def ran(tmp_path_factory: pytest.TempPathFactory, four_ranks: Callable[..., None]) -> Path:
    """Return the folder of the four ranks' results and checkpoints."""
    folder = tmp_path_factory.mktemp("training")
    four_ranks(SCRIPT, folder)
    return folder
