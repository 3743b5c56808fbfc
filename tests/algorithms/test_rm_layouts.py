"""Shared prompts, token budgets and layouts change no loss and no gradient of the reward model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

SERIAL = ("separate", "budget", "separate-budget")
PARALLEL = ("dp4", "2x1-dp2-budget", "1x2-dp2-budget", "2x2-sequence-budget")


def metrics(workspace: Path, name: str) -> list[dict[str, float]]:
    return [
        json.loads(line)
        for line in (workspace / name / "rm" / "metrics.jsonl").read_text().splitlines()
    ]


@pytest.mark.parametrize("name", [*SERIAL, *PARALLEL])
def test_same_as_one_process(workspace: Path, name: str) -> None:
    serial, other = metrics(workspace, "serial"), metrics(workspace, name)
    assert len(serial) == len(other) == 3
    for expected, got in zip(serial, other, strict=True):
        for key in ("loss", "grad_norm", "accuracy", "margin", "pairs", "tokens_unshared"):
            assert got[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-6), (
                expected["step"],
                key,
            )


def test_tokens_are_counted(workspace: Path) -> None:
    """Three responses of r tokens to a prompt of p: p + 3 r tokens shared, 3 p + 3 r separate."""
    shared, separate = metrics(workspace, "serial"), metrics(workspace, "separate")
    for one, other in zip(shared, separate, strict=True):
        assert other["tokens"] == other["tokens_unshared"] == one["tokens_unshared"]
        assert one["tokens_unshared"] / 3 < one["tokens"] < 0.75 * one["tokens_unshared"]
    for name in PARALLEL:
        assert [line["tokens"] for line in metrics(workspace, name)] == [
            line["tokens"] for line in shared
        ]


@pytest.mark.parametrize("name", [*SERIAL, *PARALLEL])
def test_demonstrations_score_the_same(workspace: Path, name: str) -> None:
    """Compare the statistics of 21 demonstrations, which are unevenly split among the ranks."""

    def statistics(which: str) -> dict[str, float]:
        return json.loads((workspace / which / "rm" / "statistics.json").read_text())

    assert statistics(name) == pytest.approx(statistics("serial"), rel=1e-4, abs=1e-6)
    assert statistics("serial")["demonstration_std"] > 0.01


@pytest.mark.parametrize("name", ["dp4", "1x2-dp2-budget"])
def test_every_layout_evaluates_the_same(workspace: Path, name: str) -> None:
    serial, other = (
        json.loads((workspace / which / "eval_rm.json").read_text()) for which in ("separate", name)
    )
    assert serial["prompts"] == other["prompts"] == 41 and serial["pairs"] == 3 * 41
    for key in ("accuracy", "length_rule", "accuracy_by_distance"):
        assert other[key] == serial[key]
    assert other["loss"] == pytest.approx(serial["loss"], rel=1e-5)
    assert other["margin"] == pytest.approx(serial["margin"], rel=1e-4)
    assert serial["statistics"] == other["statistics"] != {}
