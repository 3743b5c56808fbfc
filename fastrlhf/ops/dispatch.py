"""Choose the implementation that runs a kernel: Triton or CUDA on a GPU, C++ on a CPU, or torch.

A kernel is a function that exists up to four times under one name and one positional signature:
  "torch"   plain torch, in fastrlhf/ops, next to the op;
  "triton"  the function of that name in the kernel's module under fastrlhf/kernels;
  "cpu"     torch.ops.fastrlhf_cpu.<name>, from the optional C++ extension fastrlhf._C_cpu, with
            NamedTuple arguments flattened;
  "cuda"    a function around torch.ops.fastrlhf_cuda, from the optional extension fastrlhf._C_cuda.
The extension for CPUs may provide any subset of the kernels. All take fp32, bf16 and fp16; float64
always runs in torch. "auto" takes the fastest one that can run on the tensor; the environment
variable FASTRLHF_BACKEND overrides every call.

Implementations are chosen inside opaque custom ops, at run time: torch.compile never traces this
file.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Generic, ParamSpec, TypedDict, TypeVar, cast

import torch
from torch import Tensor

from fastrlhf.ops.registry import Function, flattened

BACKENDS = ("auto", "triton", "cuda", "cpu", "torch")
MIN_CUDA_CAPABILITY = (9, 0)
"""Compute capability that _C_cuda needs: the first with thread block clusters."""

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


@functools.cache
def _triton_version() -> str | None:
    try:
        return importlib.import_module("triton").__version__
    except ImportError:
        return None


@functools.cache
def _load_extension(name: str) -> str | None:
    """Import the extension fastrlhf._C_<name>; return None, or the reason if it fails."""
    try:
        importlib.import_module(f"fastrlhf._C_{name}")
    except ImportError as error:
        return str(error)
    return None


def _interpreting() -> bool:
    """Return whether Triton kernels run on CPU tensors.

    TRITON_INTERPRET=1 must be set before triton is imported.
    """
    return os.environ.get("TRITON_INTERPRET") == "1"


def _triton_problem(device: torch.device | None = None) -> str | None:
    if _triton_version() is None:
        return "triton is not installed: pip install triton"
    if _interpreting() or (device is not None and device.type == "cuda"):
        return None
    if not torch.cuda.is_available():
        return (
            "triton needs a GPU and torch sees none"
            " (TRITON_INTERPRET=1 interprets the kernels on a CPU, slowly)"
        )
    if device is not None:
        return (
            f"triton kernels need CUDA tensors, these are on {device}:"
            " move them or pass backend='auto'"
        )
    return None


def _cuda_problem(device: torch.device | None = None) -> str | None:
    why = _load_extension("cuda")
    if why is not None:
        return (
            f"the extension fastrlhf._C_cuda is not built ({why}):"
            " reinstall with nvcc on PATH and a torch for CUDA"
        )
    if not torch.cuda.is_available():
        return "the cuda backend needs a GPU and torch sees none: pass backend='auto'"
    if device is not None and device.type != "cuda":
        return (
            f"the cuda backend needs CUDA tensors, these are on {device}:"
            " move them or pass backend='auto'"
        )
    found = torch.cuda.get_device_capability(device)
    if found < MIN_CUDA_CAPABILITY:
        has = ".".join(map(str, found))
        return (
            f"its kernels need compute capability 9.0 or more, this GPU has {has}:"
            " pass backend='auto'"
        )
    return None


def _cpu_problem(device: torch.device | None = None) -> str | None:
    why = _load_extension("cpu")
    if why is not None:
        return (
            f"the C++ extension fastrlhf._C_cpu is not built ({why}):"
            " reinstall with a C++ compiler present"
        )
    if device is not None and device.type != "cpu":
        return (
            f"the cpu backend needs CPU tensors, these are on {device}:"
            " move them or pass backend='auto'"
        )
    return None


def has_cpu_implementation(name: str, tensor: Tensor) -> bool:
    """Return whether torch.ops.fastrlhf_cpu.<name>, which exists on CPUs only, runs on `tensor`."""
    forced = os.environ.get("FASTRLHF_BACKEND", "auto")
    if forced not in ("", "auto", "cpu") or tensor.dtype == torch.float64:
        return False
    return _cpu_problem(tensor.device) is None and hasattr(torch.ops.fastrlhf_cpu, name)


class Kernel(Generic[Arguments, Result]):
    """A kernel's name and implementations; `implementation(tensor, backend)` returns one to call.

    `cuda_impl` takes complete rows only, never a shard of the vocabulary.
    """

    def __init__(
        self,
        name: str,
        torch_impl: Callable[Arguments, Result],
        triton_module: str,
        cuda_impl: Callable[Arguments, Result] | None = None,
    ) -> None:
        self.name, self._torch_impl, self._triton_module = name, torch_impl, triton_module
        self._cuda_impl = cuda_impl
        KERNELS[name] = self

    def problem(
        self, backend: str, tensor: Tensor | None = None, sharded: bool = False
    ) -> str | None:
        """Return why `backend` cannot run this kernel (on `tensor`) and the fix, or None."""
        if backend == "torch":
            return None
        if backend == "cuda" and self._cuda_impl is None:
            return "it has no cuda implementation: pass backend='auto'"
        problems = {"triton": _triton_problem, "cuda": _cuda_problem, "cpu": _cpu_problem}
        why = problems[backend](None if tensor is None else tensor.device)
        if why is None and backend == "cpu" and not hasattr(torch.ops.fastrlhf_cpu, self.name):
            why = f"the C++ extension has no {self.name}: pass backend='auto'"
        if why is None and backend == "cuda" and sharded:
            why = (
                "its kernels take whole rows, and the vocabulary is sharded over a group:"
                " pass backend='auto'"
            )
        if why is None and tensor is not None and tensor.dtype == torch.float64:
            why = (
                f"the {backend} backend computes in float32, these are float64:"
                " cast them or pass backend='auto'"
            )
        return why

    def choose(self, tensor: Tensor, backend: str, sharded: bool = False) -> str:
        """Resolve "auto" and FASTRLHF_BACKEND to a backend that can run on `tensor`.

        Raises RuntimeError when the backend asked for cannot run.
        """
        forced = os.environ.get("FASTRLHF_BACKEND", "")
        if forced not in ("", *BACKENDS):
            raise RuntimeError(
                f"FASTRLHF_BACKEND={forced!r}: expected one of {', '.join(BACKENDS)}"
            )
        if forced == "cuda" and self._cuda_impl is None:
            forced = "auto"
        asked = forced or backend
        if asked == "auto":
            best = "triton" if tensor.device.type == "cuda" else "cpu"
            return "torch" if self.problem(best, tensor) else best
        why = self.problem(asked, tensor, sharded)
        if why is not None:
            source = f"FASTRLHF_BACKEND={forced}: " if forced else ""
            raise RuntimeError(f"{source}backend {asked!r} cannot run {self.name}: {why}")
        return asked

    def implementation(
        self, tensor: Tensor, backend: str, sharded: bool = False
    ) -> Callable[Arguments, Result]:
        """Return the function that runs this kernel on `tensor`.

        `sharded`: other processes hold the rest of the tensor's rows.
        """
        chosen = self.choose(tensor, backend, sharded)
        if chosen == "torch":
            return self._torch_impl
        if chosen == "cuda":
            assert self._cuda_impl is not None
            return self._cuda_impl
        compiled = self._cpu_op() if chosen == "cpu" else self.triton_function(self.name, tensor)
        return cast("Callable[Arguments, Result]", compiled)

    def _cpu_op(self) -> Function:
        op = getattr(torch.ops.fastrlhf_cpu, self.name)
        return lambda *groups: op(*flattened(groups))

    def triton_function(self, name: str, tensor: Tensor) -> Function:
        """Return a function of the kernel's Triton module that launches on the GPU of `tensor`."""
        function = getattr(importlib.import_module(self._triton_module), name)

        def launch(*arguments: object) -> object:
            with torch.cuda.device_of(tensor):  # Triton launches on the current GPU
                return function(*arguments)

        return launch


