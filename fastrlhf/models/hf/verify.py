"""Verification of a conversion: compare a stage's fp32 logits with those of transformers' model.

Rank 0 loads the complete transformers model on the CPU, by the classes and the forward that users
call: AutoModelForCausalLM or AutoModelForSequenceClassification on a padded batch. A stage that is not fp32 is compared
through an fp32 copy.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.nn.utils.rnn import pad_sequence

from fastrlhf.data.batches import pack
from fastrlhf.models.gpt import GPT, build_model
from fastrlhf.models.heads import Head
from fastrlhf.models.hf.shapes import gguf_arguments, read_hf_config
from fastrlhf.parallel.mesh import Mesh
from fastrlhf.parallel.schedule import forward

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Tensor = torch.Tensor
TOLERANCE = 1e-4
"""Maximum difference, relative to the largest logit if that is above 1.

Two fp32 implementations of a deep model differ by rounding (measured: 1e-6 of the largest logit on
small models, 1e-5 on GPT-2). A misplaced tensor makes a difference of the size of the logits.
"""
_LENGTHS = (1, 7, 33)


class LogitMismatch(RuntimeError):
    """The stage and transformers' model compute different logits."""


def verify_logits(stage: GPT, path: str | Path, mesh: Mesh) -> float:
    """Return the largest difference between the logits of `stage` and of the model in `path`.

    With a scalar head, scores are compared. Call it on every rank. Our stage runs packed sequences
    of random tokens; transformers' model runs them as one padded batch. Raises LogitMismatch on
    every rank if the difference exceeds `TOLERANCE`.
    """
    lengths = [min(length, stage.model_config.max_positions) for length in _LENGTHS]
    sequences = _random_sequences(lengths, stage.vocab_size, _pad_id(read_hf_config(path)))
    ours = _stage_logits(stage, sequences, mesh)
    if stage.head_kind == "scalar":
        ours = ours[torch.tensor(lengths, device=ours.device).cumsum(0) - 1]
    result = torch.zeros(2, dtype=torch.float64, device=mesh.device)
    if mesh.rank == 0:
        theirs = reference_logits(path, sequences, head=stage.head_kind)
        theirs = theirs[:, : stage.vocab_size] if stage.head_kind == "lm" else theirs
        result[0] = (ours.cpu() - theirs).abs().max()
        result[1] = theirs.abs().max()
    dist.broadcast(result, src=0)
    difference, largest = result.tolist()
    # `not <=` rather than `>`: a NaN is a mismatch.
    if not difference <= TOLERANCE * max(1.0, largest):
        raise LogitMismatch(
            f"{path}: logits differ from transformers' by {difference:.3g} (largest logit "
            f"{largest:.3g}); the folder and our stage are not the same model"
        )
    return difference


def _stage_logits(stage: GPT, sequences: list[Tensor], mesh: Mesh) -> Tensor:
    """Return fp32 logits [T, V] or scores [T] of the packed sequences, on every rank."""
    if stage.model_config.dtype != "fp32":
        stage = _fp32_copy(stage, mesh)
    batch = pack([sequence.tolist() for sequence in sequences], [0] * len(sequences))
    batch = batch.to(mesh.device)
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
def _fp32_copy(stage: GPT, mesh: Mesh) -> GPT:
    model = stage.model_config.model_copy(update={"dtype": "fp32", "attention": "auto"})
    twin = build_model(model, mesh, stage.vocab_size, head=stage.head_kind)
    for ours, theirs in zip(twin.parameters(), stage.parameters(), strict=True):
        ours.copy_(theirs)
    return twin


def _pad_id(config: PretrainedConfig) -> int | None:
    pad: int | None = getattr(config, "pad_token_id", None)
    return pad


def _random_sequences(lengths: list[int], vocab_size: int, pad: int | None) -> list[Tensor]:
    """Return random tokens without the pad token, which transformers does not score."""
    generator = torch.Generator().manual_seed(0)
    sequences = []
    for length in lengths:
        if pad is None or not 0 <= pad < vocab_size:
            sequences.append(torch.randint(vocab_size, (length,), generator=generator))
        else:
            drawn = torch.randint(vocab_size - 1, (length,), generator=generator)
            sequences.append(drawn + (drawn >= pad))
    return sequences


@torch.no_grad()
def reference_logits(path: str | Path, sequences: list[Tensor], *, head: Head) -> Tensor:
    """Return transformers' fp32 logits [T, V], or scores [sequences] including `score_bias`.

    The sequences run as one batch, padded on the right. Those of a reward model without a pad
    token, which transformers refuses to batch, run alone.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    folder, gguf = gguf_arguments(path)
    kind = AutoModelForCausalLM if head == "lm" else AutoModelForSequenceClassification
    safe = {} if gguf else {"use_safetensors": True}
    model = kind.from_pretrained(
        folder,
        local_files_only=True,
        trust_remote_code=False,
        dtype=torch.float32,
        **safe,
        **gguf,
    ).eval()
    pad = _pad_id(model.config)
    if head == "scalar" and pad is None:
        scores = torch.cat([model(sequence[None]).logits[:, 0] for sequence in sequences])
    else:
        tokens = pad_sequence(sequences, batch_first=True, padding_value=pad or 0)
        lengths = torch.tensor([len(sequence) for sequence in sequences])
        mask = torch.arange(tokens.shape[1]) < lengths[:, None]
        logits = model(input_ids=tokens, attention_mask=mask.long()).logits
        if head == "lm":
            return logits[mask]
        scores = logits[:, 0]
    return scores + float(getattr(model.config, "score_bias", 0.0))
