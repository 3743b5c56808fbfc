"""Results of four ranks under every layout, which test_layouts.py compares with one rank.

torchrun --nproc-per-node 4 run_layouts.py FOLDER

Reads the Hugging Face models FOLDER/hf/<variant> and writes FOLDER/<layout>/.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from fastrlhf.commands.convert import convert_from_hf, convert_to_hf
from fastrlhf.config import ModelConfig, OptimizerConfig, ParallelConfig, ScheduleConfig
from fastrlhf.data.batches import PackedBatch, pack
from fastrlhf.models.gpt import GPT, build_model, global_names
from fastrlhf.models.hf import (
    head_from_hf,
    load_hf,
    model_config_from_hf,
    save_hf,
    verify_logits,
    vocab_size_from_hf,
)
from fastrlhf.models.hf.weights import hf_tensors
from fastrlhf.parallel import mesh as meshes
from fastrlhf.parallel.mesh import Mesh
from fastrlhf.parallel.schedule import LossHead
from fastrlhf.training.optimizer import Learner

LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor": {"tensor": 2},
    "sequence": {"tensor": 2, "sequence": True},
    "pipeline": {"pipeline": 2},
    "both": {"tensor": 2, "pipeline": 2, "sequence": True},
}
VOCAB = 101
GPT2: dict[str, Any] = {
    "family": "gpt",
    "num_layers": 2,
    "hidden_size": 32,
    "num_heads": 4,
    "max_positions": 64,
}
LLAMA: dict[str, Any] = {**GPT2, "family": "llama", "num_kv_heads": 2, "ffn_size": 48}


def micro_batches() -> list[PackedBatch]:
    """Return four micro-batches of sequences of several lengths, the same on every rank.

    One row has an odd number of tokens.
    """
    generator = torch.Generator().manual_seed(11)
    return [
        pack(
            [torch.randint(VOCAB, (length,), generator=generator).tolist() for length in lengths],
            [0] * len(lengths),
        )
        for lengths in ((5, 9, 1), (12, 4), (3, 3, 3), (20,))
    ]


def scalar_head(stage: GPT) -> LossHead[PackedBatch]:
    def head(
        hidden: torch.Tensor, batch: PackedBatch
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        scores = stage.score(hidden)
        # Different at every position and token. Positive: a sum of terms that cancel is mostly
        # rounding.
        weights = 1.5 + torch.cos(torch.arange(scores.numel()) + batch.tokens.float())
        loss = (weights * scores.square()).sum() / 50
        return loss, {"loss": loss.detach()}

    return head


def scalar_head_gradients(mesh: Mesh, model: ModelConfig) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the loss and gradients of a scalar-head model.

    The data-parallel ranks share the micro-batches.
    """
    stage = build_model(model, mesh, VOCAB, head="scalar", seed=5)
    optimizer = OptimizerConfig(lr=1e-3, distributed=False)
    learner = Learner(mesh, stage, optimizer, ScheduleConfig(decay="constant"), total_steps=1)
    metrics = learner.accumulate(
        micro_batches()[mesh.data_rank :: mesh.data_size], scalar_head(stage)
    )
    gradients: dict[str, Any] = {
        name: vars(parameter)["main_grad"] for name, parameter in global_names(stage)
    }
    return mesh.sum_metrics(metrics, ["loss"])["loss"], dict(hf_tensors(stage, gradients))


def initial_weights(mesh: Mesh, model: ModelConfig) -> dict[str, torch.Tensor]:
    stage = build_model(model, mesh, VOCAB, seed=5)
    return dict(hf_tensors(stage, dict(global_names(stage))))


def dropout(mesh: Mesh) -> dict[str, bool]:
    """Return whether tensor-parallel ranks have equal hidden states and embedding dropout masks."""
    model = ModelConfig(
        **GPT2, dtype="fp32", residual_dropout=0.3, embedding_dropout=0.3, attention_dropout=0.3
    )
    stage = build_model(model, mesh, VOCAB, seed=5).train()
    masks: list[torch.Tensor] = []
    stage.embedding.register_forward_hook(lambda *args: masks.append((args[-1] != 0).float()))
    with torch.no_grad():
        hidden = stage(micro_batches()[3])
    return {"hidden": agree(mesh, hidden), "masks": agree(mesh, masks[0])}


def agree(mesh: Mesh, tensor: torch.Tensor) -> bool:
    gathered = [torch.empty_like(tensor) for _ in range(mesh.tensor_size)]
    dist.all_gather(gathered, tensor.contiguous(), group=mesh.tensor_group)
    return all(torch.equal(other, tensor) for other in gathered)


def hugging_face(mesh: Mesh, source: Path, out: Path) -> float:
    """Load, verify and save a model; return the largest difference of logits."""
    stage = build_model(
        model_config_from_hf(source), mesh, vocab_size_from_hf(source), head=head_from_hf(source)
    )
    load_hf(source, stage)
    difference = verify_logits(stage, source, mesh)
    save_hf(stage, out, max_file_bytes=30_000)
    return difference


def run(folder: Path, name: str) -> None:
    mesh = meshes.initialize(ParallelConfig(**LAYOUTS[name], timeout_s=1200), seed=3)
    out = folder / name
    results: dict[str, Any] = {
        "logits": {},
        "place": [mesh.tensor_size, mesh.pipeline_size, mesh.data_size],
    }
    # The layout with the most shards runs every family, the others a selection.
    for source in sorted(
        [*(folder / "hf").iterdir(), *((folder / "hf-both").iterdir() if name == "both" else ())]
    ):
        results["logits"][source.name] = hugging_face(mesh, source, out / "hf" / source.name)
    for family, fields in (("gpt", GPT2), ("llama", LLAMA)):
        model = ModelConfig(**fields, dtype="fp32")
        loss, gradients = scalar_head_gradients(mesh, model)
        results[f"scalar.{family}"] = loss
        weights = initial_weights(mesh, model)
        if mesh.rank == 0:
            save_file(gradients, out / f"scalar.{family}.safetensors")
            save_file(weights, out / f"initial.{family}.safetensors")
    if mesh.pipeline_size == 1:
        results["dropout"] = dropout(mesh)
    if mesh.rank == 0:
        (out / "results.json").write_text(json.dumps(results))
    meshes.finalize()


def convert(folder: Path) -> None:
    """Convert from Hugging Face under one layout and back under another."""
    source, ours = folder / "hf" / "qwen2-tied", folder / "checkpoint"
    there = convert_from_hf(source, ours, ParallelConfig(tensor=2, pipeline=2))
    back = convert_to_hf(ours, folder / "converted", ParallelConfig(tensor=2))
    (folder / "converted.json").write_text(json.dumps([there, back]))


if __name__ == "__main__":
    convert(Path(sys.argv[1]))
    for layout in LAYOUTS:
        run(Path(sys.argv[1]), layout)