KERNELS: dict[str, Kernel] = {}


class BackendReport(TypedDict, total=False):
    """One backend's entry in `backends()`; `backend` only in the entry "forced"."""

    available: bool
    why_not: str | None
    kernels: list[str]
    note: str
    backend: str


def backends() -> dict[str, BackendReport]:
    """Return what this installation can run, and why it cannot run the rest.

    The keys are "torch", "cpu", "triton" and "cuda"; `kernels` names what the backend can run.
    "cuda" also has `note`: when it is used. "forced" holds FASTRLHF_BACKEND when that is set.
    """
    problems = {
        "torch": None,
        "cpu": _cpu_problem(),
        "triton": _triton_problem(),
        "cuda": _cuda_problem(),
    }
    report: dict[str, BackendReport] = {}
    for backend, why in problems.items():
        kernels = [name for name, kernel in sorted(KERNELS.items()) if not kernel.problem(backend)]
        report[backend] = {
            "available": why is None,
            "why_not": why,
            "kernels": [] if why else kernels,
        }
    report["cuda"]["note"] = (
        "only when asked for, by backend='cuda' or FASTRLHF_BACKEND=cuda; 'auto' takes triton"
    )
    if os.environ.get("FASTRLHF_BACKEND"):
        report["forced"] = {"backend": os.environ["FASTRLHF_BACKEND"]}
    return report
