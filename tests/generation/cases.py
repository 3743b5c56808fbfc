"""Generates with two small models under one process or several layouts of four, for test_layouts.py and the other
tests.

torchrun --nproc-per-node 4 cases.py FOLDER        writes FOLDER/LAYOUT.RANK.json
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fastrlhf import ops
from fastrlhf.config import ModelConfig, ParallelConfig
from fastrlhf.data.batches import PackedBatch, pack
from fastrlhf.generation import Generated, SamplingParams, generate_all
from fastrlhf.generation.sampling import Sampler
from fastrlhf.models.gpt import GPT, build_model
from fastrlhf.parallel import mesh as meshes
from fastrlhf.parallel import schedule
from fastrlhf.parallel.mesh import Mesh

LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor-2": {"tensor": 2},
    "tensor-2-sequence": {"tensor": 2, "sequence": True},
    "pipeline-2": {"pipeline": 2},
    "all": {"tensor": 2, "sequence": True, "pipeline": 2},
}
# Tokens that these models draw often enough to end some of the responses, and not all.
EOS = {"gpt": 223, "llama": 81}
# 300 tokens leave the second of two shards 44 of its 256 columns, 100 tokens none.
VOCAB = {"gpt": 300, "llama": 100}
MODEL: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_heads": 4,
    "max_positions": 256,
    "dtype": "fp32",
    "init_std": 0.15,
}
FAMILY: dict[str, dict[str, Any]] = {
    "gpt": {"residual_dropout": 0.2},
    "llama": {"num_kv_heads": 2, "ffn_size": 48},
}
PARAMS = {
    "greedy": SamplingParams(max_new_tokens=6, temperature=0.0),
    "sampled": SamplingParams(max_new_tokens=16, temperature=1.2, seed=11),
    "top-k": SamplingParams(max_new_tokens=6, top_k=7, seed=13),
    "top-p": SamplingParams(max_new_tokens=6, temperature=0.7, top_k=200, top_p=0.8, seed=14),
    "min": SamplingParams(max_new_tokens=16, min_new_tokens=12, temperature=1.2, seed=11),
}
NUM_PROMPTS = 11
DRAWS = 8_000


def build(family: str, mesh: Mesh, **changes: Any) -> GPT:
    model = ModelConfig(family=family, **{**MODEL, **FAMILY[family], **changes})  # type: ignore[arg-type]
    return build_model(model, mesh, VOCAB[family], seed=5)


def prompts(vocab_size: int, count: int = NUM_PROMPTS) -> list[list[int]]:
    """Lengths 1, 4, 7, ... in a mixed order."""
    generator = torch.Generator().manual_seed(9)
    lengths = [1 + 3 * ((4 * i) % count) for i in range(count)]
    return [torch.randint(0, vocab_size, (n,), generator=generator).tolist() for n in lengths]


def recomputed(
    stage: GPT, mesh: Mesh, prompts: list[list[int]], responses: list[Generated], temperature: float
) -> Any:
    """Each response's log-probabilities by the training forward and op, one packed micro-batch a response."""
    batches = [
        pack([prompt + response.tokens], [len(prompt)])
        for prompt, response in zip(prompts, responses, strict=True)
    ]

    def head(hidden: torch.Tensor, batch: PackedBatch) -> list[float]:
        keep = batch.loss_mask
        out = ops.linear_logprobs(
            hidden[keep], labels=batch.labels[keep], temperature=temperature, **stage.lm_head()
        )
        return out.logprobs.tolist()

    stage.eval()
    return schedule.forward(mesh, stage, batches, head)


def run_model(family: str, mesh: Mesh) -> dict[str, Any]:
    """All cases of one model: this data-parallel rank's share of the prompts, by their global ids."""
    stage = build(family, mesh)
    everything = prompts(VOCAB[family])
    ids = list(range(len(everything)))[mesh.data_rank :: mesh.data_size]
    mine = [everything[i] for i in ids]
    results: dict[str, Any] = {"ids": ids}
    for name, params in PARAMS.items():
        out = generate_all(stage, mine, params, mesh=mesh, eos=EOS[family], slots=5, ids=ids)
        results[name] = [asdict(response) for response in out]
        if name == "sampled":
            results["recomputed"] = recomputed(stage, mesh, mine, out, params.temperature)
    return results


def histogram(mesh: Mesh, **changes: Any) -> list[int]:
    """Counts of DRAWS draws from `target_logits`."""
    hidden, weight = target()
    columns = weight.shape[0] // mesh.tensor_size
    shard = weight[mesh.tensor_rank * columns : (mesh.tensor_rank + 1) * columns]
    sampler = Sampler(
        SamplingParams(seed=1, **changes), shard, VOCAB["gpt"], mesh.vocab_group, EOS["gpt"]
    )
    ids = torch.arange(DRAWS)
    tokens, _ = sampler(hidden.expand(DRAWS, -1), ids, torch.full_like(ids, 17))
    return torch.bincount(tokens, minlength=VOCAB["gpt"]).tolist()


def target() -> tuple[torch.Tensor, torch.Tensor]:
    """A hidden state [1, H] and a padded LM head [512, H] whose padding would win if it were not left out."""
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(1, 16, generator=generator)
    weight = 0.4 * torch.randn(512, 16, generator=generator)
    weight[VOCAB["gpt"] :] = 100 * hidden
    return hidden, weight


def main(folder: Path) -> None:
    for name, layout in LAYOUTS.items():
        mesh = meshes.initialize(ParallelConfig(**layout, timeout_s=120), seed=1)
        results: dict[str, Any] = {family: run_model(family, mesh) for family in FAMILY}
        results["histogram"] = histogram(mesh) if mesh.is_last_stage else None
        results["last_stage"] = mesh.is_last_stage
        (folder / f"{name}.{mesh.rank}.json").write_text(json.dumps(results))
        meshes.finalize()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
