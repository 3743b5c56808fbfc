"""Start-up, seeds, and the report about a rank that does not join a collective."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastrlhf import cli
from fastrlhf.config import ParallelConfig
from fastrlhf.errors import UserError
from fastrlhf.parallel import mesh as meshes
from fastrlhf.parallel.watchdog import _WAITS, _waits, describe_failure

STALL = Path(__file__).with_name("stall.py")


def test_world_that_cannot_be_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "6")
    with pytest.raises(
        UserError,
        match=r"6 processes .* parallel.tensor=2 \* parallel.pipeline=2 = 4: launch a multiple",
    ):
        meshes.initialize(ParallelConfig(tensor=2, pipeline=2), seed=1)
    assert not torch.distributed.is_initialized()


def test_one_process_is_a_mesh_without_torchrun() -> None:
    mesh = meshes.initialize(ParallelConfig(sequence=True), seed=1)
    try:
        assert (mesh.world_size, mesh.tensor_size, mesh.pipeline_size, mesh.data_size) == (
            1,
            1,
            1,
            1,
        )
        assert mesh.is_first_stage and mesh.is_last_stage and mesh.vocab_group is None
        assert not mesh.sequence_parallel  # there is one rank
        rows = [{"a": 1.0, "b": torch.tensor(2.0)}, {"a": 0.5, "b": 3.0}]
        assert mesh.sum_metrics(rows, ["a", "b", "c"]) == {"a": 1.5, "b": 5.0, "c": 0.0}
        assert mesh.sum_metrics(rows, ["a", "b"], largest=["b"]) == {"a": 1.5, "b": 3.0}
        with pytest.raises(AssertionError, match="not all in"):
            mesh.sum_metrics(rows, ["a"])
    finally:
        meshes.finalize()


def test_seeds_decide_the_generators() -> None:
    mesh = meshes.initialize(ParallelConfig(), seed=1)
    try:
        draws = []
        for seed in (1, 2, 1):
            meshes.seed_generators(mesh, seed)
            draws.append(torch.rand(8))
        assert torch.equal(draws[0], draws[2]) and not torch.equal(draws[0], draws[1])
    finally:
        meshes.finalize()


def test_a_stalled_rank_is_reported_with_rank_phase_and_collective() -> None:
    """With parallel.timeout_s=10, rank 0 stops waiting for rank 1, which sleeps for an hour."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(STALL),
    ]
    start = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert time.monotonic() - start < 1800
    assert done.returncode != 0
    line = next(
        (line for line in done.stderr.splitlines() if "collective" in line and "rank 0" in line),
        done.stderr,
    )
    expected = (
        r"rank 0 on host \S+: collective all_reduce failed in phase 'step 7/rollout' "
        r"\(mesh\.py:\d+\): .*[Tt]imed? ?out"
    )
    assert re.search(expected, line), line
    absent = r"not arrived: rank 1 on host \S+, last seen \d+ s ago in phase 'step 7/rollout' at stall.py"
    assert re.search(absent, done.stderr), done.stderr


def test_runs_with_other_seeds_share_no_stream() -> None:
    """The first rank under one seed must not have the seed of the second rank under another."""
    ranks = [
        (seed, data, pipeline)
        for seed in range(0, 3000, 500)
        for data in range(8)
        for pipeline in range(4)
    ]
    seeds = {meshes.rank_seed(*rank) for rank in ranks}
    assert len(seeds) == len(ranks) and max(seeds) < 2**63
    assert meshes.rank_seed(7, 0, 0) == 7


def test_tensor_parallelism_sets_one_cuda_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    for given, expected in (("8", "8"), (None, "1")):
        monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", given or "")
        if given is None:
            monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS")
        with pytest.raises(UserError):
            meshes.initialize(ParallelConfig(tensor=2), seed=1)
        assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == expected


@pytest.mark.parametrize(
    ("line", "waits"),
    [
        ("torch.cuda.synchronize()", True),
        ("return float(loss.item())", True),
        ("work.wait()", True),
        ("bool(found_inf)", True),
        ("float(loss)", True),
        ("int(mask.sum())", True),
        ("print(x)", False),
        ("for item in items:", False),
        ("ids = tokenizer.encode_batch([item for item in texts], workers=os.cpu_count())", False),
    ],
)
def test_lines_that_the_watchdog_counts_as_a_wait(line: str, waits: bool) -> None:
    assert (_WAITS.search(line) is not None) == waits


def test_a_conversion_of_a_tensor_is_a_wait_and_its_argument_is_not() -> None:
    """The expression that is evaluated decides, not its line."""

    class Slow:
        def __bool__(self) -> bool:
            seen.append(_waits(sys._getframe(1)))
            return True

    def computed() -> Slow:
        seen.append(_waits(sys._getframe(1)))
        return Slow()

    seen: list[bool] = []
    assert bool(computed())
    assert seen == [False, True]


def test_other_errors_are_not_failed_collectives() -> None:
    try:
        raise ValueError("something else")
    except ValueError as error:
        assert describe_failure(error) is None


def test_a_successful_command_leaves_its_process_groups(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    joined: list[bool] = []

    def command(**_: object) -> None:
        meshes.initialize(ParallelConfig(), seed=1)
        joined.append(torch.distributed.is_initialized())

    monkeypatch.setattr(cli, "app", command)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert joined == [True] and not torch.distributed.is_initialized()
