"""Killed at any moment, a run ends as the undisturbed one does: the same bits, and no step twice."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
LAYOUTS = ("dp2", "tp2")
STEPS = 20


def launch(command: list[str], seconds: float) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=seconds, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two ranks, undisturbed, killed and preempted."""
    out = tmp_path_factory.mktemp("faults")
    launch([sys.executable, str(HERE / "run_faults.py"), str(out)], 1800)
    return out


@pytest.fixture(scope="module")
def attempts(folder: Path) -> dict[str, list[dict[str, Any]]]:
    return json.loads((folder / "results.json").read_text())


def final_files(run: Path) -> dict[str, str]:
    """Hash of every file of tensors of the last checkpoint: weights, averages, optimizer states, generators."""
    checkpoint = run / "checkpoints" / (run / "checkpoints" / "latest").read_text()
    entries = json.loads((checkpoint / "files.json").read_text())["files"]
    return {
        name: entry["blake2b"] for name, entry in entries.items() if name.endswith(".safetensors")
    }


def final_state(run: Path) -> dict[str, Any]:
    checkpoint = run / "checkpoints" / (run / "checkpoints" / "latest").read_text()
    state = json.loads((checkpoint / "state.json").read_text())
    return {**state, "metrics": without_times(state["metrics"])}


def without_times(row: dict[str, Any]) -> dict[str, Any]:
    timed = re.compile(r"time|seconds.*|share_.*|.*_per_second")
    return {name: value for name, value in row.items() if not timed.fullmatch(name)}


def lines(path: Path) -> list[dict[str, Any]]:
    return [without_times(json.loads(line)) for line in path.read_text().splitlines()]


def assert_same_run(one: Path, other: Path) -> None:
    files = final_files(one)
    assert len(files) >= 10 and files == final_files(other)
    assert final_state(one) == final_state(other)
    assert lines(one / "metrics.jsonl") == lines(other / "metrics.jsonl")
    assert lines(one / "samples.jsonl") == lines(other / "samples.jsonl")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_undisturbed_runs_are_what_they_should_be(layout: str, folder: Path) -> None:
    """The comparisons below would hold for runs that never train."""
    metrics = lines(folder / layout / "metrics.jsonl")
    assert [row["step"] for row in metrics] == list(range(1, STEPS + 1))
    assert len({row["loss"] for row in metrics}) == STEPS
    assert len({json.dumps(row) for row in lines(folder / layout / "samples.jsonl")}) > 40


@pytest.mark.parametrize("layout", LAYOUTS)
def test_killed_runs_end_like_undisturbed_ones(
    layout: str, folder: Path, attempts: dict[str, list[dict[str, Any]]]
) -> None:
    *killed, last = attempts[layout]
    assert len(killed) == 15 and all(-9 in attempt["statuses"] for attempt in killed)
    assert sum(attempt["writing"] for attempt in killed) >= 4
    assert len({attempt["latest"] for attempt in killed}) >= 4  # they got on in between
    assert last["statuses"] == [0, 0]
    assert_same_run(folder / layout, folder / f"{layout}.killed")


def test_preempted_runs_lose_no_step(
    folder: Path, attempts: dict[str, list[dict[str, Any]]]
) -> None:
    """SIGTERM to one rank, then a time limit of one step: exit status 0, and a checkpoint of the step just made."""
    told, timed_out, last = attempts["preempted"]
    assert told["statuses"] == timed_out["statuses"] == last["statuses"] == [0, 0]
    after, then = (int(attempt["latest"].removeprefix("step_")) for attempt in (told, timed_out))
    assert 1 <= after <= 3 and then == after + 1
    log = (folder / "preempted.log").read_text()
    assert (
        f"stopped by SIGTERM after step {after} of {STEPS}: saved, and the same command goes on from there"
        in log
    )
    assert (
        f"stopped by its time limit (train.max_seconds) after step {then} of {STEPS}: saved" in log
    )
    assert_same_run(folder / "dp2", folder / "dp2.preempted")


def test_torchrun_restarts_a_killed_rank(folder: Path) -> None:
    """A rank dies in the middle of step 4; torchrun --max-restarts starts all ranks again, from the last checkpoint."""
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    told = launch(
        [*torchrun, "--max-restarts", "1", str(HERE / "run_elastic.py"), str(folder)], 1800
    )
    # Step 3's checkpoint was still being written in the background, or just done.
    assert re.search(rf"resuming .*dp2\.elastic after step [23] of {STEPS}", told)
    assert_same_run(folder / "dp2", folder / "dp2.elastic")
