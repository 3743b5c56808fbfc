"""`fastrlhf plan`: the shipped configurations, the paper's compute, its refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastrlhf.cli import main
from fastrlhf.config import load_config
from fastrlhf.plan.hardware import load_hardware
from fastrlhf.plan.planner import Plan, make_plan

CONFIGS = Path(__file__).parents[2] / "configs" / "instructgpt"
SHIPPED = [
    ("1.3b/sft", "sft", 8),
    ("1.3b/rl_init", "sft", 8),
    ("1.3b/rm", "rm", 8),
    ("1.3b/ppo_ptx", "ppo", 16),
    ("6b/sft", "sft", 8),
    ("6b/rl_init", "sft", 8),
    ("6b/rm", "rm", 8),
    ("6b/ppo_ptx", "ppo", 32),
    ("175b/sft", "sft", 128),
    ("175b/rl_init", "sft", 128),
    ("175b/rm", "rm", 8),
    ("175b/ppo_ptx", "ppo", 256),
]
PHASES = {"ppo": {"start", "update", "first update", "rollout", "scoring"}}


def plan(name: str, command: str, gpus: int, *overrides: str, samples: int | None = None) -> Plan:
    source = CONFIGS / f"{name}.yaml"
    config = load_config(source, list(overrides))
    return make_plan(config, command, gpus, load_hardware("h100-80gb"), source, samples=samples)


@pytest.mark.parametrize(("name", "command", "gpus"), SHIPPED)
def test_shipped_configurations_fit(name, command, gpus):
    result = plan(name, command, gpus)
    assert result.fits, result.binding
    assert set(result.ranks[0].parts) == PHASES.get(command, {"start", "update"})


def test_papers_compute():
    """4.9 PF/s-days for the 175B SFT model and 60 for PPO-ptx (section 5.1), within 5 %.

    13k demonstrations (table 6: 11,295 from labelers and 1,430 from customers), 16 epochs.
    """
    sft = plan("175b/sft", "sft", 128, samples=11295 + 1430)
    assert sft.pflops_days == pytest.approx(4.9, rel=0.05)
    assert plan("175b/ppo_ptx", "ppo", 256).pflops_days == pytest.approx(60, rel=0.05)


def test_too_few_gpus_are_named():
    result = plan("175b/ppo_ptx", "ppo", 64, "parallel.pipeline=8")
    assert not result.fits
    assert "first update needs" in result.binding
    assert "ppo.offload=true" in result.binding
    assert "parallel.pipeline=16" in result.binding
    relieved = plan("175b/ppo_ptx", "ppo", 64, "parallel.pipeline=8", "ppo.offload=true")
    assert relieved.worst[0].peak["first update"] < result.worst[0].peak["first update"]


def run(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["fastrlhf", "plan", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_command(monkeypatch, capsys, tmp_path):
    page = tmp_path / "plan.html"
    config = str(CONFIGS / "1.3b" / "ppo_ptx.yaml")
    options = ["--command", "ppo", "--gpus", "16", "--gpu", "h200", "--json", "--html", str(page)]
    assert run(monkeypatch, config, *options) == 0
    results = json.loads(capsys.readouterr().out)
    assert results["fits"] is True
    assert {"kind", "static_gib", "peak_gib", "host_gib"} == set(results["ranks"][0])
    for values in results["seconds"].values():
        assert values["low"] <= values["mid"] <= values["high"]
    total = sum(v["mid"] for phase, v in results["seconds"].items() if phase != "iteration")
    assert results["seconds"]["iteration"]["mid"] == pytest.approx(total, abs=1e-3)
    assert 0 <= results["bubble"] < 1
    assert results["pflops_days"] > 0
    assert "KV cache" in page.read_text()


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--gpus", "12"], "--gpus 12 is not a multiple"),
        (["--gpus", "16", "--gpu", "h1000"], "expected one of a100-80gb, b200, h100-80gb, h200"),
        (["--gpus", "16", "--command", "dpo"], "unknown training command 'dpo'"),
        (["--gpus", "16", "--lengths", "/nowhere"], "/nowhere"),
    ],
)
def test_mistakes_are_one_line(monkeypatch, capsys, options, part):
    config = str(CONFIGS / "175b" / "ppo_ptx.yaml")
    assert run(monkeypatch, config, *options) == 2
    error = capsys.readouterr().err
    assert part in error
    assert error.count("\n") == 1
