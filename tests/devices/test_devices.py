"""Trainers on a simulated GPU: no tensor is left on the host, and the host rarely waits."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("run_trainers.py")
STEPS, TOKENS = 2, 16


@pytest.fixture(scope="module")
def waits(
    tmp_path_factory: pytest.TempPathFactory, torchrun: Callable[..., None]
) -> dict[str, dict[str, int]]:
    """Return, per run, the number of waits of rank 0 for the device by "file:function".

    A run that mixes devices fails.
    """
    folder = tmp_path_factory.mktemp("devices")
    torchrun(SCRIPT, folder, ranks=2)
    return {
        path.name.split(".")[0]: json.loads(path.read_text())
        for path in folder.glob("*.waits.json")
    }


def test_every_trainer_runs(waits: dict[str, dict[str, int]]) -> None:
    assert set(waits) == {"pretrain", "sft", "sft-micro-1", "rm", "ppo", "ppo-tensor"}


def test_waits_of_a_step_do_not_depend_on_micro_batches(waits: dict[str, dict[str, int]]) -> None:
    assert waits["sft"] == waits["sft-micro-1"]
    assert waits["sft"]["algorithms/sft.py:step"] == STEPS


def test_a_decode_step_waits_once(waits: dict[str, dict[str, int]]) -> None:
    decoding = {
        place: n for place, n in waits["ppo"].items() if place.startswith("generation/engine")
    }
    assert sum(decoding.values()) == STEPS * TOKENS


@pytest.mark.parametrize("run", ["ppo", "ppo-tensor"])
def test_micro_batches_of_ppo_do_not_wait_for_masks(
    run: str, waits: dict[str, dict[str, int]]
) -> None:
    heads = {
        "algorithms/episode_scores.py:_values",
        "algorithms/episode_scores.py:_reference_logprobs",
    }
    assert not heads & set(waits[run])
    # The scores of all micro-batches are scattered once per model and step.
    assert waits[run]["algorithms/rollouts.py:to_padded"] == 2 * STEPS


CHECKS = """
import stand_in

stand_in.start()
import torch

def error_of(operation):
    try:
        operation()
    except stand_in.DeviceError as error:
        return str(error)
    return "nothing"

x = torch.ones(3, device="cuda")
y = (x * 2).requires_grad_()
print(error_of(lambda: x + torch.ones(3)))
print(error_of(lambda: torch.ones(3)[x.long()]))
print(error_of(lambda: x.numpy()))
print(error_of(lambda: y.cpu() * x))
(y.cpu() * torch.arange(3.0)).sum().backward()
print(y.device, y.grad.device, y.grad.cpu().tolist())
print((x * torch.tensor(2.0)).is_cuda, torch.ones(1).device)
"""


def test_the_simulated_gpu_raises_where_a_gpu_does() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHECKS],
        cwd=SCRIPT.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines() == [
        "aten::add: expected all tensors on one device, got [(3,)] on cuda:0 and [(3,)] on the CPU",
        "aten::index: indices are on cuda:0, but the indexed tensor is on the CPU",
        "can't convert cuda:0 device type tensor to numpy",
        "aten::mul: expected all tensors on one device, got [(3,)] on cuda:0 and [(3,)] on the CPU",
        "cuda:0 cuda:0 [0.0, 1.0, 2.0]",
        "True cpu",
    ], done.stderr[-2000:]
