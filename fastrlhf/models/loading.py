"""Find and load the model at a path, in the shape it was saved in.

A path is a run, a checkpoint, a model folder, or a Hugging Face model. Out of scope: models whose
shape the configuration gives (`RunBuilder.model`), and training state.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fastrlhf.checkpoint.integrity import local_problems
from fastrlhf.checkpoint.model_folder import SavedModel, describe_model, load_model
from fastrlhf.config import Config, ModelConfig
from fastrlhf.config.shape import SHAPE_KEYS
from fastrlhf.data.tokenize import load_tokenizer
from fastrlhf.errors import UserError
from fastrlhf.models.checks import check_vocabulary
from fastrlhf.models.gpt import GPT, build_model
from fastrlhf.models.heads import Head
from fastrlhf.models.hf import generation_from_hf, head_from_hf, load_hf, model_config_from_hf
from fastrlhf.models.initialization import initialize_weights
from fastrlhf.parallel.mesh import Mesh

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)


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
        generation=generation_from_hf(path),
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


def saved_tokenizer(saved: SavedModel, path: str | Path | None) -> PreTrainedTokenizerFast | None:
    """Load the tokenizer of `path`, or the one that the model was saved with; None if it has none.

    Raises UserError if the model does not fit it, or if it is gone and the checkpoint, written by
    an old version, has no copy.
    """
    folder = str(path or saved.tokenizer_folder)
    if not folder:
        return None
    if path is None and saved.tokenizer_copy is not None:
        if problems := local_problems(saved.tokenizer_copy):
            raise UserError(f"{problems[0]}; give its tokenizer: --tokenizer FOLDER")
    elif path is None and not Path(folder).is_dir():
        raise UserError(
            f"{saved.path}: has no copy of its tokenizer, and {folder} is not there; give it: "
            "--tokenizer FOLDER"
        )
    tokenizer = load_tokenizer(folder)
    check_vocabulary(saved, tokenizer, folder)
    return tokenizer


def with_tokenizer_of(config: Config, saved: SavedModel) -> Config:
    """Return `config` with the model's own copy of its tokenizer if data.tokenizer is not there.

    So a run can be sampled and evaluated from another folder, or after its data has moved.
    """
    copy = saved.tokenizer_copy
    if copy is None or Path(config.data.tokenizer).is_dir() or local_problems(copy):
        return config
    logger.warning(
        "data.tokenizer %s is not there; taking the copy %s", config.data.tokenizer, copy
    )
    data = config.data.model_copy(update={"tokenizer": str(copy)})
    return config.model_copy(update={"data": data})


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
