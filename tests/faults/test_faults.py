"""A run that is killed at any moment ends with the same bits as an undisturbed one."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from python_runs import run_python

from configs.debug import make_data

HERE = Path(__file__).parent
LAYOUTS = ("dp2", "tp2")
STEPS = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of runs of two ranks: undisturbed, killed and preempted."""
    out = tmp_path_factory.mktemp("faults")
    make_data.main(out / "data")
    run_python([str(HERE / "run_faults.py"), str(out)])
    return out


@pytest.fixture(scope="module")
def attempts(folder: Path) -> dict[str, list[dict[str, Any]]]:
    return json.loads((folder / "results.json").read_text())


def final_files(run: Path) -> dict[str, str]:
    """Return the hashes of the last checkpoint's tensor files.

    They hold weights, averages, optimizer states and random generators.
    """
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
def test_undisturbed_runs_train(layout: str, folder: Path) -> None:
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
    assert len({attempt["latest"] for attempt in killed}) >= 4  # they made progress in between
    assert last["statuses"] == [0, 0]
    assert_same_run(folder / layout, folder / f"{layout}.killed")


def test_preempted_runs_lose_no_step(
    folder: Path, attempts: dict[str, list[dict[str, Any]]]
) -> None:
    """SIGTERM to one rank, and a time limit of one step, save the last step and exit with 0."""
    terminated, timed_out, last = attempts["preempted"]
    assert terminated["statuses"] == timed_out["statuses"] == last["statuses"] == [0, 0]
    after, then = (
        int(attempt["latest"].removeprefix("step_")) for attempt in (terminated, timed_out)
    )
    assert 1 <= after <= 3 and then == after + 1
    log = (folder / "preempted.log").read_text()
    saved = "saved, and the same command continues from there"
    assert f"stopped by SIGTERM after step {after} of {STEPS}: {saved}" in log
    time_limit = "its time limit (train.max_seconds)"
    assert f"stopped by {time_limit} after step {then} of {STEPS}: saved" in log
    assert_same_run(folder / "dp2", folder / "dp2.preempted")


def test_torchrun_restarts_a_killed_rank(folder: Path) -> None:
    """A rank dies during step 4; torchrun --max-restarts restarts all from the last checkpoint."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = str(HERE / "run_elastic.py")
    stderr = run_python([*torchrun, "--max-restarts", "1", script, str(folder)])
    # Step 3's checkpoint was still being written in the background, or just done.
    assert re.search(rf"resuming .*dp2\.elastic after step [23] of {STEPS}", stderr)
    assert_same_run(folder / "dp2", folder / "dp2.elastic")
