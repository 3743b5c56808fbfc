"""Check what this machine can run: the command `fastrlhf doctor`.

Each check tries the real thing (two processes exchange a tensor, a file is written, a package is
imported), never only a version number. Only requirements of fastrlhf count as broken. Nothing is
installed or changed.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal

from packaging.version import Version

GIB = 2**30
MEGATRON_TESTED = ("0.16.1", "0.19")  # release lines; the tests run on both
NO_GPU = "torch sees no NVIDIA GPU"


@dataclass(frozen=True)
class Check:
    """One line of the report.

    `broken` is a missing requirement, `off` a missing optional part; after a `timeout` it is not
    known whether the part works.
    """

    name: str
    status: Literal["ok", "off", "broken", "timeout"]
    detail: str
    cure: str = ""


def report(as_json: bool = False) -> bool:
    """Run every check and print the results on stdout, as a table or as JSON.

    Returns False if a requirement is broken or its check did not end.
    """
    checks: list[Check] = []
    for run_check in CHECKS:
        checks += run_check()
        if run_check is _torch and checks[-1].status == "broken":
            break  # the other checks need torch
    healthy = all(check.status in ("ok", "off") for check in checks)
    if as_json:
        print(
            json.dumps(
                {"healthy": healthy, "checks": [asdict(check) for check in checks]}, indent=2
            )
        )
    else:
        _print_table(checks, healthy)
    return healthy


def _print_table(checks: list[Check], healthy: bool) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    colour = {"ok": "green", "off": "yellow", "broken": "bold red", "timeout": "bold red"}
    # Folded, never cut: commands are copied from here.
    columns = [
        Column("", no_wrap=True),
        Column("", no_wrap=True),
        Column("found", overflow="fold"),
        Column("how to get it", overflow="fold"),
    ]
    table = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False)
    for check in checks:
        table.add_row(
            check.name,
            Text(check.status, colour[check.status]),
            Text(check.detail),
            Text(check.cure),
        )
    # A pipe or file has room for complete commands.
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    if healthy:
        console.print("Everything that fastrlhf needs works here.")
    elif any(check.status == "broken" for check in checks):
        console.print("Something that fastrlhf needs is broken.")
    else:
        console.print("Nothing is known to be broken, but a check did not end in time.")


def _python() -> list[Check]:
    version = platform.python_version()
    if not (3, 10) <= sys.version_info[:2] <= (3, 12):
        return [
            Check("Python", "broken", f"{version} is not tested", "use Python 3.10, 3.11 or 3.12")
        ]
    return [Check("Python", "ok", f"{version} on {platform.platform()}")]


def _machine() -> list[Check]:
    import psutil
    import torch

    memory = psutil.virtual_memory()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return [
        Check(
            "CPU",
            "ok",
            f"{usable} cores usable, {torch.backends.cpu.get_cpu_capability()} vector instructions",
        ),
        Check(
            "memory", "ok", f"{memory.available / GIB:.0f} GiB free of {memory.total / GIB:.0f} GiB"
        ),
    ]


def _disk() -> list[Check]:
    here = Path.cwd()
    try:
        with tempfile.TemporaryFile(dir=here) as file:
            file.write(b"fastrlhf")
    except OSError as error:
        return [
            Check(
                "disk",
                "broken",
                f"{here} cannot be written: {error.strerror}",
                "run in a folder you can write",
            )
        ]
    return [
        Check(
            "disk", "ok", f"{shutil.disk_usage(here).free / GIB:.0f} GiB free in {here}, writable"
        )
    ]


def _torch() -> list[Check]:
    torch, cure = _imported("torch"), "pip install 'torch>=2.11'"
    if isinstance(torch, str):
        return [Check("torch", "broken", torch, cure)]
    if Version(torch.__version__) < Version("2.11"):
        return [Check("torch", "broken", f"{torch.__version__} is too old", cure)]
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    return [Check("torch", "ok", f"{torch.__version__}, built for {build}")]


def _gpus() -> list[Check]:
    import torch

    if not torch.cuda.is_available():
        cure = (
            "an NVIDIA driver and GPU"
            if torch.version.cuda
            else "a CUDA build of torch, and an NVIDIA GPU"
        )
        return [Check("GPU", "off", NO_GPU, cure)]
    checks = []
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        memory = f"{gpu.total_memory / GIB:.0f} GiB"
        detail = f"{gpu.name}, {memory}, sm_{gpu.major}{gpu.minor}, driver {_driver()}"
        checks.append(Check(f"GPU {index}", "ok", detail))
    return checks


def _driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        # If the driver is not loaded, the query takes seconds per GPU; if it is broken, it hangs.
        done = subprocess.run(query, capture_output=True, text=True, timeout=120, check=False)
    except subprocess.TimeoutExpired:
        return "unknown (nvidia-smi did not answer within 120 s)"
    return done.stdout.strip() or "unknown"


def _nccl() -> list[Check]:
    import torch

    if not torch.distributed.is_nccl_available():
        return [Check("NCCL", "off", "this build of torch has none", "a CUDA build of torch")]
    version = ".".join(str(part) for part in torch.cuda.nccl.version())
    if not torch.cuda.is_available():
        return [Check("NCCL", "off", f"{version}, but {NO_GPU}")]
    return [Check("NCCL", "ok", version)]


_GLOO_LIMIT_S = 600
"""Two processes import torch, which takes 3 s on an idle machine and minutes on a busy one."""
_GLOO = """
import datetime, sys, torch, torch.distributed as dist
store, limit = "file://" + sys.argv[1], datetime.timedelta(seconds=180)
dist.init_process_group("gloo", init_method=store, rank=int(sys.argv[2]), world_size=2, timeout=limit)
total = torch.tensor([float(dist.get_rank() + 1)])
dist.all_reduce(total)
dist.destroy_process_group()
sys.exit(0 if total.item() == 3.0 else 3)
"""


def _gloo() -> list[Check]:
    """Let two processes sum a number, which fails with a wrong host name or a firewall."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", _GLOO, str(Path(folder) / "store")]
        pair = [
            subprocess.Popen([*command, str(rank)], stderr=subprocess.PIPE, text=True)
            for rank in range(2)
        ]
        try:
            errors = [process.communicate(timeout=_GLOO_LIMIT_S)[1] for process in pair]
        except subprocess.TimeoutExpired:
            return [_gloo_timeout()]
        finally:
            for process in pair:
                process.kill()
                process.wait()
    if all(process.returncode == 0 for process in pair):
        return [Check("gloo", "ok", "two processes on this machine exchanged a tensor")]
    why = next(
        (error.strip().splitlines()[-1] for error in errors if error.strip()), "the sum was wrong"
    )
    cure = "set GLOO_SOCKET_IFNAME to a network interface that works, such as lo"
    return [
        Check(
            "gloo",
            "broken",
            f"two processes on this machine could not exchange a tensor: {why}",
            cure,
        )
    ]


