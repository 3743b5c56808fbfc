"""Fixtures: the shared cases and their results under the layouts of four ranks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("cases.py")


@pytest.fixture(scope="session")
def cases(imported: Callable[[Path], ModuleType]) -> ModuleType:
    return imported(SCRIPT)


@pytest.fixture(scope="module")
def parallel_results(
    tmp_path_factory: pytest.TempPathFactory, four_ranks: Callable[..., None]
) -> dict[str, list[dict[str, Any]]]:
    """Return layout -> results of each rank."""
    folder = tmp_path_factory.mktemp("generation")
    four_ranks(SCRIPT, folder)
    results: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.json")):
        layout = path.name.split(".")[0]
        found = json.loads(path.read_text()) | {"samples": folder / f"{layout}.samples"}
        results.setdefault(layout, []).append(found)
    return results
