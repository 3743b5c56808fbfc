"""Figures of GPUs: one YAML file each, with the source of every figure."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from fastrlhf.config.yaml_file import load
from fastrlhf.errors import UserError

Above0 = Annotated[float, Field(gt=0, lt=1e12)]
_FOLDER = Path(__file__).parent
GIB = 2**30


class Hardware(BaseModel):
    """A GPU, its links, and how much of its limits a program reaches.

    The efficiencies are fitted, not measured: docs/plan.md says on what.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    memory_gib: Above0
    """Memory that a process can allocate, in GiB."""
    peak_tflops: Above0
    """Dense 16-bit matrix products, 10^12 operations per second."""
    memory_gb_s: Above0
    """Memory bandwidth, 10^9 bytes per second."""
    gpus_per_node: Annotated[int, Field(gt=0, le=1024)]
    """GPUs that the node link connects."""
    node_link_gb_s: Above0
    """Bandwidth of one GPU's links in its node, in one direction."""
    network_gb_s: Above0
    """Bandwidth of one GPU's share of the network between nodes, in one direction."""
    host_link_gb_s: Above0 = 25.0
    """Bandwidth to pinned host memory, in one direction."""
    watts: Above0 = 700.0
    """Power of one GPU under load, for the energy."""

    gemm_efficiency: Annotated[float, Field(gt=0, le=1)] = 0.75
    """Share of the peak that a large matrix product reaches."""
    gemm_half_width: Annotated[float, Field(ge=0, lt=1e6)] = 100.0
    """Width of a matrix's narrow side at which half of that is reached."""
    memory_efficiency: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Share of the memory bandwidth that kernels reach."""
    link_efficiency: Annotated[float, Field(gt=0, le=1)] = 0.77
    """Share of a link's bandwidth that collectives reach."""
    collective_s: Annotated[float, Field(ge=0, lt=1)] = 20e-6
    """Latency of a collective or a message."""
    launch_s: Annotated[float, Field(ge=0, lt=1)] = 4e-6
    """Time between the starts of two kernels of a decode step."""
    reserved_gib: Annotated[float, Field(ge=0, lt=1e3)] = 2.0
    """Memory of the CUDA context, NCCL and cuBLAS workspaces."""
    fragmentation: Annotated[float, Field(ge=1, lt=2)] = 1.03
    """Bytes that the allocator takes for one byte in use."""


def names() -> list[str]:
    """Return the names of the GPUs that have a file here."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def load_hardware(gpu: str) -> Hardware:
    """Return the figures of `gpu`, a name of `names()` or the path of a YAML file.

    Raises UserError if there is none, or if a figure is missing or out of range.
    """
    path = _FOLDER / f"{gpu.lower()}.yaml"
    if not path.is_file():
        path = Path(gpu)
        if path.suffix not in (".yaml", ".yml"):
            raise UserError(
                f"--gpu {gpu}: unknown; expected one of {', '.join(names())}, or a YAML file with"
                " the figures of fastrlhf/plan/hardware"
            )
    return load(Hardware, path)
