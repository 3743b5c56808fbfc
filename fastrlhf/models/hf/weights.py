"""Copy weights between a Hugging Face folder and pipeline stages, one tensor at a time.

Loading reads only this rank's slices. Saving gathers each parameter over its tensor-parallel group
and sends it to rank 0, which holds at most one safetensors file in memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from fastrlhf.checkpoint.folder_writer import save_tensors
from fastrlhf.config import ModelConfig
from fastrlhf.errors import UserError
from fastrlhf.models.gpt import GPT, global_names
from fastrlhf.models.hf.files import Tensors, open_tensors
from fastrlhf.models.hf.generation_settings import export_settings, write_settings
from fastrlhf.models.hf.mapping import (
    Rule,
    Source,
    merge,
    stored_shapes,
    stored_tensors,
    tensor_map,
)
from fastrlhf.models.hf.pad_token import export_tokenizer
from fastrlhf.models.hf.shapes import head_from_hf, hf_config, model_config_from_hf, read_hf_config
from fastrlhf.models.rope import ROPE_FIELDS
from fastrlhf.parallel.mesh import Mesh

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerFast

Tensor = torch.Tensor
MAX_FILE_BYTES = 5_000_000_000
_ROWS_COMPARED = 8192


@torch.no_grad()
def load_hf(path: str | Path, stage: GPT) -> None:
    """Load the local folder or .gguf file `path` into `stage`, under any layout, head and dtype.

    Call it on every rank, before the optimizer is built (it copies the weights). Every tensor of
    the folder is used exactly once and every parameter is loaded, with two exceptions: a stage with
    a scalar head loaded from a language model ignores the unembedding and keeps its own head, and a
    tied model may repeat the embedding as lm_head.weight if the two are equal. A reward model's
    bias, which transformers does not have, is `score_bias` in config.json (0 if absent). Weights
    are rounded to the stage's dtype; the score bias takes what this removes from the bias of
    GPT-2's last LayerNorm, which may hold the score bias (`fold_score_bias`).

    Raises UserError naming the first field or tensor that does not match.
    """
    theirs, head = model_config_from_hf(path), head_from_hf(path)
    if head == "scalar" and stage.head_kind == "lm":
        raise UserError(f"{path}: holds a reward model, not the language model needed here")
    _check_shape(path, theirs, stage)
    rules = tensor_map(theirs, stage.vocab_size, head)
    tensors = open_tensors(path)
    _check_tensors(path, tensors, stored_shapes(rules), tied=theirs.tie_embeddings)
    for name, parameter in global_names(stage):
        if name in rules:
            parameter.copy_(_read_shard(tensors, rules[name], parameter, stage).view_as(parameter))
        elif name == "score.bias" and head == "scalar":
            parameter.fill_(float(getattr(read_hf_config(path), "score_bias", 0.0)))
        else:
            # Only a new scalar head on a language model is missing from the rules.
            assert name.startswith("score."), name
    layernorm = rules.get("decoder.final_layernorm.bias")
    own = dict(global_names(stage))
    if head == "scalar" and layernorm is not None and "score.bias" in own:
        exact = tensors.read(layernorm.sources[0].name, (slice(None),)).to(own["score.bias"])
        rounded = own["decoder.final_layernorm.bias"].float()
        own["score.bias"].add_((exact - rounded) @ own["score.weight"].flatten())


def _check_shape(path: str | Path, theirs: ModelConfig, stage: GPT) -> None:
    ours = stage.model_config
    fields = [
        *(
            "num_layers",
            "hidden_size",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "ffn_size",
            "position",
            "norm",
        ),
        *("norm_eps", "activation", "bias", "qkv_bias", "qk_norm"),
        *(("max_positions",) if theirs.position == "learned" else ROPE_FIELDS),
        *("sliding_window", "full_attention_layers"),
    ]
    if stage.head_kind == "lm":
        fields.append("tie_embeddings")
    wrong = {name: (getattr(ours, name), getattr(theirs, name)) for name in fields}
    wrong["vocab_size"] = (stage.vocab_size, theirs.vocab_size)
    for name, (mine, needed) in wrong.items():
        # A .gguf file keeps its floats in fp32: 1e-6 comes back as 9.99999997e-07.
        same = (
            math.isclose(mine, needed, rel_tol=1e-6)
            if isinstance(needed, float) and mine is not None
            else mine == needed
        )
        if not same:
            value = "null" if needed is None else needed
            raise UserError(
                f"{path}: its model has {name} {value}, not {mine}; set model.{name}={value}"
            )


def _check_tensors(
    path: str | Path, tensors: Tensors, expected: Mapping[str, tuple[int, ...]], *, tied: bool
) -> None:
    for name, shape in expected.items():
        if name not in tensors.shapes:
            raise UserError(
                f"{path}: tensor {name} {list(shape)} is missing; the folder is incomplete"
            )
        if tensors.shapes[name] != shape:
            found = list(tensors.shapes[name])
            raise UserError(f"{path}: tensor {name} is {found}, but config.json says {list(shape)}")
    extra = sorted(set(tensors.shapes) - set(expected))
    if tied and extra == ["lm_head.weight"]:
        embedding = next(iter(expected))
        if not _equal(tensors, "lm_head.weight", embedding):
            raise UserError(
                f"{path}: lm_head.weight differs from {embedding}, but config.json ties them; "
                "set tie_word_embeddings to false"
            )
    elif extra:
        raise UserError(
            f"{path}: tensor {extra[0]} has no place in this model ({len(extra)} such tensors); "
            "check that config.json belongs to these weights"
        )


def _equal(tensors: Tensors, first: str, second: str) -> bool:
    if tensors.shapes[first] != tensors.shapes[second]:
        return False
    blocks = (
        slice(row, row + _ROWS_COMPARED)
        for row in range(0, tensors.shapes[first][0], _ROWS_COMPARED)
    )
    return all(
        torch.equal(tensors.read(first, (rows,)), tensors.read(second, (rows,))) for rows in blocks
    )


def _read_shard(tensors: Tensors, rule: Rule, parameter: Tensor, stage: GPT) -> Tensor:
    """Read this rank's shard of a parameter from the matching slices of its sources."""
    rank, size, dim = stage.mesh.tensor_rank, stage.mesh.tensor_size, rule.shard_dim
    parts = []
    for source in rule.sources:
        length = (
            parameter.shape[dim]
            if dim is not None and rule.merge == "copy"
            else source.rows // size
        )
        start, stop = rank * length, (rank + 1) * length
        if dim == 0:  # the last ranks of a vocabulary have padding
            start, stop = min(start, source.rows), min(stop, source.rows)
        part = tensors.read(source.name, source.index(dim, start, stop))
        parts.append(part.t() if source.transposed and part.dim() == 2 else part)
    shard = merge(rule, parts, stage.model_config.head_dim)
    padded = dim == 0 and rule.merge == "copy" and shard.dim() == 2
    return F.pad(shard, (0, 0, 0, parameter.shape[0] - shard.shape[0])) if padded else shard


