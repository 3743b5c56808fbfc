"""Tests that need a GPU and real sizes: minutes on a CPU, seconds on an H200."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def gib():
    """Return a function that skips the test unless the GPU has n GiB free."""

    def need(count: float) -> None:
        free, _ = torch.cuda.mem_get_info()
        if free < count * 2**30:
            pytest.skip(f"needs {count} GiB of GPU memory, {free / 2**30:.0f} are free")

    return need


@pytest.fixture(autouse=True)
def _seed_and_free():
    torch.manual_seed(0)
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
