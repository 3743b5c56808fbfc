from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses import FakeTensorMode

from fastrlhf import ops
from fastrlhf.ops import (
    backends,
    dispatch,
    gae,
    linear_cross_entropy,
    linear_logprobs,
    linear_ppo_loss,
    logprobs,
)
from fastrlhf.ops.logprob_kernels import (
    SavedRow,
    TokenGrads,
    _backward_torch,
    _statistics_torch,
    finish_statistics,
)

pytestmark = pytest.mark.usefixtures("torch_only")

BLOCKED = (
    "megatron",
    "transformers",
    "triton",
    "pydantic",
    "numpy",
    "scipy",
    "datasets",
    "kernels",
    "yaml",
    "typer",
    "rich",
    "tensorboard",
    "matplotlib",
    "einops",
    "flash_attn",
    "transformer_engine",
    "apex",
)
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
    done = subprocess.run(
        [sys.executable, "-c", PROBE], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "loaded: []"


def test_all_names_are_exported():
    assert set(ops.__all__) == {name for name in vars(ops) if name in ops.__all__}
    for name in (
        "logprobs",
        "linear_logprobs",
        "linear_ppo_loss",
        "gae",
        "pairwise_ranking_loss",
        "logits_kl",
    ):
        assert callable(getattr(ops, name)) and getattr(ops, name).__doc__


def test_backends_reports_what_runs_and_why_not():
    report = backends()
    assert report["torch"] == {
        "available": True,
        "why_not": None,
        "kernels": sorted(dispatch.KERNELS),
    }
    for name in ("cpu", "triton", "cuda"):
        assert (
            report[name]["available"]
            == (report[name]["why_not"] is None)
            == bool(report[name]["kernels"])
        )


def test_an_unavailable_backend_names_the_fix():
    if torch.cuda.is_available():
        pytest.skip("triton runs here")
    with pytest.raises(
        RuntimeError, match=r"backend 'triton' cannot run logprob_statistics: triton needs a GPU"
    ):
        logprobs(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long), backend="triton")


def test_the_environment_forces_a_backend(monkeypatch):
    logits, labels = torch.zeros(2, 3), torch.zeros(2, dtype=torch.long)
    kernel = dispatch.KERNELS["logprob_statistics"]
    monkeypatch.setenv("FASTRLHF_BACKEND", "torch")
    assert kernel.choose(logits, "auto") == kernel.choose(logits, "triton") == "torch"
    assert backends()["forced"] == {"backend": "torch"}
    monkeypatch.setenv("FASTRLHF_BACKEND", "gpu")
    with pytest.raises(
        RuntimeError, match="FASTRLHF_BACKEND='gpu': expected one of auto, triton, cuda, cpu, torch"
    ):
        logprobs(logits, labels)


def test_an_extension_may_provide_any_subset(monkeypatch):
    monkeypatch.setattr(dispatch, "_load_extension", lambda name: None)
    kernel = dispatch.Kernel("not_compiled", torch.add, "fastrlhf.kernels.none")
    try:
        assert kernel.choose(torch.zeros(1), "auto") == "torch"
        with pytest.raises(RuntimeError, match="the C\\+\\+ extension has no not_compiled"):
            kernel.choose(torch.zeros(1), "cpu")
    finally:
        del dispatch.KERNELS["not_compiled"]


def test_float64_always_runs_in_torch(monkeypatch):
    monkeypatch.setattr(dispatch, "_load_extension", lambda name: None)
    kernel = dispatch.KERNELS["gae"]
    assert kernel.choose(torch.zeros(1, dtype=torch.float64), "auto") == "torch"


def test_triton_launches_on_the_gpu_of_its_tensors(monkeypatch):
    """Triton takes the current device and its stream, whatever device the pointers are of."""
    current, seen = [0], []

    def exchange(index):
        before, current[0] = current[0], index
        return before

    monkeypatch.setattr(dispatch, "_triton_problem", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "_exchange_device", exchange)
    monkeypatch.setattr(torch.cuda, "_maybe_exchange_device", exchange)
    monkeypatch.setitem(
        sys.modules, "kernels_stub", SimpleNamespace(double=lambda *_: seen.append(current[0]))
    )
    kernel = dispatch.Kernel("double", torch.add, "kernels_stub")
    try:
        with FakeTensorMode():
            x = torch.empty(2, device="cuda:1")
        kernel.implementation(x, "triton")(x, 2)
    finally:
        del dispatch.KERNELS["double"]
    assert seen == [1] and current == [0]


# --- the cluster kernels, replaced by torch implementations on the CPU ----------------------------


