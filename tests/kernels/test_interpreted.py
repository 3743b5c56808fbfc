"""The tests of tests/ops with the Triton kernels under Triton's interpreter, on a CPU.

With a GPU tests/ops runs the kernels natively. Without one, these tests run it in a new process
under TRITON_INTERPRET=1, a variable that triton reads at import.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
FILES = (
    "test_logprob.py",
    "test_kl.py",
    "test_linear.py",
    "test_ppo.py",
    "test_advantage.py",
    "test_ranking.py",
    "test_bounds.py",
    "test_policy.py",
    "test_softcap.py",
)


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/ops runs the kernels on the GPU")
@pytest.mark.parametrize("half", [0, 1])
def test_op_tests_pass_under_the_interpreter(half):
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    env.pop("FASTRLHF_BACKEND", None)
    files = [str(ROOT / "tests/ops" / name) for name in FILES[half::2]]
    command = [sys.executable, "-m", "pytest", "-W", "ignore", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = int(done.stdout.split(" passed")[0].split()[-1])
    assert passed >= 40, done.stdout[-2000:]


def test_kernels_is_not_a_top_level_package():
    """transformers imports Hugging Face's `kernels`, which a package of that name would shadow."""
    assert not (ROOT / "kernels/__init__.py").exists()
    link = ROOT / "fastrlhf/kernels"
    assert link.is_symlink() and os.readlink(link) == "../kernels"
