"""A checkpoint continues the run under any layout, and bitwise under the same one."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fastrlhf.parallel.mesh import Mesh

SAVED = ("tensor", "pipeline", "data")
LOADED = (
    "data",
    "data-sharded-optimizer",
    "tensor",
    "sequence",
    "pipeline",
    "both",
    "both-sequence",
)


def read(ran: Path, layout: str, name: str) -> Any:
    return json.loads((ran / layout / f"{name}.json").read_text())


def assert_same_steps(ours: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    assert len(ours) == len(expected) == 2
    for step, reference in zip(ours, expected, strict=True):
        assert step["loss"] == pytest.approx(reference["loss"], rel=1e-6)
        assert step["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-5)
        assert step["lr"] == reference["lr"]


@pytest.mark.parametrize("loaded", LOADED)
@pytest.mark.parametrize("saved", SAVED)
def test_another_layout_continues_the_run(saved: str, loaded: str, ran: Path) -> None:
    """Tensor, pipeline and data-parallel sizes differ, and the optimizer may be sharded or not."""
    got = read(ran, loaded, "loaded")[saved]
    assert got["same weights"]
    assert_same_steps(got["steps"], read(ran, saved, "results")["continued"])


@pytest.mark.parametrize("saved", SAVED)
def test_every_other_layout_saves_what_it_loaded(saved: str, ran: Path) -> None:
    """Loading and saving in another layout and again here gives the same files.

    So weights and Adam's state are bitwise equal.
    """
    same = read(ran, saved, "back")
    assert same == dict.fromkeys(LOADED, True)


@pytest.mark.parametrize("saved", SAVED)
@pytest.mark.parametrize("distributed", [True, False])
def test_one_rank_continues_the_run(
    saved: str, distributed: bool, ran: Path, script: ModuleType, mesh: Mesh
) -> None:
    ours = script.load_and_continue(mesh, ran / f"saved.{saved}", distributed=distributed)
    assert ours["same weights"]
    assert_same_steps(ours["steps"], read(ran, saved, "results")["continued"])


def test_four_ranks_save_what_one_rank_would(
    ran: Path, script: ModuleType, mesh: Mesh, tmp_path: Path
) -> None:
    serial = script.save_and_continue(mesh, tmp_path, distributed=False)
    for saved in SAVED:
        assert_same_steps(read(ran, saved, "results")["continued"], serial)


def test_same_layout_continues_exactly_with_dropout_and_bf16(ran: Path) -> None:
    """Dropout's generators and fp32 masters are in the checkpoint: steps are bitwise equal."""
    unbroken, resumed = read(ran, "both-sequence", "results")["resumed"]
    assert resumed == unbroken


def test_one_rank_continues_exactly(script: ModuleType, mesh: Mesh, tmp_path: Path) -> None:
    unbroken, resumed = script.resume_with_dropout(mesh, tmp_path)
    assert resumed == unbroken
    assert unbroken[0]["loss"] != unbroken[1]["loss"]