def _gloo_timeout() -> Check:
    return Check(
        "gloo",
        "timeout",
        f"two processes on this machine did not exchange a tensor within {_GLOO_LIMIT_S} s: the "
        "machine is too busy, or a firewall drops the connection",
        "run fastrlhf doctor again when the machine is idle; if it is, set GLOO_SOCKET_IFNAME=lo",
    )


def _triton() -> list[Check]:
    import torch

    module = _imported("triton")
    if isinstance(module, str):
        return [
            Check(
                "triton",
                "off",
                module,
                "pip install 'triton>=3.6' (Linux); without it the ops run in torch and C++",
            )
        ]
    if torch.cuda.is_available():
        return [Check("triton", "ok", f"{module.__version__}, kernels run on the GPU")]
    if os.environ.get("TRITON_INTERPRET") == "1":
        return [
            Check(
                "triton",
                "ok",
                f"{module.__version__}, kernels are interpreted on the CPU (slow, for tests)",
            )
        ]
    cure = "an NVIDIA GPU, or TRITON_INTERPRET=1 to interpret the kernels (slow)"
    return [Check("triton", "off", f"{module.__version__} is installed, but {NO_GPU}", cure)]


def _kernels() -> list[Check]:
    """Check the backends of the ops, as `ops.backends` reports them."""
    from fastrlhf.ops import backends

    checks = []
    for name, backend in backends().items():
        if name == "forced":
            checks.append(
                Check("ops", "ok", f"FASTRLHF_BACKEND makes every op run on {backend['backend']}")
            )
        elif backend["available"]:
            kernels = ", ".join(backend["kernels"]) or "no compiled kernels"
            checks.append(Check(f"ops on {name}", "ok", kernels))
        else:
            checks.append(Check(f"ops on {name}", "off", backend["why_not"] or "not available"))
    return checks


