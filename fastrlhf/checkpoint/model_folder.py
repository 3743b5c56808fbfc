"""Model folders: weights in safetensors, `model.json` and `files.json`.

A model folder is part of a checkpoint or independent. Any parallel layout can load it. A copy of
the tokenizer is in the folder `tokenizer`, of the checkpoint or of the independent model folder.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError

from fastrlhf.checkpoint.folder_writer import Contents, FolderWriter
from fastrlhf.checkpoint.integrity import MANIFEST, DamagedManifestError, read_manifest, verify
from fastrlhf.checkpoint.names import TOKENIZER
from fastrlhf.checkpoint.schema import MODEL_VERSION, ModelFile, describe_validation, read_file
from fastrlhf.checkpoint.shards import SavedStage, ShardReader, owned, parts_of, snapshot, weights
from fastrlhf.config import ModelConfig
from fastrlhf.config.field_types import MAX_NAME_BYTES
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
    """Path that the tokenizer was read from; the folder may be gone, or have another one now."""
    statistics: dict[str, float] = field(default_factory=dict)
    """Of reward models: mean (before centring) and standard deviation of demonstrations' scores."""
    generation: dict[str, Any] = field(default_factory=dict)
    """Settings of the Hugging Face model's generation_config.json, which its export gets back."""
    tokenizer_copy: Path | None = None
    """The folder's own copy of the tokenizer; None in checkpoints of old versions."""
    source: Path | None = None
    """Path that `describe_model` was given; it may lead to another checkpoint later."""

    @property
    def tokenizer_folder(self) -> str:
        """Folder to read the tokenizer from: the copy, else the recorded path; "" for none."""
        return str(self.tokenizer_copy or self.tokenizer)


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
        # A folder next to the pointer, nowhere else; other text would fill the error line.
        if name and name == Path(name).name and len(name) <= MAX_NAME_BYTES and name.isprintable():
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
            generation=file.generation,
            tokenizer_copy=_tokenizer_copy(folder),
        )
    except (FileNotFoundError, NotADirectoryError):
        raise
    except (ValueError, TypeError) as error:
        reason = describe_validation(error) if isinstance(error, ValueError) else str(error)
    except OSError as error:
        reason = error.strerror or str(error)
    raise UserError(f"{path}: not the description of a model ({reason})")


def _tokenizer_copy(folder: Path) -> Path | None:
    """Return the copy of the tokenizer in a model folder or in its checkpoint, if there is one."""
    copies = [folder / TOKENIZER, folder.absolute().parent / TOKENIZER]
    return next((copy for copy in copies if (copy / MANIFEST).is_file()), None)


def tokenizer_contents(files: Mapping[str, str]) -> Contents:
    """Return a tokenizer's `files` (name -> text) as those of its copy, on rank 0; else nothing."""
    return {f"{TOKENIZER}/{name}": text for name, text in files.items() if dist.get_rank() == 0}


def model_contents(
    stage: SavedStage,
    *,
    tokenizer: str,
    statistics: dict[str, float],
    generation: Mapping[str, Any],
    copy: bool,
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
            "version": MODEL_VERSION,
            "model": stage.model_config.model_dump(exclude={"load", "hf"}),
            "vocab_size": stage.vocab_size,
            "head": stage.head_kind,
            "tokenizer": tokenizer,
            "statistics": statistics,
            "generation": dict(generation),
        }
        contents["model.json"] = json.dumps(description, indent=2) + "\n"
    return contents


def save_model(
    path: Path,
    stage: SavedStage,
    *,
    tokenizer: str,
    tokenizer_files: Mapping[str, str] | None = None,
    statistics: dict[str, float] | None = None,
    generation: Mapping[str, Any] | None = None,
) -> None:
    """Write the model folder `path` atomically; a collective.

    `stage` is this rank's pipeline stage of the model. `tokenizer_files` are those of the copy of
    its tokenizer, `data.tokenize.tokenizer_files`; the path `tokenizer` is recorded.

    Raises UserError on every rank if one cannot write.
    """
    contents = model_contents(
        stage,
        tokenizer=tokenizer,
        statistics=statistics or {},
        generation=generation or {},
        copy=False,
    )
    contents |= tokenizer_contents(tokenizer_files or {})
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
            f"({saved.tokenizer_folder or 'unknown'}) and model.vocab_size"
        )
    reader = shard_reader(saved.path)

    def is_skipped(name: str) -> bool:
        return without_head and name.startswith("score.")

    for part in parts_of(stage, weights, is_skipped):
        reader.fill(part)


def shard_reader(folder: Path) -> ShardReader:
    """Open the shard files that the folder's `files.json` lists, and no others."""
    try:
        names = [name for name in read_manifest(folder) if name.endswith(".safetensors")]
        return ShardReader(folder, names)
    except DamagedManifestError as error:
        raise UserError(str(error)) from None
    except (OSError, SafetensorError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{folder}: its shard files cannot be read ({reason})") from None