@pytest.fixture
def cuda_calls(monkeypatch):
    """Make backend "cuda" run here; return the names of the extension's functions as called."""
    calls = []

    def logprob_statistics(*arguments):
        calls.append("statistics")
        return _statistics_torch(*arguments)

    def logprob_forward_backward(
        rows, labels, mask, g_logp, g_entropy, g_lse, temperature, start, columns, out
    ):
        calls.append("both")
        stats = _statistics_torch(rows, labels, mask, temperature, start, columns)
        _, entropy, _ = finish_statistics(stats, mask, temperature)
        saved, upstream = SavedRow(*stats[:2], entropy), TokenGrads(g_logp, g_entropy, g_lse)
        options = (temperature, start, columns)
        _backward_torch(rows, labels, mask, saved, upstream, *options, out)
        return stats

    functions = {f.__name__: f for f in (logprob_statistics, logprob_forward_backward)}
    monkeypatch.setattr(torch.ops, "fastrlhf_cuda", SimpleNamespace(**functions), raising=False)
    monkeypatch.setattr(dispatch, "_cuda_problem", lambda device=None: None)
    return calls


def everything_over_a_vocabulary(backend):
    """Yield (name, results and gradients) of each op that uses the log-prob kernels."""
    g = torch.Generator().manual_seed(5)
    h, w = torch.randn(2, 6, 3, generator=g), torch.randn(11, 3, generator=g)
    labels, mask = torch.randint(0, 11, (2, 6), generator=g), torch.rand(2, 6, generator=g) > 0.3
    x = torch.randn(2, 6, generator=g)
    common = {"temperature": 0.8, "backend": backend}

    def tokens(out):
        return (out.logprobs * x + out.entropy).sum() + (out.logsumexp * x).sum()

    losses = {
        "logprobs": lambda h, w: tokens(
            logprobs(h @ w.T, labels, mask=mask, with_entropy=True, **common)
        ),
        "linear_logprobs": lambda h, w: tokens(
            linear_logprobs(h, w, labels, mask=mask, with_entropy=True, recompute=True, **common)
        ),
        "linear_cross_entropy": lambda h, w: linear_cross_entropy(h, w, labels, mask, **common),
        "linear_ppo_loss": lambda h, w: (
            linear_ppo_loss(h, w, labels, x - 3, x, mask, entropy_coef=0.1, **common).loss
        ),
    }
    for name, loss_of in losses.items():
        leaves = [t.clone().requires_grad_() for t in (h, w)]
        loss = loss_of(*leaves)
        yield name, [loss.detach(), *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("forced", [False, True])
def test_cuda_runs_when_asked_for(forced, cuda_calls, monkeypatch):
    expected = dict(everything_over_a_vocabulary("torch"))
    assert not cuda_calls
    if forced:
        monkeypatch.setenv("FASTRLHF_BACKEND", "cuda")
    ran = {}
    for name, results in everything_over_a_vocabulary("auto" if forced else "cuda"):
        ran[name] = cuda_calls.copy()
        cuda_calls.clear()
        for ours, wanted in zip(results, expected[name], strict=True):
            torch.testing.assert_close(ours, wanted)
    two_reads = ["statistics", "both"]
    assert ran["logprobs"] == ran["linear_logprobs"] == ran["linear_ppo_loss"] == two_reads
    assert ran["linear_cross_entropy"] == ["both"], (
        "the upstream is known beforehand: one read of the logits"
    )
    # has no such implementation: runs as "auto"
    gae(torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool))


def test_auto_never_takes_cuda(cuda_calls):
    logprobs(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long))
    assert not cuda_calls


def test_cuda_refuses_what_it_cannot_run(cuda_calls, monkeypatch):
    x, labels = torch.zeros(2, 3), torch.zeros(2, dtype=torch.long)
    with pytest.raises(
        RuntimeError,
        match=r"backend 'cuda' cannot run gae: it has no cuda implementation: pass backend='auto'",
    ):
        gae(x, x, x == 0, backend="cuda")
    with pytest.raises(RuntimeError, match=r"cannot run logprob_statistics: .*these are float64"):
        logprobs(x.double(), labels, backend="cuda")
    with pytest.raises(
        RuntimeError, match=r"whole rows, and the vocabulary is sharded over a group: pass backend"
    ):
        dispatch.KERNELS["logprob_statistics"].choose(x, "cuda", sharded=True)
    assert not cuda_calls


def test_backends_reports_why_cuda_cannot_run(monkeypatch):
    note = "only when asked for, by backend='cuda' or FASTRLHF_BACKEND=cuda; 'auto' takes triton"
    assert backends()["cuda"]["note"] == note
    x, labels = torch.zeros(2, 3), torch.zeros(2, dtype=torch.long)
    monkeypatch.setattr(
        dispatch, "_load_extension", lambda name: f"No module named 'fastrlhf._C_{name}'"
    )
    why = (
        r"fastrlhf\._C_cuda is not built \(No module named 'fastrlhf\._C_cuda'\):"
        r" reinstall with nvcc on PATH"
    )
    with pytest.raises(
        RuntimeError, match=r"backend 'cuda' cannot run logprob_statistics: .*" + why
    ):
        logprobs(x, labels, backend="cuda")
    monkeypatch.setattr(dispatch, "_load_extension", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="the cuda backend needs a GPU and torch sees none"):
        logprobs(x, labels, backend="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(
        RuntimeError, match="needs CUDA tensors, these are on cpu: move them or pass backend='auto'"
    ):
        logprobs(x, labels, backend="cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert "need compute capability 9.0 or more, this GPU has 8.0" in backends()["cuda"]["why_not"]
