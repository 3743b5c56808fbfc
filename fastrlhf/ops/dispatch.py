"""Which body runs an op: Triton on a GPU, compiled C++ on a CPU, or plain torch anywhere.

A kernel is a raw function that exists up to three times, with one name and one positional signature:
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

BACKENDS = ("auto", "triton", "cpu", "torch")

KERNELS: dict[str, Kernel] = {}


@functools.cache
def _triton_version() -> str | None:
    try:
        return importlib.import_module("triton").__version__
    except ImportError:
        return None


@functools.cache
def _load_cpu_extension() -> str | None:
    """Import the C++ extension; None when it loaded, otherwise why not."""
    try:
        importlib.import_module("fastrlhf._C_cpu")
    except ImportError as error:
        return str(error)
    return None


def _interpreting() -> bool:
    """Triton kernels run on CPU tensors when TRITON_INTERPRET=1 was set before triton was imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _triton_problem(device: torch.device | None = None) -> str | None:
    if _triton_version() is None:
        return "triton is not installed: pip install triton"
    if _interpreting():
        return None
    if not torch.cuda.is_available():
        return "triton needs a GPU and torch sees none (TRITON_INTERPRET=1 interprets the kernels on a CPU, slowly)"
    if device is not None and device.type != "cuda":
        return f"triton kernels need CUDA tensors, these are on {device}: move them or pass backend='auto'"
    return None


def _cpu_problem(device: torch.device | None = None) -> str | None:
    why = _load_cpu_extension()
    if why is not None:
        return f"the C++ extension fastrlhf._C_cpu is not built ({why}): reinstall with a C++ compiler present"
    if device is not None and device.type != "cpu":
        return f"the cpu backend needs CPU tensors, these are on {device}: move them or pass backend='auto'"
    return None


class Kernel:
    """A raw function and its bodies; `on(tensor, backend)` gives the one to call."""

    def __init__(self, name: str, torch_body: Callable[..., Any], triton_module: str) -> None:
        self.name, self._torch_body, self._triton_module = name, torch_body, triton_module
        KERNELS[name] = self

    def problem(self, backend: str, tensor: Tensor | None = None) -> str | None:
        """Why `backend` cannot run this kernel (on `tensor`, if given), with the cure; None when it can."""
        if backend == "torch":
            return None
        device = None if tensor is None else tensor.device
        why = _triton_problem(device) if backend == "triton" else _cpu_problem(device)
        if why is None and backend == "cpu" and not hasattr(torch.ops.fastrlhf_cpu, self.name):
            why = f"the C++ extension has no {self.name}: pass backend='auto'"
        if why is None and tensor is not None and tensor.dtype == torch.float64:
            why = f"the {backend} backend computes in float32, these are float64: cast them or pass backend='auto'"
        return why

    def choose(self, tensor: Tensor, backend: str) -> str:
        """Resolve `backend` for `tensor` to "triton", "cpu" or "torch"; RuntimeError when it cannot run."""
        asked = os.environ.get("FASTRLHF_BACKEND", "") or backend
        if asked not in BACKENDS:
            raise RuntimeError(f"FASTRLHF_BACKEND={asked!r}: expected one of {', '.join(BACKENDS)}")
        if asked == "auto":
            best = "triton" if tensor.device.type == "cuda" else "cpu"
            return "torch" if self.problem(best, tensor) else best
        why = self.problem(asked, tensor)
        if why is not None:
            raise RuntimeError(f"backend {asked!r} cannot run {self.name}: {why}")
        return asked

    def on(self, tensor: Tensor, backend: str) -> Callable[..., Any]:
        """The body that runs this kernel on `tensor`."""
        chosen = self.choose(tensor, backend)
        return self._torch_body if chosen == "torch" else self.body(chosen)

    def body(self, backend: str, name: str | None = None) -> Callable[..., Any]:
        """The compiled body for `backend`, or another function beside it."""
        if backend == "cpu":
            return getattr(torch.ops.fastrlhf_cpu, name or self.name)
        return getattr(importlib.import_module(self._triton_module), name or self.name)


def backends() -> dict[str, dict[str, Any]]:
    """What this install can run, and why not the rest.

    {"torch" | "cpu" | "triton": {"available": bool, "why_not": str | None, "kernels": [names it can run]}}; "forced"
    holds FASTRLHF_BACKEND when it is set.
    """
    report: dict[str, dict[str, Any]] = {}
    for backend, why in (("torch", None), ("cpu", _cpu_problem()), ("triton", _triton_problem())):
        can = [] if why else [name for name, kernel in sorted(KERNELS.items()) if kernel.problem(backend) is None]
        report[backend] = {"available": why is None, "why_not": why, "kernels": can}
    if os.environ.get("FASTRLHF_BACKEND"):
        report["forced"] = {"backend": os.environ["FASTRLHF_BACKEND"]}
    return report
