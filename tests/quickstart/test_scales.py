"""The scale of a quickstart: as requested, as recorded in its folder, or by the time of a step."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastrlhf.config import Config, ParallelConfig
from fastrlhf.data.batches import PackedBatch
from fastrlhf.errors import UserError
from fastrlhf.parallel import mesh as meshes
from fastrlhf.quickstart import scales, stages
from fastrlhf.quickstart.configs import SCALES, SHORT, Scale, model_section, stage_config

TINY = Scale(vocab_size=256, layers=2, hidden=32, heads=2, batch=4, window=16)


@pytest.fixture(scope="module")
def mesh() -> Iterator[meshes.Mesh]:
    yield meshes.initialize(ParallelConfig(), seed=3)
    meshes.finalize()


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return stage_config(
        "pretrain", tmp_path, TINY, model_section(TINY), {"tensor": 1, "pipeline": 1}, 3
    )


def test_the_short_scale_is_the_same_task_after_less_work() -> None:
    """Only amounts of training differ; model, evaluation and learning rates are the same."""
    full = SCALES["full"]
    amounts = {
        "pretrain_steps": full.pretrain_steps,
        "sft_steps": full.sft_steps,
        "ppo_steps": full.ppo_steps,
    }
    assert all(getattr(SHORT, name) < amount for name, amount in amounts.items())
    assert replace(SHORT, **amounts) == full == Scale()


@pytest.mark.parametrize(
    ("seconds", "expected"), [(0.1, "full"), (0.279, "full"), (0.281, "short"), (9.0, "short")]
)
def test_auto_keeps_the_full_scale_under_seven_minutes(
    seconds: float,
    expected: scales.ScaleName,
    mesh: meshes.Mesh,
    config: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scales, "step_seconds", lambda *_: seconds)
    assert scales.choose(tmp_path, "auto", mesh, config) == (expected, seconds)
    # A resumed run keeps the scale, however fast the machine is then.
    monkeypatch.setattr(scales, "step_seconds", lambda *_: pytest.fail("measured again"))
    assert scales.choose(tmp_path, "auto", mesh, config) == (expected, seconds)
    assert scales.choose(tmp_path, expected, mesh, config) == (expected, seconds)
    other: scales.ScaleName = "short" if expected == "full" else "full"
    with pytest.raises(
        UserError, match=rf"has a run at scale {expected}; give another --out for --scale {other}"
    ):
        scales.choose(tmp_path, other, mesh, config)


@pytest.mark.parametrize("requested", ["full", "short"])
def test_a_requested_scale_needs_no_measurement(
    requested: scales.ScaleName,
    mesh: meshes.Mesh,
    config: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scales, "step_seconds", lambda *_: pytest.fail("measured"))
    assert scales.choose(tmp_path, requested, mesh, config) == (requested, None)
    assert json.loads((tmp_path / "scale.json").read_text()) == {
        "scale": requested,
        "step_seconds": None,
    }


def test_the_measured_step_is_one_of_pretraining(
    mesh: meshes.Mesh, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has the scale's sizes, and does not change the state of the random generators."""
    seen = []
    step = scales.SupervisedFinetuning.step

    def recorded(self: scales.SupervisedFinetuning, batches: list[PackedBatch]) -> dict[str, float]:
        seen.extend(batch.tokens.numel() for batch in batches)
        return step(self, batches)

    monkeypatch.setattr(scales.SupervisedFinetuning, "step", recorded)
    before = torch.get_rng_state()
    assert 0.0 < scales.step_seconds(mesh, config, TINY) < 60.0
    assert seen == [TINY.batch * TINY.window] * 4
    assert torch.equal(torch.get_rng_state(), before)


def test_a_pretrained_model_has_a_fixed_scale(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"--scale short is for the tiny model only; leave it out with --model"
    ):
        stages.run(tmp_path / "out", scale="short", model=str(tmp_path))
