"""Fixtures of the op tests, which run on each available backend.

With TRITON_INTERPRET=1 (see tests/kernels) they run on Triton only.
"""

from __future__ import annotations

import os

import pytest
import torch

from fastrlhf.ops import backends

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


def _runnable() -> list[str]:
    if INTERPRETING:
        return ["triton"]
    report = backends()
    compiled = [name for name in ("cpu", "triton") if report[name]["available"]]
    return ["torch", *compiled]


@pytest.fixture(params=_runnable())
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def device(backend: str) -> torch.device:
    return torch.device("cuda" if backend == "triton" and not INTERPRETING else "cpu")


@pytest.fixture
def torch_only() -> None:
    """Skip, under the interpreter, a test that does not depend on the backend."""
    if INTERPRETING:
        pytest.skip("does not run a kernel")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def within():
    """Return a check that |ours - exact| <= max |torchs - exact| + bound, without NaN."""

    def check(
        ours: torch.Tensor, exact: torch.Tensor, torchs: torch.Tensor, bound: torch.Tensor | float
    ) -> None:
        assert ours.shape == exact.shape
        ours, exact, torchs = (t.detach().double().cpu() for t in (ours, exact, torchs))
        same = (ours == exact) | (ours.isneginf() & exact.isneginf())
        error = torch.where(same, 0.0, (ours - exact).abs())
        allowed = (
            torch.where(torchs == exact, 0.0, (torchs - exact).abs())
            .nan_to_num(0.0, posinf=0.0)
            .max()
            + bound
        )
        assert bool((error <= allowed).all()), f"error {error.max():.3e}, allowed {allowed}"

    return check
