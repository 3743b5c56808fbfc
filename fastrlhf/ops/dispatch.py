"""Which body runs an op: Triton or CUDA on a GPU, compiled C++ on a CPU, or plain torch anywhere.

A kernel is a raw function that exists up to four times, with one name and one positional signature:
  "torch"   a plain torch body, in fastrlhf/ops, next to the op;
  "triton"  the function of that name in the kernel's module under fastrlhf/kernels;
  "cpu"     torch.ops.fastrlhf_cpu.<name>, registered by the optional C++ extension fastrlhf._C_cpu. The extension may
            provide any subset of: logprob_statistics, logprob_backward, logits_kl_statistics, logits_kl_backward,
            ppo_loss, gae, ranking_loss. Each takes and returns exactly what the torch body of that name does
            (`_statistics_torch` in logprob.py, and so on), for fp32, bf16 and fp16; float64 always runs the torch body.
"auto" takes the best that this tensor can use; the environment variable FASTRLHF_BACKEND overrides every call.
Bodies are picked inside opaque custom ops, at run time, so torch.compile never traces this file.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

BACKENDS = ("auto", "triton", "cuda", "cpu", "torch")
CLUSTERS = (9, 0)
"""the compute capability that _C_cuda needs"""

KERNELS: dict[str, Kernel] = {}


@functools.cache
def _triton_version() -> str | None:
    try:
        return importlib.import_module("triton").__version__
    except ImportError:
        return None


@functools.cache
def _load_extension(name: str) -> str | None:
    """Import the extension fastrlhf._C_<name>; None when it loaded, otherwise why not."""
    try:
        importlib.import_module(f"fastrlhf._C_{name}")
    except ImportError as error:
        return str(error)
    return None


def _interpreting() -> bool:
    """Triton kernels run on CPU tensors when TRITON_INTERPRET=1 was set before triton was imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _triton_problem(device: torch.device | None = None) -> str | None:
    if _triton_version() is None:
        return "triton is not installed: pip install triton"
    if _interpreting() or (device is not None and device.type == "cuda"):
        return None
    if not torch.cuda.is_available():
        return "triton needs a GPU and torch sees none (TRITON_INTERPRET=1 interprets the kernels on a CPU, slowly)"
    if device is not None:
        return f"triton kernels need CUDA tensors, these are on {device}: move them or pass backend='auto'"
    return None


def _cuda_problem(device: torch.device | None = None) -> str | None:
    why = _load_extension("cuda")
    if why is not None:
        return f"the extension fastrlhf._C_cuda is not built ({why}): reinstall with nvcc on PATH and a torch for CUDA"
    if not torch.cuda.is_available():
        return "the cuda backend needs a GPU and torch sees none: pass backend='auto'"
    if device is not None and device.type != "cuda":
        return f"the cuda backend needs CUDA tensors, these are on {device}: move them or pass backend='auto'"
    found = torch.cuda.get_device_capability(device)
    if found < CLUSTERS:
        has = ".".join(map(str, found))
        return f"its kernels need compute capability 9.0 or more, this GPU has {has}: pass backend='auto'"
    return None


def _cpu_problem(device: torch.device | None = None) -> str | None:
    why = _load_extension("cpu")
    if why is not None:
        return f"the C++ extension fastrlhf._C_cpu is not built ({why}): reinstall with a C++ compiler present"
    if device is not None and device.type != "cpu":
        return f"the cpu backend needs CPU tensors, these are on {device}: move them or pass backend='auto'"
    return None


def has_cpu_body(name: str, tensor: Tensor) -> bool:
    """Whether torch.ops.fastrlhf_cpu.<name>, which has no body on a GPU, runs on `tensor`."""
    if (
        os.environ.get("FASTRLHF_BACKEND", "auto") not in ("", "auto", "cpu")
        or tensor.dtype == torch.float64
    ):
        return False
    return _cpu_problem(tensor.device) is None and hasattr(torch.ops.fastrlhf_cpu, name)


