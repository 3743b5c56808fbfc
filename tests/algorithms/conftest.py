"""One serial run and one torchrun of four ranks, shared by all tests of the algorithms."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("run_layouts.py")


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data/, start/ (pretrained, SFT and reward model) and the metrics of every layout."""
    folder = tmp_path_factory.mktemp("algorithms")
    launch([sys.executable, str(SCRIPT), str(folder), "serial"])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    launch([*torchrun, str(SCRIPT), str(folder), "parallel"])
    return folder


def launch(command: list[str], timeout: float = 300) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
