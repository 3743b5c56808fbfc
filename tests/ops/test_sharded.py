"""A vocabulary sharded over 2, 3 and 4 processes equals an unsharded one, on every rank."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("sharded_worker.py")
KINDS = (
    "logprobs",
    "logprobs-shifted",
    "logprobs-bf16",
    "forbidden",
    "logits_kl",
    "linear_logprobs",
    "linear_kept",
)
LOSSES = ("linear_cross_entropy", "linear_ppo_loss")
OPTIONS = ("linear_smoothed", "linear_capped", "linear_sequences")
CHUNKED = ("logprobs", "cross_entropy", "ppo", "smoothed", "sequences")
CHUNKS = tuple(f"chunks-{name}" for name in CHUNKED)
NAMES = [
    f"{k}-{shards}" for k in (*KINDS, *LOSSES, *OPTIONS, *CHUNKS) for shards in ("uneven", "padded")
]
CHECKS = [f"{n}-{name}" for n in (2, 3, 4) for name in (*NAMES, "masked", "misuse")] + [
    "2-compiled"
]

pytestmark = pytest.mark.usefixtures("torch_only")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Launch the four ranks once; return the errors of each check, by rank."""
    folder = tmp_path_factory.mktemp("sharded")
    root = str(WORKER.parents[2])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    command = [sys.executable, str(WORKER)]
    ranks = [
        subprocess.Popen(
            [*command, str(r), str(folder / "store"), str(folder / f"{r}.json")], env=env
        )
        for r in range(4)
    ]
    try:
        codes = [p.wait(timeout=1800) for p in ranks]
    finally:
        for p in ranks:
            p.kill()
    assert codes == [0, 0, 0, 0]
    found: dict[str, list[str]] = {}
    for r in range(4):
        for name, error in json.loads((folder / f"{r}.json").read_text()).items():
            found.setdefault(name, []).extend([f"rank {r}: {error}"] if error else [])
    return found


def test_every_check_ran(results):
    assert sorted(results) == sorted(CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_sharded_equals_unsharded(name, results):
    assert not results[name], "\n".join(results[name])
