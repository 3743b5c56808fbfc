from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from fastrlhf import ops
from fastrlhf.ops import backends, dispatch, logprobs

pytestmark = pytest.mark.usefixtures("torch_only")

BLOCKED = (
    "megatron", "transformers", "triton", "pydantic", "numpy", "scipy", "datasets", "kernels", "yaml", "typer", "rich",
    "tensorboard", "matplotlib", "einops", "flash_attn", "transformer_engine", "apex",
)  # fmt: skip
PROBE = f"""
import sys
blocked = {BLOCKED!r}
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Block())
import torch
from fastrlhf.ops import *
import fastrlhf.ops as ops
x = torch.randn(2, 3, requires_grad=True)
out = ops.logprobs(x, torch.tensor([0, 2]), with_entropy=True)
(out.logprobs + out.entropy).sum().backward()
mask = torch.ones(2, 3, dtype=torch.bool)
ops.gae(x, x, mask); ops.masked_whiten(x, mask); ops.ppo_loss(x, x, x, mask).loss.backward()
assert ops.backends()["triton"]["why_not"] == "triton is not installed: pip install triton"
print("loaded:", [m for m in blocked if m in sys.modules])
"""


def test_the_ops_need_torch_alone():
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "loaded: []"


def test_all_names_are_exported():
    assert set(ops.__all__) == {name for name in vars(ops) if name in ops.__all__}
    for name in ("logprobs", "linear_logprobs", "linear_ppo_loss", "gae", "pairwise_ranking_loss", "logits_kl"):
        assert callable(getattr(ops, name)) and getattr(ops, name).__doc__


def test_backends_says_what_runs_and_why_not():
    report = backends()
    assert report["torch"] == {"available": True, "why_not": None, "kernels": sorted(dispatch.KERNELS)}
    for name in ("cpu", "triton"):
        assert report[name]["available"] == (report[name]["why_not"] is None) == bool(report[name]["kernels"])


def test_asking_for_what_cannot_run_gives_the_cure():
    if torch.cuda.is_available():
        pytest.skip("triton runs here")
    with pytest.raises(RuntimeError, match=r"backend 'triton' cannot run logprob_statistics: triton needs a GPU"):
        logprobs(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long), backend="triton")


def test_the_environment_forces_a_backend(monkeypatch):
    logits, labels = torch.zeros(2, 3), torch.zeros(2, dtype=torch.long)
    kernel = dispatch.KERNELS["logprob_statistics"]
    monkeypatch.setenv("FASTRLHF_BACKEND", "torch")
    assert kernel.choose(logits, "auto") == kernel.choose(logits, "triton") == "torch"
    assert backends()["forced"] == {"backend": "torch"}
    monkeypatch.setenv("FASTRLHF_BACKEND", "gpu")
    with pytest.raises(RuntimeError, match="FASTRLHF_BACKEND='gpu': expected one of auto, triton, cpu, torch"):
        logprobs(logits, labels)


def test_an_extension_may_provide_any_subset(monkeypatch):
    monkeypatch.setattr(dispatch, "_load_cpu_extension", lambda: None)
    kernel = dispatch.Kernel("not_compiled", torch.add, "fastrlhf.kernels.none")
    try:
        assert kernel.choose(torch.zeros(1), "auto") == "torch"
        with pytest.raises(RuntimeError, match="the C\\+\\+ extension has no not_compiled"):
            kernel.choose(torch.zeros(1), "cpu")
    finally:
        del dispatch.KERNELS["not_compiled"]


def test_float64_always_runs_in_torch(monkeypatch):
    monkeypatch.setattr(dispatch, "_load_cpu_extension", lambda: None)
    kernel = dispatch.KERNELS["gae"]
    assert kernel.choose(torch.zeros(1, dtype=torch.float64), "auto") == "torch"
