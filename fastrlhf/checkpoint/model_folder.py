"""Model folders: weights in safetensors of any layout, `model.json` and `files.json`; alone or inside a checkpoint."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch.distributed as dist

from fastrlhf.checkpoint.folder_writer import Contents, Writing
from fastrlhf.checkpoint.integrity import read_manifest, verify
from fastrlhf.checkpoint.shards import SavedStage, ShardReader, owned, parts_of, snapshot, weights
from fastrlhf.config import ModelConfig
from fastrlhf.errors import UserError

_MODELS = ("ema", "policy", "reward")
POINTERS = ("latest", "best")


@dataclass(frozen=True)
class SavedModel:
    """`model.json`: what a folder of weights holds."""

    path: Path
    model: ModelConfig
    vocab_size: int
    head: str
    tokenizer: str
    statistics: dict[str, float] = field(default_factory=dict)
    """Of reward models: mean and std of scores on demonstrations, and the bias that makes the mean 0."""


def describe_model(path: str | Path) -> SavedModel:
    """Finds the weights at `path`: a model folder, a checkpoint folder, a run's output folder (its latest checkpoint),
    or one of the files `checkpoints/latest` and `checkpoints/best`.

    In a checkpoint, the averaged policy ("ema") is preferred to the raw one. Raises `UserError` if there is none.
    """
    root = Path(path)
    candidates = [root]
    pointer = root if root.name in POINTERS else root / "checkpoints" / "latest"
    if pointer.is_file():
        candidates.append(pointer.parent / pointer.read_text().strip())
    for folder in candidates:
        for model in (folder, *(folder / name for name in _MODELS)):
            if (model / "model.json").is_file():
                return _described(model)
    raise UserError(
        f"{path}: no model here; expected a run's output folder, a checkpoint step_XXXXXXXX or a model folder"
    )


def _described(folder: Path) -> SavedModel:
    path = folder / "model.json"
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        return SavedModel(path=folder, **{**saved, "model": ModelConfig(**saved["model"])})
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path}: not the description of a model ({' '.join(str(error).split())})"
        ) from None


def model_contents(
    stage: SavedStage, *, tokenizer: str, statistics: dict[str, float], copy: bool
) -> Contents:
    """What this rank writes of a model folder: its shards, and on rank 0 `model.json`."""
    shards = snapshot(
        owned(parts_of(stage, weights), stage.mesh, sharded_over_data=False), copy=copy
    )
    contents: Contents = {f"rank_{dist.get_rank():05d}.safetensors": shards}
    if dist.get_rank() == 0:
        description = {
            "model": stage.model_config.model_dump(exclude={"load", "hf"}),
            "vocab_size": stage.vocab_size,
            "head": stage.head_kind,
            "tokenizer": tokenizer,
            "statistics": statistics,
        }
        contents["model.json"] = json.dumps(description, indent=2) + "\n"
    return contents


def save_model(
    path: Path, stage: SavedStage, *, tokenizer: str, statistics: dict[str, float] | None = None
) -> None:
    """Writes the weights of `stage` (all ranks call) and `model.json` to the folder `path`, which appears when it is
    complete. Raises `UserError` on every rank if any cannot write.
    """
    contents = model_contents(stage, tokenizer=tokenizer, statistics=statistics or {}, copy=False)
    Writing(path, contents, in_background=False).finish()


def load_model(saved: SavedModel, stage: SavedStage) -> None:
    """Verifies the files and loads the weights into `stage`, whatever layout they were saved under; all ranks call.

    A scalar-head stage loaded from an LM keeps its own (fresh) head: the unembedding is dropped (InstructGPT, section
    3.5). Raises `UserError` naming the file if the folder is damaged, or if the model is another one.
    """
    problems = verify(saved.path)
    if problems:
        raise UserError(f"{problems[0]}; take another checkpoint, or copy the folder again")
    fill_weights(saved, stage)


def fill_weights(saved: SavedModel, stage: SavedStage) -> None:
    """`load_model` from a folder that has been verified."""
    body_only = stage.head_kind == "scalar" and saved.head == "lm"
    if stage.head_kind != saved.head and not body_only:
        raise UserError(
            f"{saved.path}: holds a model with a {saved.head} head, not the {stage.head_kind} head needed here"
        )
    if stage.vocab_size != saved.vocab_size:
        raise UserError(
            f"{saved.path}: has a vocabulary of {saved.vocab_size}, not {stage.vocab_size}; use its tokenizer "
            f"({saved.tokenizer or 'unknown'}) and model.vocab_size"
        )
    reader = shard_reader(saved.path)
    for part in parts_of(stage, weights, skip=lambda name: body_only and name.startswith("score.")):
        reader.fill(part)


def shard_reader(folder: Path) -> ShardReader:
    """The shard files that the folder's `files.json` lists, and no others."""
    return ShardReader(
        folder / name for name in read_manifest(folder) if name.endswith(".safetensors")
    )