class Kernel:
    """A raw function and its bodies; `on(tensor, backend)` gives the one to call.

    `cuda_body`: called with torch.ops.fastrlhf_cuda and then as the others are; it sees whole rows only.
    """

    def __init__(
        self,
        name: str,
        torch_body: Callable[..., Any],
        triton_module: str,
        cuda_body: Callable[..., Any] | None = None,
    ) -> None:
        self.name, self._torch_body, self._triton_module = name, torch_body, triton_module
        self._cuda_body = cuda_body
        KERNELS[name] = self

    def problem(
        self, backend: str, tensor: Tensor | None = None, sharded: bool = False
    ) -> str | None:
        """Why `backend` cannot run this kernel (on `tensor`, if given), with the cure; None when it can."""
        if backend == "torch":
            return None
        if backend == "cuda" and self._cuda_body is None:
            return "it has no cuda body: pass backend='auto'"
        problems = {"triton": _triton_problem, "cuda": _cuda_problem, "cpu": _cpu_problem}
        why = problems[backend](None if tensor is None else tensor.device)
        if why is None and backend == "cpu" and not hasattr(torch.ops.fastrlhf_cpu, self.name):
            why = f"the C++ extension has no {self.name}: pass backend='auto'"
        if why is None and backend == "cuda" and sharded:
            why = "its kernels take whole rows, and the vocabulary is sharded over a group: pass backend='auto'"
        if why is None and tensor is not None and tensor.dtype == torch.float64:
            why = f"the {backend} backend computes in float32, these are float64: cast them or pass backend='auto'"
        return why

    def choose(self, tensor: Tensor, backend: str, sharded: bool = False) -> str:
        """Resolve `backend` for `tensor` to one that can run it; RuntimeError when the one asked for cannot."""
        forced = os.environ.get("FASTRLHF_BACKEND", "")
        if forced not in ("", *BACKENDS):
            raise RuntimeError(
                f"FASTRLHF_BACKEND={forced!r}: expected one of {', '.join(BACKENDS)}"
            )
        if forced == "cuda" and self._cuda_body is None:
            forced = "auto"
        asked = forced or backend
        if asked == "auto":
            best = "triton" if tensor.device.type == "cuda" else "cpu"
            return "torch" if self.problem(best, tensor) else best
        why = self.problem(asked, tensor, sharded)
        if why is not None:
            raise RuntimeError(f"backend {asked!r} cannot run {self.name}: {why}")
        return asked

    def on(self, tensor: Tensor, backend: str, sharded: bool = False) -> Callable[..., Any]:
        """The body that runs this kernel on `tensor`; `sharded`: its rows go on in other processes."""
        chosen = self.choose(tensor, backend, sharded)
        return self._torch_body if chosen == "torch" else self.body(chosen)

    def body(self, backend: str, name: str | None = None) -> Callable[..., Any]:
        """The compiled body for `backend`, or another function beside it; its first argument is a tensor."""
        if backend == "cpu":
            return getattr(torch.ops.fastrlhf_cpu, name or self.name)
        if backend == "cuda":
            assert self._cuda_body is not None
            return functools.partial(self._cuda_body, torch.ops.fastrlhf_cuda)
        return functools.partial(
            _beside, getattr(importlib.import_module(self._triton_module), name or self.name)
        )


def _beside(function: Callable[..., Any], tensor: Tensor, *rest: Any) -> Any:
    """`function(tensor, *rest)` with the tensor's GPU as the current one: that is where Triton launches."""
    with torch.cuda.device_of(tensor):
        return function(tensor, *rest)


def backends() -> dict[str, dict[str, Any]]:
    """What this install can run, and why not the rest.

    {"torch" | "cpu" | "triton" | "cuda": {"available": bool, "why_not": str | None, "kernels": [names it can run]}};
    "cuda" also has "note": when it is used. "forced" holds FASTRLHF_BACKEND when it is set.
    """
    report: dict[str, dict[str, Any]] = {}
    found = {
        "torch": None,
        "cpu": _cpu_problem(),
        "triton": _triton_problem(),
        "cuda": _cuda_problem(),
    }
    for backend, why in found.items():
        can = (
            []
            if why
            else [
                name for name, kernel in sorted(KERNELS.items()) if kernel.problem(backend) is None
            ]
        )
        report[backend] = {"available": why is None, "why_not": why, "kernels": can}
    report["cuda"]["note"] = (
        "only when asked for, by backend='cuda' or FASTRLHF_BACKEND=cuda; 'auto' takes triton"
    )
    if os.environ.get("FASTRLHF_BACKEND"):
        report["forced"] = {"backend": os.environ["FASTRLHF_BACKEND"]}
    return report
