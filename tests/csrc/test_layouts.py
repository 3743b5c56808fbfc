"""The tensor layouts in Python, Triton and C++ name the same elements in the same order."""

from __future__ import annotations

import importlib
import re
from enum import IntEnum
from pathlib import Path

import pytest

from fastrlhf.ops.layouts import (
    LAYOUTS,
    KLStatistic,
    Moment,
    PPOMetric,
    RankingMetric,
    SoftmaxStatistic,
)
from fastrlhf.ops.ppo import PPOLoss
from fastrlhf.ops.ranking import RankingLoss

ENUM = re.compile(r"struct (\w+) \{\s*enum : int64_t \{([^}]*)\};\s*\};")


def names(layout: type[IntEnum]) -> list[str]:
    """Return the members in the order of their values, in lower case."""
    assert sorted(layout) == list(range(len(layout)))
    return [member.name.lower() for member in sorted(layout)]


def test_the_cpp_header_has_the_layouts_of_python(root: Path) -> None:
    header = (root / "csrc/layouts.h").read_text()
    found = {name: re.findall(r"\w+", members) for name, members in ENUM.findall(header)}
    assert header.count("enum") == len(found) == len(LAYOUTS)
    assert found == {layout.__name__: [*names(layout), "size"] for layout in LAYOUTS}


@pytest.mark.parametrize(
    ("module", "layout"),
    [
        ("gae", Moment),
        ("logprob", SoftmaxStatistic),
        ("logits_kl", KLStatistic),
        ("ppo_loss", PPOMetric),
        ("ranking", RankingMetric),
    ],
)
def test_the_triton_kernels_use_the_layouts_of_python(module: str, layout: type[IntEnum]) -> None:
    pytest.importorskip("triton")
    constants = vars(importlib.import_module(f"fastrlhf.kernels.{module}"))
    for member in layout:
        assert constants[member.name].value == member, member


def test_metrics_are_the_fields_of_the_results() -> None:
    assert names(PPOMetric) == [*PPOLoss._fields, "grad_scale"]
    assert names(RankingMetric) == [*RankingLoss._fields, "grad_scale"]
