"""The data package imports without megatron, triton, transformers, pyarrow and a GPU."""

from __future__ import annotations

import pkgutil
import subprocess
import sys

import fastrlhf.data

BLOCKED = ["megatron", "triton", "transformers", "tokenizers", "pyarrow", "duckdb"]


def test_every_module_imports_without_the_heavy_packages() -> None:
    modules = [
        module.name for module in pkgutil.iter_modules(fastrlhf.data.__path__, "fastrlhf.data.")
    ]
    assert "fastrlhf.data.loader" in modules
    blocks = "".join(f"sys.modules[{name!r}] = None; " for name in BLOCKED)
    program = f"import sys, importlib; {blocks}[importlib.import_module(m) for m in {modules!r}]"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=1800)
