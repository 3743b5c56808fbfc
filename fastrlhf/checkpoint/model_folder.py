"""Model folders: weights in safetensors, `model.json` and `files.json`.

A model folder is part of a checkpoint or independent. Any parallel layout can load it.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch.distributed as dist
from safetensors import SafetensorError

from fastrlhf.checkpoint.folder_writer import Contents, FolderWriter
from fastrlhf.checkpoint.integrity import DamagedManifestError, read_manifest, verify
from fastrlhf.checkpoint.schema import VERSION, ModelFile, describe_validation, read_file
from fastrlhf.checkpoint.shards import SavedStage, ShardReader, owned, parts_of, snapshot, weights
from fastrlhf.config import ModelConfig
from fastrlhf.errors import UserError

_MODELS = ("ema", "policy", "reward")
POINTERS = ("latest", "best")


@dataclass(frozen=True)
class SavedModel:
    """Description of a folder of weights, from its `model.json`."""

    path: Path
    model: ModelConfig
    vocab_size: int
    head: str
    tokenizer: str
    statistics: dict[str, float] = field(default_factory=dict)
    """Of reward models: mean (before centring) and standard deviation of demonstrations' scores."""
    source: Path | None = None
    """Path that `describe_model` was given; it may lead to another checkpoint later."""


def describe_model(path: str | Path) -> SavedModel:
    """Find the weights at `path` and return their description.

    `path` is a model folder, a checkpoint folder, a run's output folder (its latest checkpoint is
    taken), or one of the files `checkpoints/latest` and `checkpoints/best`. In a checkpoint, the
    averaged policy ("ema") is preferred to the raw one. Raises UserError if there is no model.
    """
    root = Path(path)
    # A run may remove its checkpoint after `latest` was read: `latest` is then read again.
    found = _find_model(root) or _find_model(root)
    if found is not None:
        return found
    raise UserError(
        f"{path}: no model here; expected a run's output folder, a checkpoint step_XXXXXXXX or a model folder"
    )


def _find_model(root: Path) -> SavedModel | None:
    """Describe the model at `root`, as `describe_model` does; None if there is none now."""
    candidates = [root]
    pointer = root if root.name in POINTERS else root / "checkpoints" / "latest"
    with contextlib.suppress(OSError, UnicodeDecodeError, ValueError):
        name = pointer.read_text(encoding="utf-8").strip()
        if name and name == Path(name).name:  # a folder next to the pointer, nowhere else
            candidates.append(pointer.parent / name)
    for folder in candidates:
        for model in (folder, *(folder / name for name in _MODELS)):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                return replace(_read_description(model), source=root)
    return None


def _read_description(folder: Path) -> SavedModel:
    path = folder / "model.json"
    try:
        file = read_file(path, ModelFile)
        return SavedModel(
            path=folder,
            model=file.config(),
            vocab_size=file.vocab_size,
            head=file.head,
            tokenizer=file.tokenizer,
            statistics=file.statistics,
        )
    except (FileNotFoundError, NotADirectoryError):
        raise
    except (ValueError, TypeError) as error:
        reason = describe_validation(error) if isinstance(error, ValueError) else str(error)
    except OSError as error:
        reason = error.strerror or str(error)
    raise UserError(f"{path}: not the description of a model ({reason})")


def model_contents(
    stage: SavedStage, *, tokenizer: str, statistics: dict[str, float], copy: bool
) -> Contents:
    """Return this rank's files of a model folder: its shards, and on rank 0 `model.json`.

    `copy` False may leave views of live tensors, to be written before they change.
    """
    shards = snapshot(
        owned(parts_of(stage, weights), stage.mesh, sharded_over_data=False), copy=copy
    )
    contents: Contents = {f"rank_{dist.get_rank():05d}.safetensors": shards}
    if dist.get_rank() == 0:
        description = {
            "version": VERSION,
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
    """Write the model folder `path` atomically; a collective.

    `stage` is this rank's pipeline stage of the model. Raises UserError on every rank if one cannot
    write.
    """
    contents = model_contents(stage, tokenizer=tokenizer, statistics=statistics or {}, copy=False)
    FolderWriter(path, contents, in_background=False).finish()


def load_model(saved: SavedModel, stage: SavedStage) -> None:
    """Verify a model folder and load its weights into `stage`; a collective.

    The folder may have been saved under another layout. A model with a scalar head keeps its own
    head if the folder holds a language model, whose unembedding is dropped (InstructGPT, section
    3.5). Raises UserError with the file if the folder is damaged or holds a different model.
    """
    problems = verify(saved.path)
    if problems and (newer := _newer(saved)) is not None:
        saved, problems = newer, verify(newer.path)
    if problems:
        raise UserError(f"{problems[0]}; take another checkpoint, or copy the folder again")
    fill_weights(saved, stage)


def _newer(saved: SavedModel) -> SavedModel | None:
    """Return what `latest` leads to now, if a run has removed the folder `saved`; a collective.

    Returns None if the folder still exists, or if there is no other model of the same shape.
    """
    newer: list[SavedModel | None] = [None]
    if dist.get_rank() == 0 and saved.source is not None and not saved.path.is_dir():
        found = _find_model(saved.source)
        if found is not None and (found.model, found.head) == (saved.model, saved.head):
            newer = [found]
    dist.broadcast_object_list(newer, src=0)
    return newer[0] if newer[0] is None or newer[0].path != saved.path else None


def fill_weights(saved: SavedModel, stage: SavedStage) -> None:
    """Load weights as `load_model` does, from a folder that has been verified."""
    without_head = stage.head_kind == "scalar" and saved.head == "lm"
    if stage.head_kind != saved.head and not without_head:
        raise UserError(
            f"{saved.path}: holds a model with a {saved.head} head, not the {stage.head_kind} head needed here"
        )
    if stage.vocab_size != saved.vocab_size:
        raise UserError(
            f"{saved.path}: has a vocabulary of {saved.vocab_size}, not {stage.vocab_size}; use its tokenizer "
            f"({saved.tokenizer or 'unknown'}) and model.vocab_size"
        )
    reader = shard_reader(saved.path)

    def is_skipped(name: str) -> bool:
        return without_head and name.startswith("score.")

    for part in parts_of(stage, weights, is_skipped):
        reader.fill(part)


def shard_reader(folder: Path) -> ShardReader:
    """Open the shard files that the folder's `files.json` lists, and no others."""
    try:
        return ShardReader(
            folder / name for name in read_manifest(folder) if name.endswith(".safetensors")
        )
    except DamagedManifestError as error:
        raise UserError(str(error)) from None
    except (OSError, SafetensorError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{folder}: its shard files cannot be read ({reason})") from None
