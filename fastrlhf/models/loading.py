"""Find and load the model at a path, in the shape it was saved in.

A path is a run, a checkpoint, a model folder, or a Hugging Face model. Out of scope: models whose
shape the configuration gives (`RunBuilder.model`), and training state.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from fastrlhf.checkpoint.model_folder import SavedModel, describe_model, load_model
from fastrlhf.config import ModelConfig
from fastrlhf.config.shape import SHAPE_KEYS
from fastrlhf.errors import UserError
from fastrlhf.models.gpt import GPT, build_model
from fastrlhf.models.heads import Head
from fastrlhf.models.hf import head_from_hf, load_hf, model_config_from_hf
from fastrlhf.models.initialization import initialize_weights
from fastrlhf.parallel.mesh import Mesh


def is_hugging_face(path: str | Path) -> bool:
    """Return whether `path` is a Hugging Face folder or a .gguf file rather than our own folder."""
    path = Path(path)
    return path.suffix == ".gguf" or (
        (path / "config.json").is_file() and not (path / "model.json").is_file()
    )


def find_model(path: str | Path) -> SavedModel:
    """Describe the model saved at `path`: ours, a Hugging Face folder, or a .gguf file.

    The tokenizer of a Hugging Face folder is the folder itself, or "" if it has none. Raises
    UserError if there is no model.
    """
    path = Path(path)
    if not is_hugging_face(path):
        return describe_model(path)
    model = model_config_from_hf(path)
    assert model.vocab_size is not None
    tokenizer = str(path) if (path / "tokenizer_config.json").is_file() else ""
    return SavedModel(
        path=path,
        model=model,
        vocab_size=model.vocab_size,
        head=head_from_hf(path),
        tokenizer=tokenizer,
    )


def find_reward_model(path: str, key: str) -> SavedModel:
    """Return the reward model saved at `path`, the value of the setting `key`.

    Raises UserError if there is none.
    """
    saved = find_model(path)
    if saved.head != "scalar":
        raise UserError(
            f"{key} {saved.path} is a language model, not a reward model; give a run of the rm "
            "command"
        )
    return saved


def saved_shape(path: str) -> dict[str, object]:
    """Return the model section's shape keys of the model saved at `path`, vocab_size included.

    Raises UserError if there is no model.
    """
    saved = find_model(path)
    shape = {name: getattr(saved.model, name) for name in SHAPE_KEYS}
    return shape | {"vocab_size": saved.vocab_size}


def load_saved(
    saved: SavedModel,
    mesh: Mesh,
    head: Head,
    dtype: Literal["fp32", "bf16", "fp16"],
    *,
    seed: int | None = None,
) -> GPT:
    """Load this rank's stage of the model that `find_model` found, without dropout, in `dtype`.

    Call it on every rank. If `head` is "scalar" and a `seed` is given, a language model gets a new
    scalar head initialized from it. Raises UserError if the model has another head otherwise.
    """
    if head == "scalar" and saved.head != "scalar" and seed is None:
        raise UserError(
            f"{saved.path} is a language model: its scores would be random; give a reward model, a "
            "run of fastrlhf rm"
        )
    model = without_dropout(saved.model.model_copy(update={"dtype": dtype}))
    stage = build_model(model, mesh, saved.vocab_size, head=head)
    if seed is not None:
        initialize_weights(stage, seed, "score.")
    if is_hugging_face(saved.path):
        load_hf(saved.path, stage)
    else:
        load_model(saved, stage)
    return stage


def without_dropout(model: ModelConfig) -> ModelConfig:
    """Return the configuration with every dropout at 0."""
    off = {"residual_dropout": 0.0, "embedding_dropout": 0.0, "attention_dropout": 0.0}
    return model.model_copy(update=off)
