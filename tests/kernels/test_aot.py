"""Every kernel compiles for Ampere, Hopper and Blackwell, without a GPU and without spills."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
REPORT = Path(__file__).with_name("aot_report.py")
VOCABULARY = (
    "logprob_statistics",
    "logprob_forward",
    "logprob_backward",
    "logprob_forward softcap",
    "logprob_backward softcap",
    "logits_kl_statistics",
    "logits_kl_backward",
)
KERNELS = [f"{name} {dtype}" for dtype in ("bf16", "fp32") for name in VOCABULARY]
KERNELS += ["ppo_loss fp32", "ppo_loss gspo", "ranking_loss fp32"]
KERNELS += [f"{name} {length}" for name in ("gae", "shaped_gae") for length in (128, 1024)]


@pytest.fixture(scope="module", params=[80, 90, 100])
def built(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    # in its own process: this one's triton may be interpreting
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = str(REPORT.parents[2])
    command = [sys.executable, "-W", "ignore", str(REPORT), str(request.param)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_resources(built):
    print(f"\n{'kernel':28}{'sm':>4}{'warps':>6}{'registers':>10}{'spilled':>8}{'shared':>8}")
    for k in built:
        row = (k["sm"], k["warps"], k["registers"], k["spilled_bytes"], k["shared_bytes"])
        print(f"{k['kernel']:28}{row[0]:4}{row[1]:6}{row[2]:10}{row[3]:8}{row[4]:8}")
    assert sorted(k["kernel"] for k in built) == sorted(KERNELS)
    for k in built:
        assert k["spilled_bytes"] == 0, k
        assert k["shared_bytes"] <= 16 << 10, k
        # at least two blocks of these fit the 64 K registers of a multiprocessor
        assert k["registers"] * k["warps"] * 32 * 2 <= 64 << 10, k


def test_rows_are_read_and_written_at_full_width(built):
    """Unmasked blocks use 16-byte accesses, although no stride is known to be aligned."""
    for k in built:
        # a block of a capped row holds half as many elements, and so half as many accesses
        share = 2 if "softcap" in k["kernel"] else 1
        if k["kernel"].split()[0] in VOCABULARY:
            assert k["vector_loads"] >= 2 // share, k
        if k["kernel"].split()[0].endswith("backward"):
            assert k["vector_stores"] >= 4 // share, k
