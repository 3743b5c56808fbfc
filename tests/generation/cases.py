"""Generation with three small models in one process or under several layouts of four processes.

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
from fastrlhf.commands.sample import sample
from fastrlhf.config import ModelConfig, ParallelConfig
from fastrlhf.data.batches import PackedBatch, pack
from fastrlhf.data.records import Prompt
from fastrlhf.data.tokenize import load_tokenizer, train_bpe
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
# Tokens that these models sample often enough to end some of the responses, but not all.
EOS = {"gpt": 223, "llama": 81, "windowed": 81}
# With 300 tokens the second of two shards has 44 real columns of 256; with 100 tokens it has none.
VOCAB = {"gpt": 300, "llama": 100, "windowed": 100}
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
    # Prompts have up to 31 tokens, and the second stage of a pipeline has the window.
    "windowed": {
        "family": "llama",
        "num_kv_heads": 2,
        "ffn_size": 48,
        "rope_scaling": "llama3",
        "rope_factor": 8.0,
        "rope_original_positions": 8,
        "sliding_window": 6,
        "full_attention_layers": 1,
    },
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
    config = ModelConfig(**{"family": family, **MODEL, **FAMILY[family], **changes})
    return build_model(config, mesh, VOCAB[family], seed=5)


def prompts(vocab_size: int, count: int = NUM_PROMPTS) -> list[list[int]]:
    """Return prompts of lengths 1, 4, 7, ... in a mixed order."""
    generator = torch.Generator().manual_seed(9)
    lengths = [1 + 3 * ((4 * i) % count) for i in range(count)]
    return [torch.randint(0, vocab_size, (n,), generator=generator).tolist() for n in lengths]


def recomputed(
    model: GPT, mesh: Mesh, prompts: list[list[int]], responses: list[Generated], temperature: float
) -> list[list[float]]:
    """Return each response's log-probabilities from the training forward pass and op.

    Each response is one packed micro-batch.
    """
    batches = [
        pack([prompt + response.tokens], [len(prompt)])
        for prompt, response in zip(prompts, responses, strict=True)
    ]

    def head(hidden: torch.Tensor, batch: PackedBatch) -> list[float]:
        keep = batch.loss_mask
        out = ops.linear_logprobs(
            hidden[keep], labels=batch.labels[keep], temperature=temperature, **model.lm_head()
        )
        return out.logprobs.tolist()

    model.eval()
    return schedule.forward(mesh, model, batches, head)


def run_model(family: str, mesh: Mesh) -> dict[str, Any]:
    """Run all cases of one model on this data-parallel rank's share of the prompts."""
    model = build(family, mesh)
    everything = prompts(VOCAB[family])
    ids = list(range(len(everything)))[mesh.data_rank :: mesh.data_size]
    mine = [everything[i] for i in ids]
    results: dict[str, Any] = {"ids": ids}
    for name, params in PARAMS.items():
        out = generate_all(model, mine, params, mesh=mesh, eos=EOS[family], slots=5, ids=ids)
        results[name] = [asdict(response) for response in out]
        if name == "sampled":
            results["recomputed"] = recomputed(model, mesh, mine, out, params.temperature)
    return results


def histogram(mesh: Mesh, **changes: Any) -> list[int]:
    """Count the tokens of DRAWS samples from the logits of `target`."""
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
    """Return a hidden state [1, H] and a padded LM head [512, H].

    The padding would always be sampled if it were not masked.
    """
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(1, 16, generator=generator)
    weight = 0.4 * torch.randn(512, 16, generator=generator)
    weight[VOCAB["gpt"] :] = 100 * hidden
    return hidden, weight


def write_samples(mesh: Mesh, out: Path) -> dict[str, float]:
    """Write `out` as `fastrlhf sample` does; return its summary without the time."""
    texts = ["the cat sat on the mat. a dog ran after the cat."] * 4
    tokenizer_folder = out.with_name(f"{out.name}.tokenizer.{mesh.rank}")
    train_bpe(texts, 290, tokenizer_folder)
    model = build_model(
        ModelConfig(**{"family": "gpt", **MODEL, **FAMILY["gpt"]}), mesh, 290, seed=5
    )
    records = [Prompt("the cat " * i, columns={"answer": i}) for i in range(1, 8)]
    params = SamplingParams(max_new_tokens=6, temperature=1.2, seed=11)
    tokenizer = load_tokenizer(tokenizer_folder)
    counts = sample(model, tokenizer, records, (2, 4), params, mesh=mesh, out=out, slots=3)
    return {name: value for name, value in counts.summary().items() if name != "seconds"}


def main(folder: Path) -> None:
    for name, layout in LAYOUTS.items():
        mesh = meshes.initialize(ParallelConfig(**layout, timeout_s=1200), seed=1)
        results: dict[str, Any] = {family: run_model(family, mesh) for family in FAMILY}
        results["histogram"] = histogram(mesh) if mesh.is_last_stage else None
        results["last_stage"] = mesh.is_last_stage
        results["summary"] = write_samples(mesh, folder / f"{name}.samples")
        (folder / f"{name}.{mesh.rank}.json").write_text(json.dumps(results))
        meshes.finalize()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
