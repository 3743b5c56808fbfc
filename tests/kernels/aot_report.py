"""Compile every Triton kernel for GPUs that need not exist here; print its resources as JSON lines.

Run `python aot_report.py 80 90 100` (compute capabilities). Spilled registers would appear as stack
or local memory.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastrlhf.kernels import gae, logits_kl, logprob, ppo_loss, ranking
from fastrlhf.kernels.rows import row_options

LOGITS = {"bf16": torch.bfloat16, "fp32": torch.float32}


def _signature(
    kernel: Any, pointers: dict[str, str], floats: set[str], constexprs: dict[str, Any]
) -> ASTSource:
    """Return the source with pointer types as named, of unknown alignment.

    `floats` are fp32, counts 32-bit, strides 64-bit (the widest that a launch can pass).
    """
    signature = {}
    for name in kernel.arg_names:
        if name in constexprs:
            signature[name] = "constexpr"
        elif name in floats:
            signature[name] = "fp32"
        else:
            other = "*fp32" if name.endswith("_ptr") else "i64" if "stride" in name else "i32"
            signature[name] = pointers.get(name, other)
    return ASTSource(kernel, signature, constexprs={**constexprs})


FLOATS = {
    "temperature",
    "scale",
    "inverse_temperature",
    "clip",
    "clip_low",
    "clip_high",
    "value_clip",
    "value_coef",
    "entropy_coef",
    "dual_clip",
    "kl_coef",
    "center_coef",
    "softcap",
}
FLOATS |= {"gamma", "lam"}


def _vocabulary(kernel: Any, dtype: str, **flags: Any) -> tuple[ASTSource, int]:
    capped = flags.get("SOFTCAP", False)
    options = row_options(torch.empty(0, dtype=LOGITS[dtype]), 128256, capped)
    warps = options.pop("num_warps")
    logits = dict.fromkeys(("x_ptr", "y_ptr", "out_ptr", "ref_out_ptr"), f"*{dtype}")
    pointers = {**logits, "labels_ptr": "*i64", "mask_ptr": "*i1"}
    flags["ON_DEVICE"] = False
    if "SOFTCAP" in kernel.arg_names:
        flags.setdefault("SOFTCAP", False)
    return _signature(kernel, pointers, FLOATS, {**flags, **options}), warps


def sources() -> Iterator[tuple[str, ASTSource, int]]:
    """Yield (name, source, warps) of every kernel, with every option on."""
    both = {"MASKED": True, "ENTROPY": True}
    for d in LOGITS:
        yield f"logprob_statistics {d}", *_vocabulary(logprob._statistics_kernel, d, MASKED=True)
        yield f"logprob_forward {d}", *_vocabulary(logprob._forward_kernel, d, KL=True, **both)
        gradients = {"LOGPROB": True, "LOGSUMEXP": True, "SAME_ALIGNMENT": True}
        yield (
            f"logprob_backward {d}",
            *_vocabulary(logprob._backward_kernel, d, **gradients, **both),
        )
        capped = {**both, "SOFTCAP": True}
        forward = _vocabulary(logprob._forward_kernel, d, KL=True, **capped)
        yield f"logprob_forward softcap {d}", *forward
        backward = _vocabulary(logprob._backward_kernel, d, **gradients, **capped)
        yield f"logprob_backward softcap {d}", *backward
        flags = {"MASKED": True, "SAME_ALIGNMENT": True}
        yield f"logits_kl_statistics {d}", *_vocabulary(logits_kl._statistics_kernel, d, **flags)
        yield (
            f"logits_kl_backward {d}",
            *_vocabulary(logits_kl._backward_kernel, d, LOGITS=True, REF=True, **flags),
        )
    masks = {"mask_ptr": "*i1", "counter_ptr": "*i32"}
    flags = {"HAS_VALUES": True, "HAS_ENTROPY": True, "GIVEN": False, "BLOCK": ppo_loss.BLOCK}
    flags |= {"MOST": ppo_loss.MAX_BLOCKS, "ON_DEVICE": False, "CISPO": False}
    plain = {"HAS_REF": False, "HAS_WEIGHTS": False, "SEQUENCE": False, "ESTIMATOR": "k3"}
    yield "ppo_loss fp32", _signature(ppo_loss._kernel, masks, FLOATS, {**flags, **plain}), 4
    every = {"HAS_REF": True, "HAS_WEIGHTS": True, "SEQUENCE": True, "ESTIMATOR": "k3"}
    yield "ppo_loss gspo", _signature(ppo_loss._kernel, masks, FLOATS, {**flags, **every}), 4
    for length in (128, 1024):
        options = gae.scan_options(length)
        warps, flags = options.pop("num_warps"), {"ESTIMATOR": "k3", "CLIPPED": True}
        options |= {"BOOTSTRAP": True, "ON_DEVICE": False}
        flags |= options
        yield f"gae {length}", _signature(gae._gae_kernel, masks, FLOATS, options), warps
        yield (
            f"shaped_gae {length}",
            _signature(gae._shaped_gae_kernel, masks, FLOATS, flags),
            warps,
        )
    flags = {"PER_PROMPT": True, "TILE": ranking.TILE, "MARGINS": True, "CENTERED": True}
    flags["ON_DEVICE"] = False
    integers = {"ranks_ptr": "*i64", "offsets_ptr": "*i64", "counter_ptr": "*i32"}
    yield "ranking_loss fp32", _signature(ranking._kernel, integers, FLOATS, flags), 2


def resources(name: str, source: ASTSource, warps: int, capability: int) -> dict[str, Any]:
    built = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps}
    )
    ptx = built.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}
    return {
        "kernel": name,
        "sm": capability,
        "registers": used["REG"],
        "spilled_bytes": used["STACK"] + used["LOCAL"],
        "shared_bytes": built.metadata.shared,
        "warps": warps,
        "vector_loads": len(re.findall(r"ld\.global\S*\.v[248]", ptx)),
        "vector_stores": len(re.findall(r"st\.global\S*\.v[248]", ptx)),
    }


if __name__ == "__main__":
    for capability in map(int, sys.argv[1:]):
        for name, source, warps in sources():
            print(json.dumps(resources(name, source, warps, capability)), flush=True)
