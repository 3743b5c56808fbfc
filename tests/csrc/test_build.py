"""Builds of the extensions: a skipped one is reported in one line; CUDA kernels do not spill."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


def build(root: Path, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("setuptools")
    command = [
        sys.executable,
        "setup.py",
        "build_ext",
        "--build-lib",
        str(folder),
        "--build-temp",
        str(folder / "temp"),
    ]
    known = {
        k: v
        for k, v in os.environ.items()
        if k not in ("CXX", "NVCC", "FASTRLHF_SKIP_EXT", "FASTRLHF_FORCE_CUDA")
    }
    return subprocess.run(
        command, cwd=root, env={**known, **environment}, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("environment", "why"),
    [
        ({"FASTRLHF_SKIP_EXT": "1"}, "FASTRLHF_SKIP_EXT=1"),
        ({"CXX": "no-such-compiler"}, "no C++ compiler (no-such-compiler is not on PATH)"),
        ({"CXX": "false"}, "false failed, see above"),
    ],
)
def test_an_extension_that_cannot_be_built_is_skipped(
    root: Path, tmp_path: Path, environment: dict[str, str], why: str
) -> None:
    done = build(root, tmp_path, NVCC="no-such-nvcc", **environment)
    assert done.returncode == 0, done.stderr
    assert f"fastrlhf: fastrlhf._C_cpu is left out: {why}" in done.stderr.splitlines()
    assert not list(tmp_path.rglob("*.so"))


def test_cuda_kernels_compile_for_sm_90_without_spills(root: Path, tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not on PATH")
    sources = sorted((root / "csrc/cuda").glob("*.cu"))
    assert sources
    for source in sources:
        flags = [
            "-std=c++20",
            "-O3",
            "-arch=sm_90",
            "-Xptxas=-v",
            "-cubin",
            "-o",
            str(tmp_path / "out.cubin"),
        ]
        done = subprocess.run(
            [nvcc, *flags, str(source)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        kernels = re.findall(r"Compiling entry function", done.stderr)
        spills = re.findall(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads",
            done.stderr,
        )
        assert len(kernels) == len(spills) == 6  # three formats, with and without the gradient
        assert all(int(size) == 0 for kernel in spills for size in kernel), done.stderr
        # Two blocks of 512 threads fit the 65,536 registers of a multiprocessor.
        assert all(int(used) <= 64 for used in re.findall(r"Used (\d+) registers", done.stderr))
