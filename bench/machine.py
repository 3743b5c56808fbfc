"""The machine of a measurement: names, versions, clocks, and limits measured in the same run."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

ROOT = Path(__file__).resolve().parents[1]
T = TypeVar("T")


class Limits(NamedTuple):
    """Measured limits: the bandwidth of a copy, and the rate of a square matrix product."""

    copy_gb_s: float
    matmul_tflop_s: dict[torch.dtype, float]

    def floor_ms(self, moved: int, flops: int, dtype: torch.dtype) -> float:
        """Return a lower bound on the time of moving `moved` bytes and doing `flops` operations."""
        memory = moved / self.copy_gb_s / 1e6
        rate = self.matmul_tflop_s.get(dtype)
        return max(memory, flops / rate / 1e9) if rate else memory


def best(*measured: Limits) -> Limits:
    """Return the best of several measurements of the limits, some of them disturbed."""
    rates = {
        d: max(limits.matmul_tflop_s[d] for limits in measured) for d in measured[0].matmul_tflop_s
    }
    return Limits(max(limits.copy_gb_s for limits in measured), rates)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(call: Callable[[], T], device: torch.device) -> tuple[T, float]:
    """Return (result, seconds) of a call, including what it has queued on a GPU."""
    synchronize(device)
    start = time.perf_counter()
    result = call()
    synchronize(device)
    return result, time.perf_counter() - start


def _best_ms(call, device: torch.device, repeats: int) -> float:  # type: ignore[no-untyped-def]
    """Return the fastest of several calls: a limit is what the machine can do at its best."""
    call()
    return min(1e3 * timed(call, device)[1] for _ in range(repeats))


def measure_limits(
    device: torch.device, dtypes: tuple[torch.dtype, ...], quick: bool = False
) -> Limits:
    """Measure a copy of 2 GiB (64 MiB on a CPU) and products of 8192 (2048) square matrices.

    Sizes are smaller when `quick`.
    """
    gpu = device.type == "cuda"
    size = (1 << 31 if gpu else 1 << 26) >> (3 if quick else 0)
    source = torch.empty(size // 4, device=device).normal_()
    target = torch.empty_like(source)
    repeats = 5 if quick else 20 if gpu else 10
    copy = 2 * size / _best_ms(lambda: target.copy_(source), device, repeats) / 1e6
    n = (8192 if gpu else 2048) >> (1 if quick else 0)
    rates = {}
    for dtype in dtypes:
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        rates[dtype] = (
            2
            * n**3
            / _best_ms(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), device, repeats)
            / 1e9
        )
    return Limits(copy, rates)


def version_of(package: str | None) -> str:
    """Return the version of a package, "" if it is not installed."""
    if not package:
        return ""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _git(*arguments: str) -> str:
    if shutil.which("git") is None:
        return ""
    done = subprocess.run(
        ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() if done.returncode == 0 else ""


def cpu_name() -> str:
    """Return the processor's model.

    Hypervisors hide the name, so the vendor's family and model numbers are added.
    """
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    fields: dict[str, str] = {}
    for line in info.read_text().splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    numbers = f"family {fields.get('cpu family', '?')} model {fields.get('model', '?')}"
    return f"{fields.get('model name', platform.machine())} ({numbers})"


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def folder_name(device: torch.device) -> str:
    """Return the folder of bench/results: "cpu", or the GPU's name in letters and dashes."""
    if device.type == "cpu":
        return "cpu"
    return "-".join("".join(c if c.isalnum() else " " for c in device_name(device)).split()).lower()


def describe(device: torch.device, threads: int) -> dict[str, str | int]:
    """Return the columns that distinguish machines, builds and days."""
    return {
        "device": device_name(device),
        "threads": threads,
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "python": platform.python_version(),
        "commit": _git("rev-parse", "--short", "HEAD"),
        "dirty": (
            "yes"
            if _git("status", "--porcelain", "--", "fastrlhf", "kernels", "csrc", "bench")
            else "no"
        ),
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def load() -> float:
    """Return the mean number of runnable processes over the last minute.

    Above the number of cores, CPU times are unreliable.
    """
    return round(os.getloadavg()[0], 2)


def sm_clock_mhz(device: torch.device) -> str:
    """Return the GPU's current clock, "" without nvidia-smi. Only reads it."""
    if device.type != "cuda" or shutil.which("nvidia-smi") is None:
        return ""
    query = [
        "nvidia-smi",
        f"--id={device.index or 0}",
        "--query-gpu=clocks.sm",
        "--format=csv,noheader,nounits",
    ]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""
