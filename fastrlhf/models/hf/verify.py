"""Compares a stage with transformers' own model, in fp32: the proof that a conversion is right, weights and
architecture.

Rank 0 holds transformers' model whole, on the CPU; the stage is compared through an fp32 copy unless it is fp32
already.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from fastrlhf.models.gpt import GPT, build_model
from fastrlhf.models.hf.shapes import gguf_arguments, read_hf_config
from fastrlhf.parallel.mesh import Mesh
from fastrlhf.parallel.schedule import forward

Tensor = torch.Tensor
# Two fp32 implementations of a deep model differ by rounding (measured: 1e-6 of the largest logit on small models,
# 1e-5 on GPT-2); a misplaced tensor differs by the logits themselves.
TOLERANCE = 1e-4
_LENGTHS = (1, 7, 33)


class LogitMismatch(RuntimeError):
    """The stage and transformers' model compute different logits; the message says by how much."""


def verify_logits(stage: GPT, path: str | Path, mesh: Mesh) -> float:
    """Largest difference between the logits (or scores) of `stage` and of the model saved in `path`, on random tokens.

    Call it on every rank. Packed sequences of several lengths go through our stage, each one alone through
    transformers' eager model. Raises `LogitMismatch` on every rank when the difference passes 1e-4 of the largest
    logit (1e-4 if that is below 1).
    """
    lengths = [min(length, stage.model_config.max_positions) for length in _LENGTHS]
    generator = torch.Generator().manual_seed(0)
    sequences = [
        torch.randint(stage.vocab_size, (length,), generator=generator) for length in lengths
    ]
    ours = _stage_logits(stage, sequences, mesh)
    result = torch.zeros(2, dtype=torch.float64, device=mesh.device)
    if mesh.rank == 0:
        theirs = reference_logits(path, sequences, head=stage.head_kind)
        result[0] = (ours.cpu() - theirs).abs().max()
        result[1] = theirs.abs().max()
    dist.broadcast(result, src=0)
    difference, largest = result.tolist()
    # `not <=` and not `>`: a NaN is a mismatch.
    if not difference <= TOLERANCE * max(1.0, largest):
        raise LogitMismatch(
            f"{path}: logits differ from transformers' by {difference:.3g} (largest logit {largest:.3g}); "
            "the weights there and in our model are not the same model"
        )
    return difference


def _stage_logits(stage: GPT, sequences: list[Tensor], mesh: Mesh) -> Tensor:
    """fp32 logits [T, V], or scores [T], of the packed sequences, on every rank."""
    if stage.model_config.dtype != "fp32":
        stage = _in_fp32(stage, mesh)
    lengths = torch.tensor([sequence.numel() for sequence in sequences])
    batch = SimpleNamespace(
        tokens=torch.cat(sequences).to(mesh.device),
        positions=torch.cat([torch.arange(length) for length in lengths.tolist()]).to(mesh.device),
        cu_seqlens=torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int().to(mesh.device),
        max_seqlen=int(lengths.max()),
    )
    training = stage.training
    stage.eval()
    outputs = forward(mesh, stage, [batch], lambda hidden, _: _logits(stage, hidden, mesh))
    stage.train(training)
    return mesh.from_last_stage(outputs[0] if mesh.is_last_stage else None)


def _logits(stage: GPT, hidden: Tensor, mesh: Mesh) -> Tensor:
    if stage.head_kind == "scalar":
        return stage.score(hidden)
    columns = hidden @ stage.lm_head()["weight"].t()
    if mesh.tensor_size > 1:
        shards = [torch.empty_like(columns) for _ in range(mesh.tensor_size)]
        dist.all_gather(shards, columns.contiguous(), group=mesh.tensor_group)
        columns = torch.cat(shards, dim=-1)
    return columns[:, : stage.vocab_size]


@torch.no_grad()
def _in_fp32(stage: GPT, mesh: Mesh) -> GPT:
    model = stage.model_config.model_copy(update={"dtype": "fp32", "attention": "auto"})
    twin = build_model(model, mesh, stage.vocab_size, head=stage.head_kind)
    for ours, theirs in zip(twin.parameters(), stage.parameters(), strict=True):
        ours.copy_(theirs)
    return twin


@torch.no_grad()
def reference_logits(path: str | Path, sequences: list[Tensor], *, head: str) -> Tensor:
    """transformers' fp32 logits [T, V], or scores [T] (with `score_bias`), each sequence alone through the eager
    model.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    folder, gguf = gguf_arguments(path)
    kind: Any = AutoModelForCausalLM if head == "lm" else AutoModelForSequenceClassification
    safe = {} if gguf else {"use_safetensors": True}
    model = kind.from_pretrained(
        folder,
        local_files_only=True,
        trust_remote_code=False,
        dtype=torch.float32,
        attn_implementation="eager",
        **safe,
        **gguf,
    ).eval()
    if head == "lm":
        return torch.cat([model(sequence[None]).logits[0] for sequence in sequences])
    bias = float(getattr(read_hf_config(path), "score_bias", 0.0))
    hidden = torch.cat(
        [model.base_model(sequence[None]).last_hidden_state[0] for sequence in sequences]
    )
    return model.score(hidden)[:, 0] + bias
