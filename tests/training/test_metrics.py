"""Logs of a run: metrics.jsonl, progress lines of a batch job, Weights & Biases, traces."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastrlhf.config import LogConfig
from fastrlhf.progress import Meter
from fastrlhf.training.metrics import MetricsLog


def _log(folder: Path, start_step: int = 0, **options: Any) -> MetricsLog:
    settings = LogConfig(**{"tensorboard": False, "progress": False, **options})
    return MetricsLog(
        folder, settings, title="sft", total_steps=3, start_step=start_step, is_main=True
    )


def test_numbers_that_json_does_not_know_are_null(tmp_path: Path) -> None:
    with _log(tmp_path) as log:
        log.record(1, {"loss": float("nan"), "grad_norm": float("inf"), "lr": 0.5})
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    values = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert values["loss"] is None and values["grad_norm"] is None and values["lr"] == 0.5


def test_without_a_terminal_steps_are_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with _log(tmp_path, progress=True) as log:
        for step in (1, 2, 3):
            log.record(step, {"loss": 2.0 / step, "other": 1.0})
    lines = capsys.readouterr().err.splitlines()
    # The first and the last immediately; those between at intervals of ten seconds.
    assert [line.split("  ")[0] for line in lines] == ["sft 1/3", "sft 3/3"]
    assert re.fullmatch(r"sft 1/3  0:00:0\d \(ETA 0:00:0\d\)  loss 2", lines[0])


def test_the_eta_counts_only_what_this_process_did(
    capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with Meter("reading", 1000, start=500, percent=True) as meter:
        now[0] += 60
        meter.update(750)
    assert capsys.readouterr().err == "reading 75%  0:01:00 (ETA 0:01:00)\n"


def test_there_is_no_eta_without_progress(
    capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    """A rate of one byte an hour would be an ETA of years."""
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with Meter("reading", 4_000_000, percent=True) as meter:
        now[0] += 60
        meter.update(0)
    assert capsys.readouterr().err == "reading 0%  0:01:00 (ETA unknown)\n"


def test_a_resumed_run_is_one_run_of_weights_and_biases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[dict[str, Any]] = []

    def init(**arguments: Any) -> Any:
        begun.append(arguments)
        return SimpleNamespace(log=lambda *_, **__: None, finish=lambda: None)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    (tmp_path / "config.yaml").write_text("optimizer: {lr: 0.5}\n")
    for start_step in (0, 2, 0):
        with _log(tmp_path, start_step, wandb_project="p"):
            pass
    first, resumed, new = (run["id"] for run in begun)
    assert first == resumed != new
    assert begun[0]["config"] == {"optimizer": {"lr": 0.5}} and begun[0]["resume"] == "allow"


def test_one_step_is_traced(tmp_path: Path) -> None:
    with _log(tmp_path, profile_step=2) as log:
        for step in (1, 2, 3):
            with log.traced(step):
                torch.ones(step, step) @ torch.ones(step, step)
    (trace,) = tmp_path.glob("trace_*.json")
    assert trace.name == "trace_2.json"
    names = [event["name"] for event in json.loads(trace.read_text())["traceEvents"]]
    assert names.count("aten::mm") == 1