@dataclass(frozen=True)
class Exported:
    """What the user must know of an exported folder; complete on rank 0."""

    pad_note: str
    score_bias: float
    """What transformers' scores lack, compared with ours."""


def save_hf(
    stage: GPT,
    path: str | Path,
    tokenizer: PreTrainedTokenizerFast | None = None,
    *,
    extra: Mapping[str, object] | None = None,
    generation: Mapping[str, Any] | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> Exported:
    """Write the model to the new folder `path` for transformers' Auto classes.

    Call it on every rank; rank 0 writes. The folder has safetensors in the stage's dtype (with an
    index if there is more than one file), config.json, generation_config.json and the `tokenizer`
    if one is given, which gets a pad token (`export_tokenizer`). A row that the embedding and the
    unembedding need for it is the mean of the others: its logit is then the mean of the logits, so
    that its probability is below 1 / vocabulary. `generation` is `SavedModel.generation`.

    A scalar head becomes `...ForSequenceClassification` with one label. transformers' heads have no
    bias: GPT-2's last LayerNorm takes it (`fold_score_bias`), and for the others it is `score_bias`
    in config.json, which also has the entries of `extra`.

    Raises UserError if the folder is not empty or no transformers architecture computes the model.
    """
    path, mesh, model, head = Path(path), stage.mesh, stage.model_config, stage.head_kind
    check_new_folder(path)
    export = None
    if tokenizer is not None:
        export = export_tokenizer(tokenizer, stage.vocab_size, model.max_positions, head)
        tokenizer = export.tokenizer
    rows = export.rows if export else 0
    config = hf_config(model, stage.vocab_size + rows, head, tokenizer)
    grown = _vocabulary_tensors(stage) if rows else set()
    dist.barrier()
    writer = _Writer(path, max_file_bytes) if mesh.rank == 0 else None
    score_bias = 0.0
    for name, tensor in hf_tensors(stage, fold_score_bias(stage)):
        if name == "score.bias":
            score_bias = config.score_bias = tensor.item()
        elif writer is not None:
            writer.add(name, _with_mean_rows(tensor, rows) if name in grown else tensor)
    if writer is not None:
        writer.close()
        suppressed = list(range(stage.vocab_size, stage.vocab_size + rows))
        settings = export_settings(generation or {}, tokenizer, suppressed)
        write_descriptions(path, config, tokenizer, settings, extra or {})
    dist.barrier()
    return Exported(export.note if export else "", score_bias)


def _vocabulary_tensors(stage: GPT) -> set[str]:
    """Return the names of the tensors with one row per token."""
    rules = tensor_map(stage.model_config, stage.vocab_size, stage.head_kind)
    ours = ("embedding.word_embeddings.weight", "output_layer.weight")
    return {source.name for name in ours if name in rules for source in rules[name].sources}


def _with_mean_rows(tensor: Tensor, rows: int) -> Tensor:
    mean = tensor.mean(dim=0, dtype=torch.float32).to(tensor.dtype)
    return torch.cat([tensor, mean.expand(rows, -1)])


@torch.no_grad()
def fold_score_bias(stage: GPT) -> dict[str, Tensor]:
    """Return this rank's parameters by global name, without a score bias if GPT-2 can hold it.

    A scalar head computes w h + b, and its hidden states h end with the bias of the last LayerNorm.
    That bias plus b w / |w|^2, with b set to 0, gives the same scores. It is fp32 whatever the
    dtype of the other weights, as the head is, so that nothing is lost by rounding.
    """
    values: dict[str, Tensor] = dict(global_names(stage))
    layernorm = "decoder.final_layernorm.bias"
    if "score.bias" not in values or layernorm not in values:
        return values
    weight, bias = values["score.weight"].double().flatten(), values["score.bias"].double()
    square = weight.square().sum()
    if square > 0 and bias != 0:
        values[layernorm] = (values[layernorm].double() + bias * weight / square).float()
        values["score.bias"] = torch.zeros_like(values["score.bias"])
    return values


def check_new_folder(path: Path) -> None:
    """Raise UserError unless `path` does not exist or is an empty folder."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path}: exists and is not empty; give a new folder")


@torch.no_grad()
def hf_tensors(stage: GPT, values: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield complete tensors and their Hugging Face names on rank 0, nothing on the other ranks.

    Every rank must iterate. `values` has one tensor per parameter of this rank, by its name in the
    full model: weights or gradients. The scalar head's bias comes last, as "score.bias" [1].
    """
    rules = tensor_map(stage.model_config, stage.vocab_size, stage.head_kind)
    if stage.head_kind == "scalar":
        rules["score.bias"] = Rule((Source("score.bias", (1,)),))
    locations = _locate(stage, values)
    for name, rule in rules.items():
        shards = _to_rank_0(
            stage.mesh, values.get(name), locations[name], sharded=rule.shard_dim is not None
        )
        if stage.mesh.rank == 0:
            yield from stored_tensors(rule, shards, stage.model_config.head_dim).items()


@dataclass(frozen=True)
class _Location:
    """The first pipeline stage that has a parameter, and the shape and dtype of one shard."""

    stage: int
    shape: tuple[int, ...]
    dtype: torch.dtype


def _locate(stage: GPT, values: Mapping[str, Tensor]) -> dict[str, _Location]:
    mesh = stage.mesh
    mine = {
        name: _Location(mesh.pipeline_rank, tuple(value.shape), value.dtype)
        for name, value in values.items()
    }
    stages: list[dict[str, _Location]] = [{}] * mesh.pipeline_size
    dist.all_gather_object(stages, mine, group=mesh.pipeline_group)
    # Reversed: of the stages that share a parameter, the first one is kept.
    return {name: location for found in reversed(stages) for name, location in found.items()}


def _to_rank_0(
    mesh: Mesh, parameter: Tensor | None, location: _Location, *, sharded: bool
) -> list[Tensor]:
    """Return the shards of a parameter on rank 0, [] on the others.

    Only the ranks of the first data-parallel replica participate.
    """
    shards: list[Tensor] = []
    if mesh.data_rank > 0 or not (sharded or mesh.tensor_rank == 0):
        return []
    if mesh.pipeline_rank == location.stage:
        assert parameter is not None
        shards = _gather_shards(mesh, parameter.contiguous()) if sharded else [parameter]
    if location.stage > 0 and mesh.tensor_rank == 0:
        if mesh.pipeline_rank == location.stage:
            for shard in shards:
                dist.send(shard, group=mesh.pipeline_group, group_dst=0)
        elif mesh.pipeline_rank == 0:
            count = mesh.tensor_size if sharded else 1
            shards = [
                torch.empty(location.shape, dtype=location.dtype, device=mesh.device)
                for _ in range(count)
            ]
            for shard in shards:
                dist.recv(shard, group=mesh.pipeline_group, group_src=location.stage)
    return shards if mesh.rank == 0 else []


def _gather_shards(mesh: Mesh, shard: Tensor) -> list[Tensor]:
    """Return all tensor-parallel shards on the first of these ranks, [] on the others."""
    if mesh.tensor_size == 1:
        return [shard]
    shards = (
        [torch.empty_like(shard) for _ in range(mesh.tensor_size)]
        if mesh.tensor_rank == 0
        else None
    )
    dist.gather(shard, shards, group=mesh.tensor_group, group_dst=0)
    return shards or []


class _Writer:
    """Writer of safetensors files of at most `max_bytes`, and of their index.

    A larger tensor gets its own file.
    """

    def __init__(self, path: Path, max_bytes: int) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.max_bytes = max_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._files: list[list[str]] = []
        self._total_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        if self._pending and self._pending_bytes + tensor.nbytes > self.max_bytes:
            self._flush()
        self._pending[name] = tensor
        self._pending_bytes += tensor.nbytes
        self._total_bytes += tensor.nbytes

    def close(self) -> None:
        self._flush()
        count = len(self._files)
        if count == 1:
            self._partial(1).rename(self.path / "model.safetensors")
            return
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._files, 1):
            file = f"model-{number:05d}-of-{count:05d}.safetensors"
            self._partial(number).rename(self.path / file)
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
        (self.path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")

    def _flush(self) -> None:
        self._files.append(list(self._pending))
        save_tensors(self._pending, self._partial(len(self._files)), {"format": "pt"})
        self._pending = {}
        self._pending_bytes = 0

    def _partial(self, number: int) -> Path:
        return self.path / f"model-{number:05d}.partial"


def write_descriptions(
    path: Path,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerFast | None,
    generation: Mapping[str, Any],
    extra: Mapping[str, object],
) -> None:
    """Write config.json with `extra`, the tokenizer, and generation_config.json for policies."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(config, name, None) is None:
            setattr(config, name, generation.get(name))
    if getattr(config, "num_labels", None) == 1:
        config.problem_type = "regression"  # transformers' pipeline then gives scores as they are
        config.id2label, config.label2id = {0: "score"}, {"score": 0}
    else:
        write_settings(path, generation)
    for name, value in extra.items():
        setattr(config, name, value)
    config.save_pretrained(path)
    if tokenizer is not None:
        tokenizer.save_pretrained(path)