def _megatron() -> list[Check]:
    module = _imported("megatron.core")
    if isinstance(module, str):
        return [Check("megatron-core", "broken", module, "pip install 'megatron-core>=0.16.1'")]
    version = importlib.metadata.version("megatron-core")
    if Version(version) < Version("0.16.1"):
        return [
            Check(
                "megatron-core",
                "broken",
                f"{version} is too old",
                "pip install 'megatron-core>=0.16.1'",
            )
        ]
    if not f"{version}.".startswith(tuple(f"{line}." for line in MEGATRON_TESTED)):
        return [
            Check(
                "megatron-core",
                "ok",
                f"{version}; tested versions are {' and '.join(MEGATRON_TESTED)}",
            )
        ]
    return [Check("megatron-core", "ok", f"{version}, a tested version")]


def _transformers() -> list[Check]:
    module = _imported("transformers")
    cure = "pip install 'transformers>=5'"
    if isinstance(module, str):
        return [Check("transformers", "broken", module, cure)]
    if Version(module.__version__) < Version("5"):
        return [Check("transformers", "broken", f"{module.__version__} is too old", cure)]
    return [Check("transformers", "ok", module.__version__)]


def _flash_attention() -> list[Check]:
    module = _imported("flash_attn")
    if isinstance(module, str):
        cure = (
            "pip install flash-attn --no-build-isolation (GPU); "
            "without it attention is torch's SDPA"
        )
        return [Check("flash-attn", "off", module, cure)]
    return [Check("flash-attn", "ok", module.__version__)]


def _apex() -> list[Check]:
    """Check NVIDIA's apex, which is not on PyPI; the `apex` on PyPI is a web framework."""
    cure = "build it from github.com/NVIDIA/apex; without it torch's fused Adam is used"
    if importlib.util.find_spec("apex") is None:
        return [Check("apex", "off", "not installed", cure)]
    if importlib.util.find_spec("apex.optimizers") is None:
        return [
            Check(
                "apex",
                "off",
                "PyPI's apex is installed, which is not NVIDIA's",
                f"pip uninstall apex; {cure}",
            )
        ]
    extension = _imported("amp_C")
    if isinstance(extension, str):
        return [
            Check(
                "apex", "off", f"NVIDIA's apex without its CUDA extension amp_C: {extension}", cure
            )
        ]
    return [Check("apex", "ok", "NVIDIA's, with its CUDA extensions")]


def _transformer_engine() -> list[Check]:
    module = _imported("transformer_engine")
    if isinstance(module, str):
        cure = "pip install 'transformer-engine[pytorch]' (GPU); optional"
        return [Check("Transformer Engine", "off", module, cure)]
    return [Check("Transformer Engine", "ok", importlib.metadata.version("transformer-engine"))]


def _imported(name: str) -> ModuleType | str:
    """Return the module, or a short reason why it cannot be imported."""
    try:
        with warnings.catch_warnings():
            # megatron warns about each missing optional package; the report lists them anyway.
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # A missing parent means "not installed" too; a missing dependency of an installed package
        # does not.
        absent = error.name is not None and f"{name}.".startswith(f"{error.name}.")
        return "not installed" if absent else f"does not import: {error}"
    except (ImportError, OSError, RuntimeError) as error:
        # It was built for another torch, or a library is missing.
        return f"does not import: {str(error).splitlines()[0]}"


CHECKS: list[Callable[[], list[Check]]] = [
    _python,
    _disk,
    _torch,
    _machine,
    _gpus,
    _nccl,
    _gloo,
    _triton,
    _kernels,
    _megatron,
    _transformers,
    _flash_attention,
    _apex,
    _transformer_engine,
]
