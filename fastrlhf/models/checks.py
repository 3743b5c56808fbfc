"""Checks of the models that meet in a run: head, shape, layout, vocabulary and positions.

They read descriptions only, so that a command makes them before it reads data or weights.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from fastrlhf.checkpoint.model_folder import SavedModel
from fastrlhf.config import ModelConfig, ParallelConfig
from fastrlhf.config.shape import SHAPE_KEYS, check_layout
from fastrlhf.config.yaml_file import ConfigError
from fastrlhf.data.token_ids import check_ids, largest_id
from fastrlhf.data.tokenize import conflicting_id
from fastrlhf.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def check_saved(
    saved: SavedModel,
    role: str,
    parallel: ParallelConfig,
    tokenizer: PreTrainedTokenizerFast,
    folder: str,
    longest: int = 0,
) -> None:
    """Check that a loaded model fits the layout, the tokenizer of `folder` and `longest` tokens.

    `role` names the model in messages: the setting that gives it, such as "ppo.reward_model".
    Raises UserError with one line.
    """
    name = f"{role} {saved.path}"
    try:
        check_layout(saved.model, parallel, "its ", "give another model")
    except ConfigError as error:
        raise UserError(f"{name}: {error}") from None
    check_vocabulary(saved, tokenizer, folder, role)
    if saved.model.max_positions < longest:
        raise UserError(
            f"{name} reads {saved.model.max_positions} tokens, and data.max_prompt_tokens + "
            f"generation.max_new_tokens are {longest}; lower one of them, or give a model with "
            "more positions"
        )


def check_vocabulary(
    saved: SavedModel, tokenizer: PreTrainedTokenizerFast, folder: str, role: str = "the model in"
) -> None:
    """Check that the model has every token of the tokenizer of `folder`, with the same meaning.

    Raises UserError if an id is outside its vocabulary, or is a different token of the tokenizer
    that the model was saved with.
    """
    check_ids(
        largest_id(tokenizer),
        saved.vocab_size,
        f"the tokenizer {folder}",
        f"set data.tokenizer={saved.tokenizer_folder or 'FOLDER'}, or give a model with this tokenizer",
        owner=f"{role} {saved.path}",
    )
    check_meaning(saved, tokenizer, folder, role)


def check_meaning(
    saved: SavedModel, tokenizer: PreTrainedTokenizerFast, folder: str, role: str = "the model in"
) -> None:
    """Check that the tokenizer of `folder` agrees with the one that the model was saved with.

    Raises UserError if an id is a different token in the two.
    """
    if saved.tokenizer_copy is None and folder == saved.tokenizer:
        return
    if (number := conflicting_id(tokenizer, saved.tokenizer_folder)) is not None:
        own = saved.tokenizer
        if folder == own or not Path(own).is_dir():  # another tokenizer took its place, or none
            own = saved.tokenizer_folder
        raise UserError(
            f"{role} {saved.path} was trained with the tokenizer {own}, in which "
            f"token {number} differs from {folder}; set data.tokenizer={own}"
        )


def check_same_shape(model: ModelConfig, vocab_size: int, saved: SavedModel, head: str) -> None:
    """Check that the configured shape is the one that was saved.

    With rotary positions, max_positions is a limit and may differ. Raises UserError naming the
    first difference.
    """
    ignored = {"family", "vocab_size"}
    ignored.add("max_positions" if saved.model.position == "rope" else "rope_theta")
    if "scalar" in (head, saved.head):
        ignored.add("tie_embeddings")
    for name in SHAPE_KEYS:
        ours, found = getattr(model, name), getattr(saved.model, name)
        # A .gguf file keeps its floats in fp32: 1e-6 comes back as 9.99999997e-07.
        is_same = math.isclose(ours, found, rel_tol=1e-6) if isinstance(found, float) else False
        if name not in ignored and ours != found and not is_same:
            value = "null" if found is None else found
            raise UserError(
                f"model.{name} is {ours}, but the model in {saved.path} has {value}; "
                f"set model.{name}={value}, or leave it out"
            )
    if vocab_size != saved.vocab_size:
        raise UserError(
            f"the vocabulary has {vocab_size} tokens (model.vocab_size, or the tokenizer's), but "
            f"the model in {saved.path} has {saved.vocab_size}; set "
            f"model.vocab_size={saved.vocab_size}, or data.tokenizer={saved.tokenizer_folder or 'FOLDER'}"
        )
