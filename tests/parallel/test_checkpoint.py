"""A checkpoint continues the run under any layout, and exactly under the same one."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fastrlhf.parallel.mesh import Mesh

# Saved under, loaded under.
SHARDED = [(a, b) for a in ("tensor", "pipeline") for b in ("data-sharded-optimizer", "sequence", "both-sequence")]
PAIRS = [*SHARDED, ("tensor", "pipeline"), ("tensor", "tensor"), ("pipeline", "pipeline"), ("data", "both")]


def steps_of(ran: Path, layout: str) -> dict[str, Any]:
    return json.loads((ran / layout / "results.json").read_text())


def assert_same_steps(ours: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    assert len(ours) == len(expected) == 2
    for step, reference in zip(ours, expected, strict=True):
        assert step["loss"] == pytest.approx(reference["loss"], rel=1e-6)
        assert step["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-5)
        assert step["lr"] == reference["lr"]


@pytest.mark.parametrize(("saved", "loaded"), PAIRS)
def test_another_layout_continues_the_run(saved: str, loaded: str, ran: Path) -> None:
    assert_same_steps(steps_of(ran, loaded)["loaded"][saved], steps_of(ran, saved)["continued"])


@pytest.mark.parametrize("saved", ["tensor", "pipeline"])
def test_one_rank_continues_the_run(saved: str, ran: Path, script: ModuleType, mesh: Mesh) -> None:
    ours = script.load_and_continue(mesh, ran / f"saved.{saved}", distributed=True)
    assert_same_steps(ours, steps_of(ran, saved)["continued"])


def test_four_ranks_save_what_one_rank_would(ran: Path, script: ModuleType, mesh: Mesh, tmp_path: Path) -> None:
    serial = script.save_and_continue(mesh, tmp_path, distributed=False)
    for saved in ("data", "tensor", "pipeline"):
        assert_same_steps(steps_of(ran, saved)["continued"], serial)


def test_same_layout_continues_exactly_with_dropout_and_bf16(ran: Path) -> None:
    """Dropout's generators and the fp32 master weights are in the checkpoint: not even the last bit differs."""
    unbroken, resumed = steps_of(ran, "both-sequence")["resumed"]
    assert resumed == unbroken


def test_one_rank_continues_exactly(script: ModuleType, mesh: Mesh, tmp_path: Path) -> None:
    unbroken, resumed = script.resume_with_dropout(mesh, tmp_path)
    assert resumed == unbroken
    assert unbroken[0]["loss"] != unbroken[1]["loss"]
