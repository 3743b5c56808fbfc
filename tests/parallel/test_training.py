"""Every layout has the gradients and updates of one rank; half precision trains."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastrlhf.parallel.mesh import Mesh

LAYOUTS = {
    "data": [1, 1, 4],
    "data-sharded-optimizer": [1, 1, 4],
    "tensor": [2, 1, 2],
    "sequence": [2, 1, 2],
    "pipeline": [1, 2, 2],
    "both": [2, 2, 1],
    "both-sequence": [2, 2, 1],
}


def results(ran: Path, layout: str) -> dict[str, Any]:
    found = json.loads((ran / layout / "results.json").read_text())
    assert found["place"] == LAYOUTS[layout]
    return found


@pytest.fixture(scope="module", params=["tied", "untied"])
def serial(request: pytest.FixtureRequest, script: ModuleType, mesh: Mesh) -> dict[str, Any]:
    """Return one rank's gradients, steps and weights, with tied and with untied embeddings."""
    return {"kind": request.param} | script.two_steps(mesh, request.param, distributed=False)


@pytest.mark.parametrize("layout", LAYOUTS)
class TestLayouts:
    """Each layout compared with one rank."""

    def test_losses_and_gradient_norms(
        self, layout: str, serial: dict[str, Any], ran: Path
    ) -> None:
        steps = results(ran, layout)[serial["kind"]]
        assert len(steps) == len(serial["steps"]) == 2
        for ours, expected in zip(steps, serial["steps"], strict=True):
            assert ours["loss"] == pytest.approx(expected["loss"], rel=1e-6)
            assert ours["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
            assert ours["lr"] == expected["lr"]

    def test_gradients(self, layout: str, serial: dict[str, Any], ran: Path) -> None:
        gradients = load_file(ran / layout / f"{serial['kind']}.gradients.safetensors")
        assert gradients.keys() == serial["gradients"].keys()
        for name, expected in serial["gradients"].items():
            assert (gradients[name] - expected).abs().max() <= 1e-6 + 1e-5 * expected.abs().max(), (
                name
            )
            assert expected.abs().max() > 1e-4, name

    def test_weights_after_two_steps(self, layout: str, serial: dict[str, Any], ran: Path) -> None:
        weights = load_file(ran / layout / f"{serial['kind']}.weights.safetensors")
        assert weights.keys() == serial["weights"].keys()
        for name, expected in serial["weights"].items():
            assert (weights[name] - expected).abs().max() <= 1e-5, name


def test_one_rank_trains(script: ModuleType, mesh: Mesh, serial: dict[str, Any]) -> None:
    """The reference's steps change every weight, clip, and lower the loss of a repeated batch."""
    training = script.Training(
        mesh, script.ModelConfig(**script.MODELS[serial["kind"]], dtype="fp32")
    )
    for name, before in training.weights().items():
        assert not torch.equal(before, serial["weights"][name]), name
    assert all(step["grad_norm"] > script.OPTIMIZER["clip_grad"] for step in serial["steps"])
    losses = [step["loss"] for step in training.steps([0] * 8)]
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_trains_like_fp32(
    dtype: str, ran: Path, script: ModuleType, mesh: Mesh
) -> None:
    half = results(ran, "both-sequence")[dtype]
    assert half["moved"] and half["agree"]
    assert not any(step.get("skipped") for step in half["steps"])
    training = script.Training(mesh, script.ModelConfig(**script.MODELS["tied"], dtype="fp32"))
    for ours, exact in zip(half["steps"], training.steps([0] * 5), strict=True):
        assert ours["loss"] == pytest.approx(
            exact["loss"],
            rel=1e-2,  # bf16 has 8 significant bits: a rounding is 0.4 %
        )


def test_fp16_overflow_skips_the_step_on_every_rank_and_lowers_the_scale(ran: Path) -> None:
    overflow = results(ran, "both-sequence")["fp16.overflow"]
    assert overflow["agree"] and not overflow["moved"]
    assert [step["skipped"] for step in overflow["steps"]] == [1.0] * 3
    assert len({step["loss"] for step in overflow["steps"]}) == 1
    # A skipped step does not advance the schedule.
    assert len({step["lr"] for step in overflow["steps"]}) == 1
    assert overflow["steps"][-1]["loss_scale"] < overflow["steps"][0]["loss_scale"]


def test_an_update_without_micro_batches_is_an_error(script: ModuleType, mesh: Mesh) -> None:
    training = script.Training(mesh, script.ModelConfig(**script.MODELS["tied"], dtype="fp32"))
    with pytest.raises(ValueError, match="every data-parallel rank needs a micro-batch"):
        training.learner.accumulate([], script.lm_head(training.stage, 1.0))
