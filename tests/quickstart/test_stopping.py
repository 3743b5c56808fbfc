"""A signal in any stage of the quickstart stops the run, and the same command continues there."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fastrlhf.algorithms.sft import SupervisedFinetuning
from fastrlhf.parallel.mesh import Mesh
from fastrlhf.quickstart import corpus, stages, torchrun
from fastrlhf.quickstart.configs import Scale

SCALE = Scale(
    vocab_size=512,
    layers=1,
    hidden=32,
    heads=2,
    pretrain_steps=4,
    sft_steps=4,
    ranking_prompts=8,
    eval_prompts=4,
)


@pytest.fixture
def signals(monkeypatch: pytest.MonkeyPatch) -> dict[int, signal.Signals]:
    """Signals to raise in the n-th training step from now, counted over all stages."""
    planned: dict[int, signal.Signals] = {}
    step, done = SupervisedFinetuning.step, iter(range(1, 100))

    def signalled(self: SupervisedFinetuning, batches: Any) -> dict[str, float]:
        if (number := planned.get(next(done))) is not None:
            signal.raise_signal(number)
        return step(self, batches)

    monkeypatch.setattr(SupervisedFinetuning, "step", signalled)
    return planned


def test_a_stopped_stage_stops_the_run_and_is_resumed(
    mesh: Mesh,
    signals: dict[int, signal.Signals],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    limits = corpus.Limits(source_bytes=10_000_000)
    gather = functools.lru_cache(functools.partial(corpus.gather, limits=limits))
    monkeypatch.setattr(corpus, "gather", gather)
    run = functools.partial(stages.run, tmp_path, scale=SCALE)
    # Steps 1 and 2 of pretraining; 3 and 4, the last; 1 to 3 of SFT.
    signals |= {2: signal.SIGTERM, 4: signal.SIGTERM, 7: signal.SIGINT}

    run()
    text = capfd.readouterr().err
    assert "stopped by SIGTERM after step 2 of 4" in text
    assert "stopped in the stage pretrain; the same command continues from there" in text
    assert (tmp_path / "pretrain" / "checkpoints" / "latest").read_text() == "step_00000002"
    assert not (tmp_path / "sft").exists()

    run()
    out, text = capfd.readouterr()
    assert "resuming" in text and "pretrain after step 2 of 4" in text
    assert "pretrain finished after step 4" in out and "stopped by" not in text
    assert "stopped in the stage pretrain" in text and not (tmp_path / "sft").exists()

    with pytest.raises(KeyboardInterrupt):
        run()
    text = capfd.readouterr().err
    assert "pretrain is finished (step 4 of 4)" in text
    assert "stopped by Ctrl-C (SIGINT) after step 3 of 4" in text
    assert not (tmp_path / "data" / "samples.jsonl").exists()
    assert not (tmp_path / "summary.json").exists()


@pytest.mark.parametrize("stopped", ["pretrain", "sft", "rm", "ppo", "ppo_ptx"])
def test_nothing_follows_a_stopped_stage(
    stopped: str, mesh: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []

    def train(_command: str, config: Any) -> bool:
        ran.append(Path(config.output_dir).name)
        return ran[-1] != stopped

    def other(self: Any, *_arguments: Any) -> None:
        ran.append("other")

    monkeypatch.setattr(stages.train, "train", train)
    for method in ("rank", "prepare"):
        monkeypatch.setattr(stages._Quickstart, method, other)
    answers = SimpleNamespace(called=False)
    monkeypatch.setattr(
        stages._Quickstart, "answers", lambda self: setattr(answers, "called", True)
    )
    stages.run(tmp_path, scale=SCALE)
    assert ran[-1] == stopped and not answers.called


TORCHRUN = """
import signal, sys, time
from pathlib import Path

def stop(number, frame):
    Path(sys.argv[-1]).write_text(signal.Signals(number).name)
    sys.exit(3)

for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, stop)
Path(sys.argv[-1] + ".ready").touch()
time.sleep(300)
"""
PARENT = """
import sys
from pathlib import Path
from fastrlhf.quickstart import torchrun

real = torchrun.subprocess.Popen
torchrun.subprocess.Popen = lambda command, **options: real(
    [sys.executable, sys.argv[1], sys.argv[2]], **options
)
try:
    torchrun.run_under_torchrun(2, {"out": "x"})
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 3), (signal.SIGINT, 130)])
def test_signals_reach_torchrun(number: signal.Signals, status: int, tmp_path: Path) -> None:
    """Before, torchrun continued without its parent after SIGTERM and was killed by Ctrl-C."""
    child, parent, mark = tmp_path / "child.py", tmp_path / "parent.py", tmp_path / "mark"
    child.write_text(TORCHRUN)
    parent.write_text(PARENT)
    root = str(Path(torchrun.__file__).parents[2])
    process = subprocess.Popen(
        [sys.executable, str(parent), str(child), str(mark)],
        env={**os.environ, "PYTHONPATH": root},
    )
    limit = time.monotonic() + 120
    while not mark.with_name("mark.ready").exists() and time.monotonic() < limit:
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(timeout=120) == status
    assert mark.read_text() == number.name
