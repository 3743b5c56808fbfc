"""Trainers on a stand-in for a GPU: no tensor is left on the host, and the host seldom waits for the device."""

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
    """Of each run, how often rank 0 waited for the device, by "file:function"; a run that mixed devices has failed."""
    folder = tmp_path_factory.mktemp("devices")
    torchrun(SCRIPT, folder, ranks=2)
    return {
        path.name.split(".")[0]: json.loads(path.read_text())
        for path in folder.glob("*.waits.json")
    }


def test_every_trainer_runs(waits: dict[str, dict[str, int]]) -> None:
    assert set(waits) == {"pretrain", "sft", "sft-micro-1", "rm", "ppo", "ppo-tensor"}


def test_a_step_waits_as_often_for_many_micro_batches(waits: dict[str, dict[str, int]]) -> None:
    assert waits["sft"] == waits["sft-micro-1"]
    assert waits["sft"]["algorithms/sft.py:step"] == STEPS


def test_a_decode_step_waits_once(waits: dict[str, dict[str, int]]) -> None:
    decoding = {
        place: n for place, n in waits["ppo"].items() if place.startswith("generation/engine")
    }
    assert sum(decoding.values()) == STEPS * TOKENS


@pytest.mark.parametrize("run", ["ppo", "ppo-tensor"])
def test_micro_batches_of_ppo_wait_for_no_mask(run: str, waits: dict[str, dict[str, int]]) -> None:
    heads = {"algorithms/ppo.py:_values", "algorithms/ppo.py:_reference_logprobs"}
    assert not heads & set(waits[run])
    assert (
        waits[run]["algorithms/rollouts.py:to_padded"] == 2 * STEPS
    )  # what all micro-batches were scored, put in place


CHECKS = """
import stand_in

stand_in.start()
import torch

def refused(operation):
    try:
        operation()
    except stand_in.DeviceError as error:
        return str(error)
    return "nothing"

x = torch.ones(3, device="cuda")
both = (x * 2).requires_grad_()
print(refused(lambda: x + torch.ones(3)))
print(refused(lambda: torch.ones(3)[x.long()]))
print(refused(lambda: x.numpy()))
print(refused(lambda: both.cpu() * x))
(both.cpu() * torch.arange(3.0)).sum().backward()
print(both.device, both.grad.device, both.grad.cpu().tolist(), (x * torch.tensor(2.0)).is_cuda, torch.ones(1).device)
"""


def test_the_stand_in_refuses_what_a_gpu_would() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHECKS],
        cwd=SCRIPT.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines() == [
        "aten::add: expected all tensors on one device, got [(3,)] on cuda:0 and [(3,)] on the CPU",
        "aten::index: indices are on cuda:0, what they index is on the CPU",
        "can't convert cuda:0 device type tensor to numpy",
        "aten::mul: expected all tensors on one device, got [(3,)] on cuda:0 and [(3,)] on the CPU",
        "cuda:0 cuda:0 [0.0, 1.0, 2.0] True cpu",
    ], done.stderr[-2000:]
