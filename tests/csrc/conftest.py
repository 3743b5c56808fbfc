"""Fixtures that select the instruction set and threads of the CPU extension."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastrlhf.ops.dispatch import backends

LEVELS = ("avx512bf16", "avx512", "avx2", "default")


@pytest.fixture(scope="session")
def root() -> Path:
    return Path(__file__).parents[2]


@pytest.fixture
def built() -> None:
    why = backends()["cpu"]["why_not"]
    if why:
        pytest.skip(why)


@pytest.fixture(params=LEVELS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, built: None) -> str:
    """Run the test once for each instruction set that this build and this CPU have."""
    monkeypatch.setenv("FASTRLHF_CPU_ISA", request.param)
    try:
        assert torch.ops.fastrlhf_cpu.isa() == request.param
    except RuntimeError as error:
        pytest.skip(str(error))
    return request.param


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def cpu(isa: str) -> SimpleNamespace:
    """Return the raw kernels, under the instruction set of `isa`."""
    assert os.environ["FASTRLHF_CPU_ISA"] == isa
    return torch.ops.fastrlhf_cpu
