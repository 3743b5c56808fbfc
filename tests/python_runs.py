"""Run Python programs of the tests in subprocesses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def run_python(arguments: list[str], timeout_s: float = 1800.0) -> str:
    """Run Python with `arguments` and return its stderr; if it fails, the assertion shows the end.

    Each process has one thread for its kernels. Scripts can import the tests' shared modules, as
    tests do by `pythonpath` in pyproject.toml.
    """
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stderr
