"""setup.py removes the extension of an earlier build if it cannot build it again."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_a_stale_extension_is_removed_from_the_source_tree(tmp_path):
    pytest.importorskip("setuptools")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    package = tmp_path / "fastrlhf"
    package.mkdir()
    shutil.copy(ROOT / "fastrlhf/__init__.py", package)
    stale = [package / "_C_cpu.abi3.so", package / "_C_cuda.abi3.so"]
    for path in stale:
        path.write_bytes(b"of an earlier version")
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=tmp_path,
        env={**os.environ, "FASTRLHF_SKIP_EXT": "1"},
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "fastrlhf._C_cpu is left out: FASTRLHF_SKIP_EXT=1" in done.stderr
    assert [path for path in stale if path.exists()] == []


def test_make_passes_a_folder_with_a_space_as_one_argument():
    if shutil.which("make") is None:
        pytest.skip("needs make")
    # `make test` passes its own options and level on to a make below it.
    outside = {name: v for name, v in os.environ.items() if "MAKE" not in name and name != "MFLAGS"}
    done = subprocess.run(
        ["make", "-n", "quickstart", "OUT=a b"],
        cwd=ROOT,
        env=outside,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1].endswith('fastrlhf quickstart --out "a b"')
